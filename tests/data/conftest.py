"""Small pairs to test on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rwkv_peft.data.binidx.writer import BinidxWriter
from tests.data.pairs import IdsOnly

WritePair = Callable[..., str]


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """Return a function: write_pair(documents, vocab_size=65536, name="pair") -> prefix."""

    def write(documents: Sequence[Sequence[int]], vocab_size: int = 65536, name: str = "pair") -> str:
        prefix = str(tmp_path / name)
        with BinidxWriter(prefix, IdsOnly(vocab_size)) as writer:
            for ids in documents:
                writer.add_document(ids)
        return prefix

    return write
