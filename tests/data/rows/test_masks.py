from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.rows.masks import make_mask
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import ConfigError, DataError

known_tokenizer = cache(load_tokenizer)


@pytest.fixture(autouse=True)
def _load_once(monkeypatch):
    monkeypatch.setattr("rwkv_peft.data.rows.masks.load_tokenizer", known_tokenizer)


CHATS = [
    "User: What is 2+2?\n\nAssistant: It is 4.\n\nUser: Sure?\n\nAssistant: Yes. The user asked twice: (4).",
    "System: be kind\n\nUser: Hi!\n\nAssistant:\nHello, friend.",
    'User: say "so"\n\nAssistant:"so"\n\nUser: thanks',
    "User: 你好吗？\n\nAssistant: 我很好，谢谢！\n\nUser: 再见\n\nAssistant: 再见！",
    "Only a story. Nobody asks.",
]


def write_chats(tmp_path: Path, texts=CHATS, spec: str = "world") -> str:
    tokenizer = known_tokenizer(spec)
    with BinidxWriter(tmp_path / "chat", tokenizer) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    return str(tmp_path / "chat")


def answers_by_text(text: str) -> str:
    """Return the text after each `Assistant:` up to the next `User:`."""
    parts = [part.split("User:")[0] for part in text.split("Assistant:")[1:]]
    return "|".join(parts)


def trained_text(reader: BinidxReader, mask, document: int, decode) -> str:
    """Return the text of the trained tokens, with | for untrained tokens between them."""
    start, stop = reader.bounds[document : document + 2]
    runs, last = [[]], None
    for i in np.flatnonzero(mask.trained(start, stop)):
        if last is not None and i != last + 1:
            runs.append([])
        runs[-1].append(int(reader.tokens[start + i]))
        last = i
    return "|".join(decode(run) for run in runs)


@pytest.mark.parametrize("spec", ["world", "bytes"])
def test_qa_trains_only_the_answers(tmp_path, spec):
    """The trained text is that of the answers, except a quote that shares its token with the colon."""
    reader, decode = BinidxReader(write_chats(tmp_path, spec=spec)), known_tokenizer(spec).decode
    mask = make_mask(reader, DataConfig(loss_mask="qa"))
    expected = [answers_by_text(text) for text in CHATS]
    if spec == "world":
        expected[2] = expected[2].removeprefix('"')
    assert [trained_text(reader, mask, i, decode) for i in range(len(CHATS))] == expected
    assert (mask.name, mask.untrained_documents) == ("qa", 1)
    ends = reader.bounds[1:] - 1
    assert [bool(mask.trained(end, end + 1)[0]) for end in ends] == [True, True, False, True, False]  # eod of an answer


def test_the_qa_mask_of_a_chat_token_by_token(tmp_path):
    text = "User: Hi\n\nAssistant: Hello there.\n\nUser: Bye\n\nAssistant: Bye."
    reader, encode = BinidxReader(write_chats(tmp_path, [text])), known_tokenizer("world").encode
    asked, answered = encode("User: Hi\n\nAssistant:"), encode(" Hello there.\n\n")
    asked_again, answered_again = encode("User: Bye\n\nAssistant:"), [*encode(" Bye."), 0]
    assert reader.tokens.tolist() == [*asked, *answered, *asked_again, *answered_again]
    expected = [False] * len(asked) + [True] * len(answered) + [False] * len(asked_again) + [True] * len(answered_again)
    assert make_mask(reader, DataConfig(loss_mask="qa")).trained(0, len(expected)).tolist() == expected


@pytest.mark.parametrize("loss_mask", ["qa", "file"])
def test_any_range_of_tokens_has_its_part_of_the_mask(tmp_path, loss_mask):
    reader = BinidxReader(write_chats(tmp_path))
    if loss_mask == "file":
        reader.mask = np.random.default_rng(0).integers(0, 2, len(reader.tokens), dtype=np.uint8)
    mask = make_mask(reader, DataConfig(loss_mask=loss_mask))
    tokens = len(reader.tokens)
    whole = mask.trained(0, tokens)
    assert 0 < whole.sum() < tokens
    for start in range(0, tokens, 3):
        for stop in range(start, min(start + 40, tokens) + 1, 2):
            assert mask.trained(start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "only", "pack"])
