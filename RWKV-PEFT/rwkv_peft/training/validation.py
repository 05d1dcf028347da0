"""Held-out loss while training: when it is measured, what is kept, and when it ends the run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.rows.sampling import Part
from rwkv_peft.data.validation_set import ValidationSet, same_documents
from rwkv_peft.errors import CheckpointError, ConfigError, UserError
from rwkv_peft.training.metrics.recorder import StepCallback, StepRecorder
from rwkv_peft.training.module import TrainingModule

LARGEST_EXPONENT = 700.0
"""A loss above, in nats, has no perplexity in a float."""


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation; a line of metrics.jsonl."""

    step: int
    """Optimizer steps done."""
    val_loss: float
    """Mean over the trained tokens of the validation set, in nats."""
    val_ppl: float
    """exp(val_loss)."""
    val_tokens: int
    """Tokens that it is the mean over."""
    time: float
    """Seconds of training so far; those of validations are not in it."""


class Validator(StepCallback):
    """Measures the held-out loss at the start, every `every` steps and at the end, on all processes together.

    Training goes on exactly as without it: no random number is drawn, and nothing of the model changes.

    Args:
        data: the validation set.
        every: optimizer steps from one validation to the next; 0: at the start and the end only.
        patience: end the run after so many validations without a better loss; 0: never.
        recorder: its clock stands still meanwhile, and its consumers get every ValidationMetrics.
        keep: writes what is trained, as the best so far, and returns the file's path; every process calls it.
    """

    def __init__(
        self,
        data: ValidationSet,
        *,
        every: int,
        patience: int,
        recorder: StepRecorder,
        keep: Callable[[], Path],
    ) -> None:
        super().__init__()
        self.data, self.every, self.patience = data, every, patience
        self.recorder, self.keep = recorder, keep
        self.best_loss = math.inf
        self.best_step = 0
        self.not_better = 0
        """Validations since the best one."""
        self.last_step: int | None = None
        """Optimizer steps done at the last validation."""
        self.best_path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; it may be stored as JSON once a validation has been made."""
        numbers = {name: getattr(self, name) for name in ("best_loss", "best_step", "not_better", "last_step")}
        return {**numbers, "data": self.data.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; losses on other data say nothing of these."""
        if state["data"] != self.data.identity:
            say("note    the validation set is another than before: its losses begin anew")
            return
        for name in state.keys() - {"data"}:
            setattr(self, name, state[name])

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if self.last_step is None:  # a resumed run has one
            self.validate(trainer, module)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if not self.every or module.step % self.every:
            return
        self.validate(trainer, module)
        if self.patience and self.not_better >= self.patience:
            trainer.should_stop = True  # on every process: the loss is the same on all
            say(f"stopping early at step {module.step}: no better held-out loss in {self.not_better} validations")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """At the end of the run, before its last checkpoint."""
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if last and self.last_step != module.step:
            self.validate(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        kept = f": {self.best_path}" if self.best_path else ""
        say(f"best held-out loss {self.best_loss:.4f} at step {self.best_step}{kept}")

    def validate(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Measure, tell, and keep what is best.

        Raises:
            UserError: the loss is not finite.
        """
        began = time.perf_counter()
        loss, tokens = held_out_mean(trainer, module, self.data)
        if not math.isfinite(loss):
            hint = "The last good files are as they were. A lower --lr_init, or --precision fp32, may help."
            raise UserError(f"validation after step {module.step}", f"held-out loss {loss}: not finite", hint=hint)
        self.last_step, self.not_better = module.step, self.not_better + 1
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.not_better = loss, module.step, 0
            self.best_path = self._keep()
        self.recorder.leave_out(time.perf_counter() - began)
        perplexity = math.exp(min(loss, LARGEST_EXPONENT))
        metrics = ValidationMetrics(module.step, loss, perplexity, tokens, self.recorder.seconds())
        for consume in self.recorder.consumers:
            consume(metrics)
        kept = f"kept as {self.best_path.name}" if self.best_path else "not kept"
        note = f"best so far, {kept}" if is_best else f"best {self.best_loss:.4f}, step {self.best_step}"
        say(f"step {module.step}  held-out loss {loss:.4f}  perplexity {perplexity:.4g}  ({note})")

    def _keep(self) -> Path | None:
        """As for an epoch's file, a full disk costs a line and not the run."""
        try:
            return self.keep()
        except CheckpointError as error:
            sys.stderr.write(f"warning: {error} Training goes on.\n")
            return None


def held_out_mean(trainer: pl.Trainer, module: TrainingModule, data: ValidationSet) -> tuple[float, int]:
    """Mean loss in nats over the trained tokens of a validation set, and their number, on any number of processes."""
    total = torch.zeros(2, dtype=torch.float64, device=module.device)  # summed loss, tokens
    with torch.no_grad(), _evaluating(trainer.strategy.model):
        for batch in data.batches(trainer.global_rank, trainer.world_size):
            # By way of the strategy's own model, which gathers what ZeRO-3 has shared out.
            total += trainer.strategy.model({key: tensor.to(module.device) for key, tensor in batch.items()})
    loss, tokens = trainer.strategy.reduce(total, reduce_op="sum").tolist()
    if not tokens:
        raise UserError("validation", "nothing counts: --loss_mask leaves no token of the validation rows")
    return loss / tokens, int(tokens)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module is as it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_schedule(config: RunConfig, data: ValidationSet | None) -> None:
    """Raise ConfigError where the flags ask for validations and there is nothing to validate on."""
    if config.train.val_every and data is None:
        hint = "Give --val_data_file or --val_fraction."
        raise ConfigError("val_every", what="there is nothing to validate on", found=config.train.val_every, hint=hint)


def validation_lines(config: RunConfig, data: ValidationSet | None, training: Sequence[Part]) -> list[str]:
    """For the banner: on what, what counts, when."""
    if data is None:
        return []
    train, batch = config.train, config.data.micro_bsz
    names = " ".join(dict.fromkeys(part.reader.prefix for part in data.parts))
    lines = [f"val     {names} ({data.origin}): {data.documents:,} documents, {data.tokens:,} tokens"]
    schedule = (
        f"at the start, every {train.val_every:,} steps and at the end"
        if train.val_every
        else "at the start and the end"
    )
    patience = f"; stops after {train.patience} without a better loss" if train.patience else ""
    lines.append(f"        {-(-len(data) // batch):,} batches {schedule}{patience}; counts {_what_counts(data.masks)}")
    theirs = tuple(part.samples.mask.name for part in training)
    if _what_counts(data.masks) != _what_counts(theirs):
        lines.append(f"note    training counts {_what_counts(theirs)}, validation {_what_counts(data.masks)}")
    if (same := same_documents(data, training)) is not None:
        lines.append(f"note    {same} is what trains: its loss says nothing about other text")
    return lines


def _what_counts(masks: Sequence[str]) -> str:
    names = " ".join(dict.fromkeys(masks))
    if set(masks) <= {"none", "pad"}:
        return "every token"
    return f"what --loss_mask {names} lets train"
