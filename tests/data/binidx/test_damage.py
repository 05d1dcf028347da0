"""Damaged files: training reads valid tokens, or the error names the damaged file."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.inspect.summary import Vocabulary, check, show_document, summary
from rwkv_peft.data.inspect.token_view import TokenView
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.errors import DataError
from tests.data.pairs import write_mask

VOCAB_SIZE = 300
SUFFIXES = (".bin", ".idx", ".meta.json", ".mask.bin")
KINDS = ("flip", "overwrite", "cut", "cut out", "insert", "grow", "swap", "exchange")


@pytest.fixture(params=["uint16", "int32"])
def pairs(write_pair, request) -> list[str]:
    """Write two pairs with masks, with equal numbers of documents and different numbers of tokens."""
    rng = random.Random(0)
    made = []
    for name in ("one", "two"):
        documents = [[rng.randrange(1, 300) for _ in range(rng.randrange(1, 9))] + [0] for _ in range(20)]
        prefix = write_pair(documents, VOCAB_SIZE if request.param == "uint16" else 10**6, name=name)
        made.append(write_mask(prefix, bytes(rng.randrange(2) for ids in documents for _ in ids)))
    return made


def test_random_damage_is_harmless_or_an_error_that_names_the_file(pairs):
    """2,500 kinds of damage for each id width, in any of the four files. All rows are then read and shown."""
    rng = random.Random(1)
    whole = {prefix + suffix: Path(prefix + suffix).read_bytes() for prefix in pairs for suffix in SUFFIXES}
    prefix = pairs[0]
    config = DataConfig(data_file=prefix, ctx_len=8, dataload="pad")
    assert error_of_training(config) is None
    found, harmless = Counter(), Counter()
    for _ in range(2500):
        suffix, kind = rng.choice(SUFFIXES), rng.choice(KINDS)
        changed = damages(whole, pairs, suffix, kind, rng)
        put(changed)
        error = error_of_training(config)
        if error is None:
            harmless[suffix] += 1
        else:
            assert error.startswith(tuple(f"{prefix}{suffix}: " for suffix in SUFFIXES)), (kind, suffix, error)
            assert kind == "exchange" or suffix in error, (kind, suffix, error)
            assert "\n" not in error
            found[suffix, kind] += 1
        put({path: whole[path] for path in changed})
    assert error_of_training(config) is None
    for suffix in SUFFIXES:
        assert sum(found[suffix, kind] for kind in KINDS) > 100, found  # the damage was real
    for kind in KINDS:
        assert sum(found[suffix, kind] for suffix in SUFFIXES) > 50, found
    assert harmless[".bin"] > 5, harmless  # other valid tokens


def put(contents: dict[str, bytes]) -> None:
    for path, content in contents.items():
        Path(path).unlink()  # some file systems wait for the disk when a file is cut and written again
        Path(path).write_bytes(content)


def error_of_training(config: DataConfig) -> str | None:
    """Return the error message; exceptions other than DataError are raised."""
    try:
        reader = BinidxReader(config.data_file[0])
        samples = Samples(reader, config, vocab_size=VOCAB_SIZE)
        rows = [samples.sample(0, 0, i) for i in range(25)]
        trained = reader.trained(0, len(reader.tokens))
        shown = [summary(reader, Vocabulary(None, None, None, None)), check(reader, VOCAB_SIZE, 0)]
        shown += [show_document(reader, i, TokenView(None)) for i in range(min(len(reader), 3))]
    except DataError as error:
        return str(error)
    assert all(row["input_ids"].min() >= 0 and row["input_ids"].max() < VOCAB_SIZE for row in rows)
    assert len(trained) == len(reader.tokens) == reader.sizes.sum()
    assert "\n".join(shown).encode()  # can be printed
    return None


def damages(whole: dict[str, bytes], pairs: list[str], suffix: str, kind: str, rng: random.Random) -> dict[str, bytes]:
    """Return new contents of the first pair's files, by path; each differs from the old one."""
    path = pairs[0] + suffix
    if kind == "swap":  # the same file of another pair
        return {path: whole[pairs[1] + suffix]}
    if kind == "exchange":  # two files of a pair under each other's name
        other = pairs[0] + rng.choice([name for name in SUFFIXES if name != suffix])
        return {path: whole[other], other: whole[path]}
    return {path: damaged(whole[path], kind, rng)}


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    count = rng.randrange(1, 20)
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "overwrite":
        return content[:place] + bytes([(content[place] + count) % 256]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "cut out":
        return content[:place] + content[place + count :]
    if kind == "insert":
        return content[:place] + rng.randbytes(count) + content[place:]
    return content + rng.randbytes(count)