@pytest.mark.parametrize("loss_mask", ["none", "qa", "se", "file"])
def test_every_mask_with_every_dataload(tmp_path, dataload, loss_mask):
    """Whether a token is trained does not depend on its row; a document's first token is only trained in windows."""
    reader = BinidxReader(write_chats(tmp_path))
    # In place of the tokens, their places in the stream: so a target says which one it is.
    config = DataConfig(
        dataload=dataload, loss_mask=loss_mask, mask_id={"mask0": "User:", "mask1": "Assistant:"}, ctx_len=16,
        micro_bsz=1, long="split",
    )  # fmt: skip
    tokens = len(reader.tokens)
    reader.mask = np.random.default_rng(0).integers(0, 2, tokens, dtype=np.uint8)
    expected = make_mask(reader, config).trained(0, tokens)
    samples = Samples(reader, config, 65536)
    reader.tokens = np.arange(tokens, dtype=np.uint16)
    windows = dataload in ("get", "walk")
    seen = set()
    for index in range(3 * samples.samples_per_pass):
        row = samples.sample(0, 0, index)
        for source, target, trains in zip(row["input_ids"], row["targets"], row["loss_mask"], strict=True):
            if target == source + 1 and (windows or target not in reader.bounds):
                assert trains == expected[target]
                seen.add(int(target))
            else:
                assert not trains
    everything = set(range(1, tokens)) - (set() if windows else set(reader.bounds.tolist()))
    assert seen == everything or (windows and len(seen) > 0.7 * tokens)


def test_se_finds_token_ids_and_texts(tmp_path, write_pair):
    reader = BinidxReader(write_pair([[1, 7, 8, 2, 3, 9, 4, 7, 8, 5, 0], [6, 7, 0], [7, 8, 0]]))
    mask = make_mask(reader, DataConfig(loss_mask="se", mask_id={"mask1": [7, 8], "mask0": 9}))
    assert np.flatnonzero(mask.trained(0, 17)).tolist() == [3, 4, 9, 10, 16]
    assert mask.untrained_documents == 1
    chats = BinidxReader(write_chats(tmp_path))
    by_text = DataConfig(loss_mask="se", mask_id={"mask1": "Assistant:", "mask0": "User:"})
    qa, se = (make_mask(chats, config) for config in (DataConfig(loss_mask="qa"), by_text))
    assert qa.trained(0, len(chats.tokens)).tolist() == se.trained(0, len(chats.tokens)).tolist()


@pytest.mark.parametrize("value", [1.5, [], ["a"], "", None, True, {}])
def test_an_invalid_marker_is_an_error(write_pair, value):
    reader = BinidxReader(write_pair([[1, 2, 0]]))
    with pytest.raises(ConfigError, match=r"--mask_id mask1: .*expected a text, a token id or a list of token ids"):
        make_mask(reader, DataConfig(loss_mask="se", mask_id={"mask1": value, "mask0": 1}))


def with_mask(prefix: str, mask) -> BinidxReader:
    reader = BinidxReader(prefix)
    reader.mask = None if mask is None else np.array(mask, np.uint8)
    return reader


def test_file_is_the_default_if_there_is_a_mask_file(write_pair):
    prefix = write_pair([[5, 6, 0], [7, 8, 9, 0], [3, 0]])
    mask = make_mask(with_mask(prefix, [0, 1, 0, 1, 0, 1, 1, 0, 0]), DataConfig())
    assert (mask.name, mask.untrained_documents) == ("file", 1)
    assert make_mask(with_mask(prefix, None), DataConfig()).name == "pad"
    assert make_mask(with_mask(prefix, [1] * 9), DataConfig(loss_mask="none")).trained(0, 9).all()
    with pytest.raises(DataError, match=r"pair\.mask\.bin: no such file, but --loss_mask file needs it"):
        make_mask(with_mask(prefix, None), DataConfig(loss_mask="file"))


def test_data_without_a_trained_token_is_an_error(tmp_path, write_pair):
    chats = BinidxReader(write_chats(tmp_path, CHATS[-1:]))
    with pytest.raises(DataError, match="no document has a token in the loss with --loss_mask qa"):
        make_mask(chats, DataConfig(loss_mask="qa"))
    with pytest.raises(DataError, match="no document has a token in the loss with --loss_mask file"):
        make_mask(with_mask(write_pair([[5, 6, 0]]), [0, 0, 0]), DataConfig(loss_mask="file"))


def test_qa_without_the_tokenizer_is_an_error(tmp_path):
    prefix = write_chats(tmp_path)
    reader = BinidxReader(prefix)
    reader.meta = SimpleNamespace(tokenizer_spec="gone/tokenizer.json", tokenizer=reader.meta.tokenizer)
    with pytest.raises(DataError, match=r"--loss_mask qa needs .* but there is no file gone/tokenizer\.json"):
        make_mask(reader, DataConfig(loss_mask="qa"))
    reader.meta = SimpleNamespace(tokenizer_spec="world", tokenizer={"name": "old", "sha256": "0"})
    with pytest.raises(DataError, match="needs the tokenizer, but world has changed since the conversion"):
        make_mask(reader, DataConfig(loss_mask="qa"))
    reader.meta = None
    with pytest.raises(DataError, match=r"needs the tokenizer to find the markers.*rwkv-peft convert"):
        make_mask(reader, DataConfig(loss_mask="qa"))
