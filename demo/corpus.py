"""The demo's text, all of it already on the machine: Python's own library and documentation teach the small base
model to read; math word problems with worked answers (reasoning-gym, gsm_symbolic) are what it is fine-tuned on."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SOURCE_BYTES = 4_000_000
"""Library source to read; what the base sees in its few minutes."""


def python_texts() -> Iterator[str]:
    """Python's language documentation by topic, then the sources of its library."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    left = SOURCE_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="strict")
        if text.strip() and left > 0:
            left -= len(text)
            yield text


def math_problems(count: int, seed: int) -> Iterator[str]:
    """Word problems in the RWKV World chat form, with worked answers."""
    import reasoning_gym

    for item in reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed):
        question, answer = item["question"].strip(), item["metadata"]["answer_cot"].strip()
        # gsm_symbolic closes each question with the answer format it wants; the worked answer shows that by itself.
        question = question.split(" Give the result as")[0]
        yield f"User: {question}\n\nAssistant: {answer}"


def write_jsonl(texts: Iterable[str], path: Path) -> None:
    """One `{"text": ...}` a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """A byte-level BPE of 2,048 tokens: the small model's head stays small."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
