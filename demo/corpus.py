"""The texts of the demo. Nothing is downloaded: the small base model reads Python's own library and documentation,
and is fine-tuned on math word problems with worked answers (`gsm_symbolic` of the package reasoning-gym)."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SOURCE_BYTES = 4_000_000
"""Bytes of library source; the base model reads about as much in its few minutes of training."""


def python_texts() -> Iterator[str]:
    """Yield Python's language documentation by topic, then the sources of its library."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    left = SOURCE_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="strict")
        if text.strip() and left > 0:
            left -= len(text)
            yield text


def math_problems(count: int, seed: int) -> Iterator[str]:
    """Yield word problems with worked answers, in the chat format of the RWKV World models."""
    import reasoning_gym

    for item in reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed):
        question, answer = item["question"].strip(), item["metadata"]["answer_cot"].strip()
        # gsm_symbolic ends each question with the required answer format. The worked answer shows the format already.
        question = question.split(" Give the result as")[0]
        yield f"User: {question}\n\nAssistant: {answer}"


def write_jsonl(texts: Iterable[str], path: Path) -> None:
    """Write one `{"text": ...}` object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Train a byte-level BPE tokenizer with 2,048 tokens, so that the small model has a small output layer."""
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
