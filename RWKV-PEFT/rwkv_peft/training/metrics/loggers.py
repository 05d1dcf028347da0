"""Where metrics go: the terminal, metrics.jsonl, and the loggers of `--logger`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.metrics.events import Event, StepMetrics, to_row
from rwkv_peft.training.metrics.metrics_file import LineFile, MetricsFile
from rwkv_peft.training.metrics.progress import Progress

DEFAULT_PROJECT = "rwkv-peft"
"""Weights & Biases project of `--logger wandb` without `--wandb`."""


class Consumer(Protocol):
    """Receives the events of a run, on the main process."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Write what is still buffered."""


def check_loggers(train: TrainConfig) -> None:
    """Raise ConfigError if a logger's package is not installed. Imports none of them."""
    for name in wanted(train):
        if name != "csv" and not _installed(name):
            flag = "logger" if name in train.logger else name
            what, hint = f"the package {name} is not installed", f"pip install {name}, or omit the flag."
            raise ConfigError(flag, what=what, hint=hint)


def _installed(package: str) -> bool:
    """A folder of that name without a module, such as wandb creates, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def wanted(train: TrainConfig) -> tuple[str, ...]:
    """Return the names in `--logger`, and wandb if `--wandb` gives a project; each once."""
    return tuple(dict.fromkeys([*train.logger, *(["wandb"] if train.wandb else [])]))


def open_consumers(
    config: RunConfig, total_steps: int, *, first_step: int = 0, rows: Sequence[Mapping[str, Any]] = ()
) -> list[Consumer]:
    """Open everything that receives a run's events. For the main process, after the run's folder exists.

    Args:
        total_steps: optimizer steps of the run, for the progress line.
        first_step: optimizer steps of the run before this process, up to the checkpoint that it resumes from.
        rows: lines of metrics.jsonl that are kept.
    Raises:
        ConfigError: a logger cannot start.
    """
    folder = Path(config.train.proj_dir)
    loggers: dict[str, Any] = {
        "csv": lambda: CsvFile(folder / "metrics.csv", rows),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", append=bool(rows)),
        "wandb": lambda: WeightsAndBiases(config),
    }
    opened = [loggers[name]() for name in wanted(config.train)]
    losses = [line["loss"] for line in rows if line.get("loss") is not None]
    metrics = MetricsFile(folder / "metrics.jsonl", append=bool(rows))
    return [*opened, metrics, Progress(total_steps, first_step, losses if first_step else ())]


class CsvFile:
    """Writes one row per optimizer step, with the fields of StepMetrics as columns.

    Other events, such as validations, have other columns and are only in metrics.jsonl.

    Args:
        rows: the lines of metrics.jsonl so far; the file starts with them.
    """

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        columns = [spec.name for spec in fields(StepMetrics)]
        self.file = LineFile(path)
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(line for line in rows if "loss" in line)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepMetrics):
            self.writer.writerow(to_row(event))

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Writes TensorBoard event files, with one scalar per number of an event."""

    def __init__(self, folder: Path, *, append: bool = False) -> None:
        self.folder, self.append = folder, append
        self.writer = None

    def __call__(self, event: Event) -> None:
        if self.writer is None:
            self.writer = self._open(event.step)
        for name, value in numbers(event).items():
            self.writer.add_scalar(name, value, event.step)

    def _open(self, first: int) -> Any:
        """Open the writer and make TensorBoard drop later steps that it has already.

        Those are steps of an earlier run in this folder, or steps after the checkpoint that the run resumes from. With
        `--epoch_begin` the steps count from 1 again, and earlier ones are kept.
        """
        from torch.utils.tensorboard import SummaryWriter

        keeps = self.append and first <= 1
        return SummaryWriter(str(self.folder), purge_step=None if keeps else first, flush_secs=10)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases. A resumed run is a new run there, in the same group.

    With WANDB_MODE=offline the log is a folder in `--proj_dir`, for `wandb sync`.

    Raises:
        ConfigError: wandb cannot log in.
    """

    def __init__(self, config: RunConfig) -> None:
        import wandb

        folder = Path(config.train.proj_dir).absolute()
        try:
            self.run = wandb.init(
                project=config.train.wandb or DEFAULT_PROJECT,
                name=folder.name,
                group=folder.name,
                dir=str(folder),
                config=config.to_dict(),
            )
        except wandb.errors.Error as error:
            what = f"wandb cannot start: {str(error).rstrip('. ')}"
            hint = "Run wandb login once, or set WANDB_MODE=offline."
            raise ConfigError("logger", what=what, hint=hint) from error

    def __call__(self, event: Event) -> None:
        self.run.log(numbers(event), step=event.step)

    def close(self) -> None:
        self.run.finish()


def numbers(event: Event) -> Mapping[str, float]:
    """Return the numbers of an event that can be drawn as curves over the steps."""
    return {
        name: value
        for name, value in asdict(event).items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
