"""`--logger`: every logger receives what metrics.jsonl has."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pytest

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.metrics import loggers
from rwkv_peft.training.metrics.events import StepMetrics
from rwkv_peft.training.metrics.loggers import CsvFile, TensorBoard, check_loggers, wanted
from rwkv_peft.training.metrics.metrics_file import MetricsFile
from tests.training.small_runs import config_of, train, write_inputs

FOURTH = "step-000004.safetensors"
BONE = ["--peft", "bone", "--bone_config", '{"r":16}', "--epoch_steps", "2"]


@dataclass(frozen=True)
class OtherEvent:
    """An event that is not an optimizer step."""

    step: int
    val_loss: float
    remark: str = "text cannot be drawn"


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step=step, loss=1.5, lr=1e-3, tokens=7, tokens_per_s=3.5, grad_norm=0.1, time=step)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path)


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_csv_has_the_steps_of_metrics_jsonl(inputs, tmp_path):
    rows = train(tmp_path / "run", inputs, *BONE, "--logger", "csv")
    assert rows_of(tmp_path / "run" / "metrics.csv") == rows
    rows = train(tmp_path / "run", inputs, *BONE, "--logger", "csv", "--epoch_begin", "1")
    assert rows_of(tmp_path / "run" / "metrics.csv") == rows
    assert len(rows) == 4
    rows = train(tmp_path / "run", inputs, *BONE, "--logger", "csv")
    assert rows_of(tmp_path / "run" / "metrics.csv") == rows
    assert len(rows) == 2


def test_csv_of_a_resumed_run(inputs, tmp_path):
    """In the run's own folder, and in a folder with another run."""
    steps = ["--epoch_steps", "6", "--save_every", "2", "--logger", "csv"]
    rows = train(tmp_path / "run", inputs, *BONE, *steps)
    train(tmp_path / "other", inputs, *BONE, *steps, "--random_seed", "1")
    for folder in ("run", "other"):
        again = train(tmp_path / folder, inputs, *BONE, *steps, "--resume", f"{tmp_path}/run/checkpoints/{FOURTH}")
        assert [row["loss"] for row in again] == [row["loss"] for row in rows]
        assert rows_of(tmp_path / folder / "metrics.csv") == again


def test_a_full_disk_is_reported_once_by_the_csv_file(tmp_path, capsys):
    file = CsvFile(tmp_path / "m.csv")
    file(metrics(1))

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    file.file.file = Full()
    for step in (2, 3):
        file(metrics(step))
    file.close()
    assert capsys.readouterr().err.count("m.csv: cannot be written ([Errno 28] No space left on device)") == 1
    assert len(rows_of(tmp_path / "m.csv")) == 1


def test_other_events_are_only_in_metrics_jsonl(tmp_path):
    consumers = [CsvFile(tmp_path / "m.csv"), MetricsFile(tmp_path / "m.jsonl")]
    for consumer in consumers:
        for event in (metrics(1), OtherEvent(1, 2.0), metrics(2)):
            consumer(event)
        consumer.close()
    assert [row["step"] for row in rows_of(tmp_path / "m.csv")] == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[1] == asdict(OtherEvent(1, 2.0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logger", "csv", "tensorboard"], "--logger: the package tensorboard is not installed. pip install"),
        (["--logger", "wandb"], "--logger: the package wandb is not installed. pip install wandb"),
        (["--wandb", "project"], "--wandb: the package wandb is not installed. pip install wandb"),
    ],
)
def test_a_missing_package_is_reported_before_the_model_is_loaded(flags, message, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    monkeypatch.setattr("rwkv_peft.training.run.prepare", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", inputs, *BONE, *flags)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_not_a_package(tmp_path, monkeypatch):
    """wandb creates a folder `wandb` in the current directory."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        check_loggers(TrainConfig(logger=("wandb",)))


def test_names_of_loggers():
    assert wanted(TrainConfig(logger=("wandb", "csv"), wandb="p")) == ("wandb", "csv")
    assert wanted(TrainConfig(wandb="p")) == ("wandb",)
    config = config_of("--logger csv,tensorboard --n_layer 1 --n_embd 64 --dry_run".split())
    assert config.train.logger == ("csv", "tensorboard")
    with pytest.raises(ConfigError, match="--logger: invalid value; found mlflow, expected csv, tensorboard or wandb"):
        TrainConfig(logger=("csv", "mlflow"))


class FakeWriter:
    """Replaces torch.utils.tensorboard.SummaryWriter, because the package is not installed for tests."""

    def __init__(self, folder: str, purge_step: int | None, flush_secs: int) -> None:
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("append", "first", "purged"),
    [(False, 1, 1), (True, 501, 501), (True, 1, None)],
    ids=["new run", "resumed run", "epoch_begin"],
)
def test_tensorboard_gets_every_number(append, first, purged, tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    board = TensorBoard(tmp_path / "tensorboard", append=append)
    board.close()
    for event in (metrics(first), OtherEvent(first, 2.0)):
        board(event)
    board.close()
    writer = board.writer
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), purged, True)
    names = ["loss", "lr", "tokens", "tokens_per_s", "grad_norm", "time"]
    assert writer.scalars[:-1] == [(name, getattr(metrics(first), name), first) for name in names]
    assert writer.scalars[-1] == ("val_loss", 2.0, first)


def test_tensorboard_reads_it_back(inputs, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(tmp_path / "run", inputs, *BONE, "--logger", "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


FAKE_WANDB = """
class errors:
    class Error(Exception): ...
runs = []
class Run:
    def __init__(self, **settings): self.settings, self.logged, self.finished = settings, [], False
    def log(self, values, step): self.logged.append({**values, "step": step})
    def finish(self): self.finished = True
def init(**settings):
    if settings["project"] == "locked": raise errors.Error("No API key configured.")
    runs.append(Run(**settings))
    return runs[-1]
"""
"""Replaces the package wandb, which is not installed for tests."""


def test_wandb_gets_the_settings_and_every_step(inputs, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    try:
        rows = train(tmp_path / "run", inputs, *BONE, "--wandb", "mine")
        (run,) = sys.modules["wandb"].runs
        assert run.logged == rows
        assert run.finished
        assert (run.settings["project"], run.settings["name"]) == ("mine", "run")
        assert run.settings["dir"] == str(tmp_path / "run")
        assert run.settings["config"]["data"]["ctx_len"] == 48
        with pytest.raises(ConfigError, match=r"wandb cannot start: No API key configured. Run wandb login once, or"):
            train(tmp_path / "run", inputs, *BONE, "--wandb", "locked")
    finally:
        sys.modules.pop("wandb", None)
