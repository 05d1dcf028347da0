"""Texts that the model writes before and after training, from the prompts of `--sample_prompts`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.console import say
from rwkv_peft.data.binidx.reader import BinidxMeta
from rwkv_peft.data.inspect.token_view import safe
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, DataError, UserError
from rwkv_peft.inference.generate import generate
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.module import TrainingModule

SAMPLE_TOKENS = 100
"""Length of a sample, where the model does not end it before."""


@dataclass
class Sample:
    """A prompt, and how the model went on with it."""

    prompt: str
    answers: dict[int, str] = field(default_factory=dict)
    """Text by the optimizer step after which it was written."""


def read_prompts(train: TrainConfig) -> list[str]:
    r"""The prompts of `--sample_prompts`, [] without the flag.

    One a line: plain text, in which `\n` stands for a line break and `\\` for a backslash; or, where the line begins
    with a brace, JSON with the prompt under the key "prompt". Empty lines are left out.

    Raises:
        UserError: no such file, no prompt in it, a bad line, or a strategy under which nobody has a whole model.
    """
    if not train.sample_prompts:
        return []
    if "stage_3" in train.strategy:
        what = f"{train.strategy} shares the model out, and no process can write alone"
        raise ConfigError("sample_prompts", what=what, hint="Use deepspeed_stage_2, or leave the flag away.")
    path = Path(train.sample_prompts)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("sample_prompts", what=f"{path} cannot be read: {error}") from error
    prompts = [
        _prompt(line.removesuffix("\r"), f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise ConfigError("sample_prompts", what=f"{path} holds no prompt", expected="one a line")
    return prompts


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode("utf-8")  # JSON can spell half of a character
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(where, "not a prompt", found=line[:60], expected='{"prompt": "text"}, or plain text') from error
    if not prompt:
        raise DataError(where, "an empty prompt", hint="The model needs something to go on with.")
    return prompt


class SampleTexts(pl.Callback):
    """Greedy continuations of fixed prompts, at the start and at the end of training, on the main process.

    Training is not touched by it: nothing random is drawn, and no gradient is kept.

    Args:
        prompts: texts; without any, nothing happens.
        meta: what the run's data says about its tokenizer.
        vocab_size: of the model.
    Raises:
        UserError: the data does not name its tokenizer, it cannot be loaded, or a prompt has ids beyond the vocabulary.
    """

    def __init__(self, prompts: Sequence[str], meta: BinidxMeta | None, vocab_size: int) -> None:
        self.samples = [Sample(prompt) for prompt in prompts]
        self.tokenizer = _tokenizer_of(meta) if prompts else None
        self.ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, self.ids, strict=True):
            if not ids or max(ids) >= vocab_size:
                what = f"the model cannot read {prompt[:40]!r}"
                found, expected = f"token {max(ids)}" if ids else "no token", f"ids below {vocab_size}, its vocabulary"
                raise ConfigError("sample_prompts", what=what, found=found, expected=expected)

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if trainer.is_global_zero:
            self._write(module.model, module.step)

    def on_train_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if trainer.is_global_zero and self.samples:
            self._write(module.model, module.step)
            say(self.report())

    def _write(self, model: RWKV6, step: int) -> None:
        training = model.training
        model.eval()
        for sample, ids in zip(self.samples, self.ids, strict=True):
            ids = generate(model, ids, max_tokens=SAMPLE_TOKENS, temperature=0, stop=self.tokenizer.eod)
            sample.answers[step] = self.tokenizer.decode(ids)
        model.train(training)

    def report(self) -> str:
        """All samples in lines, safe for a terminal."""
        lines = []
        for number, sample in enumerate(self.samples, 1):
            lines += [f"--- prompt {number} of {len(self.samples)}", safe(sample.prompt)]
            for step, answer in sample.answers.items():
                lines += [f"--- after step {step}" if step else "--- before training", safe(answer)]
        return "\n".join(lines)


def _tokenizer_of(meta: BinidxMeta | None) -> Tokenizer:
    """The tokenizer that made the data."""
    if meta is None:
        what = "the data does not say which tokenizer made it"
        hint = "Convert it with tools/json2binidx.py, which writes a .meta.json, or leave the flag away."
        raise ConfigError("sample_prompts", what=what, hint=hint)
    try:
        tokenizer = load_tokenizer(meta.tokenizer_spec)
    except UserError as error:
        what = f"the data's tokenizer {meta.tokenizer_spec} cannot be loaded from here"
        raise ConfigError("sample_prompts", what=what, hint=f"({error})") from error
    if not same_tokenizer(meta.tokenizer, tokenizer.identity):
        what = f"{meta.tokenizer_spec} is not the tokenizer that made the data any more"
        raise ConfigError("sample_prompts", what=what, hint="Put the file of then back, or leave the flag away.")
    return tokenizer
