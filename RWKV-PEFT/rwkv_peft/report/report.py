"""Write a run's report.html: one file that any browser opens, without a network."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rwkv_peft.config.sections import SECTIONS, ModelConfig, RunConfig
from rwkv_peft.errors import UserError
from rwkv_peft.files import atomic_write
from rwkv_peft.metrics_history import History, clock, read_history
from rwkv_peft.report import page
from rwkv_peft.report.charts import Curve, chart
from rwkv_peft.report.environment import hardware, peak_memory, software


@dataclass
class Sample:
    """A prompt, and the model's completions of it."""

    prompt: str
    answers: dict[int, str] = field(default_factory=dict)
    """Completion by optimizer step; 0 is before training."""


def write_report(
    folder: Path,
    config: RunConfig,
    summary: str,
    trained_table: str,
    samples: Sequence[Sample],
    ending: str,
    *,
    devices: int = 1,
    this_process: bool = True,
) -> None:
    """Write report.html into a run's folder, from the metrics.jsonl there.

    Args:
        folder: the run's folder (`--proj_dir`).
        config: resolved.
        summary: the lines that the run printed at the start.
        trained_table: the part of `summary` that lists the trainable parameters; it is shown separately.
        samples: prompts and their completions.
        ending: how the run ended, see `describe_ending`.
        devices: number of processes that trained, for the throughput.
        this_process: whether this process did the run; adds its command, versions, hardware and peak memory.
    Raises:
        OSError: metrics.jsonl cannot be read.
        CheckpointError: report.html cannot be written.
    """
    history = read_history(folder / "metrics.jsonl")
    changed, everything = settings(config)
    rates = _throughput(history, config, devices)
    parts = [
        page.tiles(_figures(history)),
        page.section("Curves", _charts(history)),
        page.section("Samples", *(_sample(number, sample) for number, sample in enumerate(samples, 1))),
        page.section("Run", page.pre(summary.replace(f"{trained_table}\n", ""), wrap=True), page.pre(trained_table)),
        page.section("Throughput", page.table(rates | peak_memory() if this_process else rates)),
        page.section("Settings", page.table(changed), page.folded("All settings", page.table(everything))),
        page.section("Files", page.links(_files(folder))),
    ]
    if this_process:
        parts += [
            page.section("Command", page.pre(shlex.join(["python", *sys.argv]), wrap=True)),
            page.section("Environment", page.table(software())),
            page.section("Hardware", page.table(hardware())),
        ]
    html = page.page(str(folder), f"{ending}, {time.strftime('%Y-%m-%d %H:%M')}", parts)
    with atomic_write(folder / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")


def describe_ending(error: BaseException | None) -> str:
    """Return how a run ended, for the report, from the exception that ended it (None: it finished)."""
    if error is None:
        return "finished"
    if isinstance(error, SystemExit):
        return "stopped by a signal" if error.code in (130, 143) else f"ended with exit code {error.code}"
    return f"ended by an error: {error if isinstance(error, UserError) else repr(error)}"


def _throughput(history: History, config: RunConfig, devices: int) -> dict[str, str]:
    """Return the rate of the tokens in the loss, and the rate of all tokens, which is better for comparing machines."""
    seconds, trained = history.typical("seconds"), history.typical("tokens_per_s")
    rows = {"training time": clock(history.seconds)}
    if trained is not None:
        rows["tokens in the loss"] = f"{trained:,.0f}/s (median over the steps; without padding and masked tokens)"
    if seconds and config.data.dataload != "only":
        tokens = config.data.micro_bsz * devices * config.data.ctx_len * config.optim.accumulate_grad_batches
        rows["all tokens"] = f"{tokens / seconds:,.0f}/s (with padding and masked tokens)"
    if seconds:
        rows["optimizer step"] = f"{seconds:.3g} s"
    return rows


def _figures(history: History) -> dict[str, str]:
    """Return the most important numbers, for the top of the page."""
    loss, validation = history.smoothed_loss(), history.points("val_loss")
    rows = {"steps": f"{history.steps[-1]['step']:,}" if history.steps else "0"}
    if loss:
        rows["loss, averaged"] = f"{loss[0][1]:.3f} → {loss[-1][1]:.3f}"
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        rows["best validation loss"] = f"{best:.3f} at step {step:,}"
    rows["tokens in the loss"] = f"{sum(int(tokens) for _, tokens in history.points('tokens')):,}"
    rows["training time"] = clock(history.seconds)
    speed = history.typical("tokens_per_s")
    return rows if speed is None else rows | {"tokens in the loss/s": f"{speed:,.0f}"}


def _charts(history: History) -> str:
    """Return the curves over the optimizer steps."""
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
    """Return a prompt and its completions."""
    texts = {f"Prompt {number}": sample.prompt}
    for step, answer in sample.answers.items():
        texts[f"After step {step:,}" if step else "Before training"] = answer or "(empty)"
    inner = "".join(f"<h3>{page.text(title)}</h3>{page.pre(content, wrap=True)}" for title, content in texts.items())
    return f'<div class="sample">{inner}</div>'


def settings(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return the flags that differ from their defaults, and all flags, with their values.

    The shape of the model is not among the first: it is read from the base model.
    """
    changed, everything = {}, {}
    values, defaults = config.to_dict(), RunConfig().to_dict()
    for name, owner in SECTIONS.items():
        for setting, value in values[name].items():
            shown = _shown(value)
            everything[f"--{setting}"] = shown
            if owner is not ModelConfig and shown != _shown(defaults[name][setting]):
                changed[f"--{setting}"] = shown
    return changed, everything


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _files(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the files in the run's folder: name, address relative to the report, size."""
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
    """Format a number of bytes: 1536 -> 1.5 kB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
