"""report.html, what a run leaves behind for people: one file that opens anywhere."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from rwkv_peft.config.sections import SECTIONS, ModelConfig, RunConfig
from rwkv_peft.errors import UserError
from rwkv_peft.report import page
from rwkv_peft.report.charts import Curve, chart
from rwkv_peft.report.environment import hardware, peak_memory, software
from rwkv_peft.report.history import History, read_history
from rwkv_peft.training.distributed.strategy import world_size
from rwkv_peft.training.metrics.recorder import StepCallback, clock
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.sample_texts import Sample


class LeavesReport(StepCallback):
    """Writes report.html into `--proj_dir` however the run inside of it ends, once it has made a step.

    A report that cannot be written is one line on stderr, and nothing else: it must not cost a run its result.

    Args:
        config: resolved.
        summary: the lines that the run began with.
        trained: the table of what trains, a part of `summary`.
        samples: prompts, answered while the run goes on.
    """

    def __init__(self, config: RunConfig, summary: str, trained: str, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.config, self.samples, self.trained = config, samples, trained
        self.summary = summary.replace(f"{trained}\n", "")
        self.folder = Path(config.train.proj_dir)
        self.stepped = False
        """Whether this run has made a step: before, the folder may be another's."""

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.stepped = True

    def __enter__(self) -> LeavesReport:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.stepped:
            self.write(_ending(error))

    @rank_zero_only
    def write(self, ending: str) -> None:
        """Write the file, from metrics.jsonl.

        Args:
            ending: how the run ended.
        """
        try:
            html = self.html(read_history(self.folder / "metrics.jsonl"), ending)
            beside = self.folder / "report.html.partial"
            beside.write_text(html, encoding="utf-8")
            beside.replace(self.folder / "report.html")
        except Exception as error:  # whatever it is, the run has its result
            sys.stderr.write(f"note: no report.html: {type(error).__name__}: {' '.join(str(error).split())}\n")

    def html(self, history: History, ending: str) -> str:
        """The whole page."""
        changed, everything = settings(self.config)
        parts = [
            page.tiles(_figures(history)),
            page.section("Curves", _charts(history)),
            page.section("Samples", *(_sample(number, sample) for number, sample in enumerate(self.samples, 1))),
            page.section("Run", page.pre(self.summary, wrap=True), page.pre(self.trained)),
            page.section("Throughput", page.table(self._throughput(history) | peak_memory())),
            page.section("Settings", page.table(changed), page.folded("All settings", page.table(everything))),
            page.section("Command", page.pre(shlex.join(["python", *sys.argv]), wrap=True)),
            page.section("Files", page.links(_files(self.folder))),
            page.section("Environment", page.table(software())),
            page.section("Hardware", page.table(hardware())),
        ]
        return page.page(str(self.folder), f"{ending}, {time.strftime('%Y-%m-%d %H:%M')}", parts)

    def _throughput(self, history: History) -> dict[str, str]:
        """Trained tokens are what a run is paid for; all tokens are what compares machines."""
        seconds, trained = history.typical("seconds"), history.typical("tokens_per_s")
        rows = {"training time": clock(history.seconds)}
        if trained is not None:
            rows["trained tokens"] = f"{trained:,.0f}/s (median of the steps; without padding and masked tokens)"
        if seconds and self.config.data.dataload != "only":
            data, train = self.config.data, self.config.train
            batch = data.micro_bsz * world_size(train)
            tokens = batch * data.ctx_len * self.config.optim.accumulate_grad_batches
            rows["all tokens"] = f"{tokens / seconds:,.0f}/s (padding and masked tokens included)"
        if seconds:
            rows["a step"] = f"{seconds:.3g} s"
        return rows


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, SystemExit):
        return "stopped by a signal" if error.code in (130, 143) else f"ended with code {error.code}"
    return f"ended by an error: {error if isinstance(error, UserError) else repr(error)}"


def _figures(history: History) -> dict[str, str]:
    loss, validation = history.smoothed_loss(), history.points("val_loss")
    rows = {"steps": f"{history.steps[-1]['step']:,}" if history.steps else "0"}
    if loss:
        rows["loss, averaged"] = f"{loss[0][1]:.3f} → {loss[-1][1]:.3f}"
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        rows["best validation loss"] = f"{best:.3f} at step {step:,}"
    rows["trained tokens"] = f"{sum(int(tokens) for _, tokens in history.points('tokens')):,}"
    rows["training time"] = clock(history.seconds)
    speed = history.typical("tokens_per_s")
    return rows if speed is None else rows | {"trained tokens/s": f"{speed:,.0f}"}


def _charts(history: History) -> str:
    validation = Curve("validation", history.points("val_loss"), "other", dots=True)
    loss = [Curve("each step", history.points("loss"), "raw"), Curve("averaged", history.smoothed_loss()), validation]
    charts = [
        chart("Loss, nats per token", loss),
        chart("Learning rate", [Curve("lr", history.points("lr"))]),
        chart("Gradient norm, before clipping", [Curve("gradient norm", history.points("grad_norm"))], log=True),
        chart("Trained tokens per second", [Curve("tokens/s", history.points("tokens_per_s"))]),
    ]
    drawn = "\n".join(filter(None, charts))
    return f'<div class="charts">\n{drawn}\n</div>' if drawn else ""


def _sample(number: int, sample: Sample) -> str:
    texts = {f"Prompt {number}": sample.prompt}
    for step, answer in sample.answers.items():
        texts[f"After step {step:,}" if step else "Before training"] = answer or "(nothing)"
    inner = "".join(f"<h3>{page.text(title)}</h3>{page.pre(content, wrap=True)}" for title, content in texts.items())
    return f'<div class="sample">{inner}</div>'


def settings(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What differs from the defaults, and everything, as flags and their values. A model's shape is not a choice."""
    changed, everything = {}, {}
    for name, owner in SECTIONS.items():
        values = asdict(getattr(config, name))
        for spec in fields(owner):
            shown = _shown(values[spec.name])
            everything[f"--{spec.name}"] = shown
            if owner is not ModelConfig and shown != _shown(_default(spec)):
                changed[f"--{spec.name}"] = shown
    return changed, everything


def _default(spec: Field) -> Any:
    return spec.default if spec.default is not MISSING else spec.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _files(folder: Path) -> dict[str, tuple[str, str]]:
    """What lies in the run's folder: name, address relative to the report, size."""
    rows = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "report.html")):
            continue
        inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = size_in_words(sum(file.stat().st_size for file in inside))
        remark = size if path.is_file() else f"{size} in {len(inside)} files"
        rows[path.name] = (quote(path.name), remark)
    return rows


def size_in_words(count: int) -> str:
    """1536 -> 1.5 kB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
