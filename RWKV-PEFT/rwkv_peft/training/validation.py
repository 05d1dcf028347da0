"""Validation during training: when the loss is measured, which weights are kept, and when it ends the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import say, warn
from rwkv_peft.data.rows.sampling import Part
from rwkv_peft.data.validation_set import ValidationSet, same_documents
from rwkv_peft.errors import CheckpointError, ConfigError, UserError
from rwkv_peft.evaluation.loss import summed
from rwkv_peft.training.metrics.events import ValidationMetrics
from rwkv_peft.training.metrics.recorder import Recorder
from rwkv_peft.training.step import TrainingModule

LARGEST_EXPONENT = 700.0
"""Losses above this (in nats) have a perplexity that is too large for a float."""


class Validator:
    """Measures the validation loss at the start, every `every` steps and at the end, on all processes together.

    Validation does not affect training: it draws no random numbers and leaves the model as it was.

    Args:
        data: the validation set.
        every: optimizer steps between validations; 0: only at the start and the end.
        patience: end the run after so many validations in a row without a better loss; 0: never.
        recorder: reports each validation, and does not count its time as training.
        keep: writes the current weights as the best so far and returns the path; every process calls it.
    """

    def __init__(
        self, data: ValidationSet, *, every: int, patience: int, recorder: Recorder, keep: Callable[[], Path]
    ) -> None:
        self.data, self.every, self.patience = data, every, patience
        self.recorder, self.keep = recorder, keep
        self.best_loss = math.inf
        self.best_step = 0
        self.not_better = 0
        """Validations since the best one."""
        self.last_step: int | None = None
        """Optimizer steps done at the last validation."""
        self.best_path: Path | None = None

    @property
    def has_measured(self) -> bool:
        """Whether there was a validation, in this process or before a resume."""
        return self.last_step is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON."""
        numbers = {name: getattr(self, name) for name in ("best_loss", "best_step", "not_better", "last_step")}
        return {**numbers, "data": self.data.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, unless it belongs to another validation set."""
        if state["data"] != self.data.identity:
            say("note: the validation set differs from the checkpoint's: the best loss starts over")
            return
        for name in state.keys() - {"data"}:
            setattr(self, name, state[name])

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Validate if it is due, and end the run if the loss has not improved for too long."""
        if not self.every or module.step % self.every:
            return
        self.validate(trainer, module)
        if self.patience and self.not_better >= self.patience:
            trainer.should_stop = True  # on every process: all have the same loss
            say(f"stopping early at step {module.step}: no better validation loss in {self.not_better} validations")

    def measure_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Validate at the end of the run, unless the last step was validated already."""
        if self.last_step != module.step:
            self.validate(trainer, module)

    def print_best(self) -> None:
        """Print the best loss of the run and the file that has its weights."""
        kept = f": {self.best_path}" if self.best_path else ""
        say(f"best validation loss {self.best_loss:.4f} at step {self.best_step}{kept}")

    def validate(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Measure the loss, report it, and save the weights if it is the best so far.

        Raises:
            UserError: the loss is not finite.
        """
        began = time.perf_counter()
        loss, tokens = validation_loss(trainer, module, self.data)
        if not math.isfinite(loss):
            hint = "Files saved earlier are unchanged. Try a lower --lr_init or --precision fp32."
            raise UserError(f"validation after step {module.step}", f"validation loss {loss} is not finite", hint=hint)
        self.last_step, self.not_better = module.step, self.not_better + 1
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.not_better = loss, module.step, 0
            self.best_path = self._keep()
        self.recorder.exclude(time.perf_counter() - began)
        perplexity = math.exp(min(loss, LARGEST_EXPONENT))
        self.recorder.report(ValidationMetrics(module.step, loss, perplexity, tokens, self.recorder.seconds()))
        kept = f"saved as {self.best_path.name}" if self.best_path else "not saved"
        note = f"best so far, {kept}" if is_best else f"best {self.best_loss:.4f}, step {self.best_step}"
        say(f"step {module.step}  validation loss {loss:.4f}  perplexity {perplexity:.4g}  ({note})")

    def _keep(self) -> Path | None:
        """Save the weights; if the disk is full, training continues with a warning."""
        try:
            return self.keep()
        except CheckpointError as error:
            warn(f"{error} Training continues.")
            return None


def validation_loss(trainer: pl.Trainer, module: TrainingModule, data: ValidationSet) -> tuple[float, int]:
    """Return the mean loss in nats over a validation set's tokens in the loss, and their number.

    The result is the same for any number of processes.
    """
    total = torch.zeros(2, dtype=torch.float64, device=module.device)  # summed loss, tokens
    with torch.no_grad(), _evaluating(trainer.strategy.model):
        for batch in data.batches(trainer.global_rank, trainer.world_size):
            batch = {key: tensor.to(module.device) for key, tensor in batch.items()}
            # The strategy's own model gathers parameters that ZeRO-3 shards.
            total += summed(trainer.strategy.model(batch), batch["loss_mask"])
    loss, tokens = trainer.strategy.reduce(total, reduce_op="sum").tolist()
    if not tokens:
        raise UserError("validation", "no tokens in the loss: --loss_mask leaves none of the validation rows")
    return loss / tokens, int(tokens)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and restore every module's mode afterwards."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_schedule(config: RunConfig, data: ValidationSet | None) -> None:
    """Raise ConfigError if the flags ask for validations but there is no validation set."""
    if config.train.val_every and data is None:
        hint = "Give --val_data_file or --val_fraction."
        raise ConfigError("val_every", what="there is no validation set", found=config.train.val_every, hint=hint)


def validation_lines(config: RunConfig, data: ValidationSet | None, training: Sequence[Part]) -> list[str]:
    """Return lines for the startup summary: validation set, tokens in the loss, schedule."""
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
    patience = f"; stops after {train.patience} validations without a better loss" if train.patience else ""
    lines.append(f"        {-(-len(data) // batch):,} batches {schedule}{patience}; loss on {_what_counts(data.masks)}")
    theirs = tuple(part.samples.mask.name for part in training)
    if _what_counts(data.masks) != _what_counts(theirs):
        lines.append(
            f"note: the training loss is on {_what_counts(theirs)}, the validation loss on {_what_counts(data.masks)}"
        )
    if (same := same_documents(data, training)) is not None:
        lines.append(f"note: {same} is training data: the validation loss says nothing about other text")
    return lines


def _what_counts(masks: Sequence[str]) -> str:
    names = " ".join(dict.fromkeys(masks))
    if set(masks) <= {"none", "pad"}:
        return "every token"
    return f"the tokens of --loss_mask {names}"
