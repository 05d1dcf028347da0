"""Completes the prompts of `--sample_prompts` before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.console import say
from rwkv_peft.data.binidx.reader import BinidxMeta
from rwkv_peft.data.inspect.token_view import escape_controls
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, DataError, UserError
from rwkv_peft.inference.generate import generate
from rwkv_peft.report.report import Sample
from rwkv_peft.training.step import TrainingModule

SAMPLE_TOKENS = 100
"""Maximum length of a completion."""


def read_prompts(train: TrainConfig) -> list[str]:
    r"""Read the prompts of `--sample_prompts`; [] without the flag.

    Each line is a prompt. It is plain text, in which `\n` stands for a line break and `\\` for a backslash. A line that
    starts with a brace is JSON with the prompt under the key "prompt". Empty lines are ignored.

    Raises:
        UserError: the file is missing, empty or has a bad line, or the strategy shards the model.
    """
    if not train.sample_prompts:
        return []
    if train.zero_stage == 3:
        what = f"{train.strategy} shards the model, so no process can generate text alone"
        raise ConfigError("sample_prompts", what=what, hint="Use deepspeed_stage_2, or omit the flag.")
    path = Path(train.sample_prompts)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("sample_prompts", what=f"{path} cannot be read: {error}") from error
    prompts = [
        _prompt(line.removesuffix("\r"), f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise ConfigError("sample_prompts", what=f"{path} has no prompts", expected="one per line")
    return prompts


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode("utf-8")  # JSON can contain half of a surrogate pair
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(where, "not a prompt", found=line[:60], expected='{"prompt": "text"}, or plain text') from error
    if not prompt:
        raise DataError(where, "an empty prompt", hint="The model needs at least one token to continue from.")
    return prompt


class SampleTexts:
    """Greedy completions of fixed prompts at the start and the end of training, on the main process.

    They do not affect training: no random numbers are drawn, and no gradients are kept.

    Args:
        prompts: texts; without any, nothing is done.
        meta: describes the tokenizer of the run's data.
        vocab_size: of the model.
    Raises:
        UserError: the data's tokenizer is unknown or cannot be loaded, or a prompt has ids outside the vocabulary.
    """

    def __init__(self, prompts: Sequence[str], meta: BinidxMeta | None, vocab_size: int) -> None:
        self.samples = [Sample(prompt) for prompt in prompts]
        self.tokenizer = _tokenizer_of(meta) if prompts else None
        self.ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, self.ids, strict=True):
            if not ids or max(ids) >= vocab_size:
                found = f"token {max(ids)}" if ids else "no token"
                raise ConfigError(
                    "sample_prompts",
                    what=f"the model cannot process {prompt[:40]!r}",
                    found=found,
                    expected=f"ids below the vocabulary size {vocab_size}",
                )

    def write(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Complete every prompt with the current weights."""
        if not trainer.is_global_zero:
            return
        model, step = module.model, module.step
        training = model.training
        model.eval()
        for sample, ids in zip(self.samples, self.ids, strict=True):
            ids = generate(model, ids, max_tokens=SAMPLE_TOKENS, temperature=0, stop=self.tokenizer.eod)
            sample.answers[step] = self.tokenizer.decode(ids)
        model.train(training)

    def print_report(self, trainer: pl.Trainer) -> None:
        """Print all prompts and completions."""
        if trainer.is_global_zero and self.samples:
            say(self.report())

    def report(self) -> str:
        """Return all prompts and completions as text without control characters."""
        lines = []
        for number, sample in enumerate(self.samples, 1):
            lines += [f"--- prompt {number} of {len(self.samples)}", escape_controls(sample.prompt)]
            for step, answer in sample.answers.items():
                lines += [f"--- after step {step}" if step else "--- before training", escape_controls(answer)]
        return "\n".join(lines)


def _tokenizer_of(meta: BinidxMeta | None) -> Tokenizer:
    """Load the tokenizer that the data was made with."""
    if meta is None:
        what = "the data does not name its tokenizer"
        hint = "Convert it with rwkv-peft convert, which writes a .meta.json, or omit the flag."
        raise ConfigError("sample_prompts", what=what, hint=hint)
    try:
        tokenizer = load_tokenizer(meta.tokenizer_spec)
    except UserError as error:
        what = f"the data's tokenizer {meta.tokenizer_spec} cannot be loaded"
        raise ConfigError("sample_prompts", what=what, hint=f"({error})") from error
    if not same_tokenizer(meta.tokenizer, tokenizer.identity):
        what = f"{meta.tokenizer_spec} has changed since the data was converted"
        raise ConfigError("sample_prompts", what=what, hint="Restore the original file, or omit the flag.")
    return tokenizer
