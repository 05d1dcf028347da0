"""Where metrics go: the terminal, metrics.jsonl, and what `--logger` names."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.metrics.recorder import LineFile, MetricsFile, Progress, StepMetrics, row

DEFAULT_PROJECT = "rwkv-peft"
"""Weights & Biases project of `--logger wandb` without `--wandb`."""


class Event(Protocol):
    """A dataclass with the optimizer step that it belongs to, and numbers under names of its own."""

    step: int


class Consumer(Protocol):
    """Takes the events of a run, on the main process."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Write what is still held back."""


def check_loggers(train: TrainConfig) -> None:
    """Raise ConfigError where a logger's package is not installed; imports none."""
    for name in wanted(train):
        if name != "csv" and not _installed(name):
            flag = "logger" if name in train.logger else name
            what, hint = f"the package {name} is not installed", f"pip install {name}, or leave the flag away."
            raise ConfigError(flag, what=what, hint=hint)


def _installed(package: str) -> bool:
    """A folder of that name, such as wandb leaves where it ran, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def wanted(train: TrainConfig) -> tuple[str, ...]:
    """The names of `--logger`, and wandb where `--wandb` names a project; each once."""
    return tuple(dict.fromkeys([*train.logger, *(["wandb"] if train.wandb else [])]))


def open_consumers(
    config: RunConfig, total_steps: int, *, first_step: int = 0, rows: Sequence[Mapping[str, Any]] = ()
) -> list[Consumer]:
    """Everything that takes a run's events; for the main process, once the run's folder is there.

    Args:
        total_steps: optimizer steps of the run, for the progress line.
        first_step: optimizer steps that earlier processes made of it, up to the checkpoint that it goes on from.
        rows: lines of metrics.jsonl that stay.
    Raises:
        ConfigError: a logger cannot start.
    """
    folder = Path(config.train.proj_dir)
    loggers: dict[str, Any] = {
        "csv": lambda: CsvFile(folder / "metrics.csv", rows),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", go_on=bool(rows)),
        "wandb": lambda: WeightsAndBiases(config),
    }
    opened = [loggers[name]() for name in wanted(config.train)]
    losses = [line["loss"] for line in rows if line.get("loss") is not None]
    metrics = MetricsFile(folder / "metrics.jsonl", go_on=bool(rows))
    return [*opened, metrics, Progress(total_steps, first_step, losses if first_step else ())]


class CsvFile:
    """The fields of StepMetrics as columns, a row a step. Events of another kind, such as validation, are left out:
    they have other columns, and metrics.jsonl has them.

    Args:
        rows: what metrics.jsonl has of the run so far; the file is made anew from it.
    """

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        columns = [spec.name for spec in fields(StepMetrics)]
        self.file = LineFile(path)
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(line for line in rows if "loss" in line)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepMetrics):
            self.writer.writerow(row(event))

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files for TensorBoard, a scalar for each number of an event."""

    def __init__(self, folder: Path, *, go_on: bool = False) -> None:
        self.folder, self.go_on = folder, go_on
        self.writer = None

    def __call__(self, event: Event) -> None:
        if self.writer is None:
            self.writer = self._open(event.step)
        for name, value in numbers(event).items():
            self.writer.add_scalar(name, value, event.step)

    def _open(self, first: int) -> Any:
        """TensorBoard is told to forget steps from the first one on: those of an earlier run in this folder, or those
        between the checkpoint that a run goes on from and its end. `--epoch_begin` counts steps from 1 again, and keeps
        those of before."""
        from torch.utils.tensorboard import SummaryWriter

        keeps = self.go_on and first <= 1
        return SummaryWriter(str(self.folder), purge_step=None if keeps else first, flush_secs=10)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. A training run that goes on is another one there, in the same group.

    Offline with WANDB_MODE=offline: it is then a folder in `--proj_dir`, for `wandb sync`.

    Raises:
        ConfigError: there is no account to log in with.
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
                config=asdict(config),
            )
        except wandb.errors.Error as error:
            what, hint = (
                f"wandb cannot start: {str(error).rstrip('. ')}",
                "Run wandb login once, or set WANDB_MODE=offline.",
            )
            raise ConfigError("logger", what=what, hint=hint) from error

    def __call__(self, event: Event) -> None:
        self.run.log(numbers(event), step=event.step)

    def close(self) -> None:
        self.run.finish()


def numbers(event: Event) -> Mapping[str, float]:
    """What can be drawn as a curve over the steps."""
    return {
        name: value
        for name, value in asdict(event).items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
