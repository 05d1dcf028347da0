from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.data.tokenizer import BytesTokenizer, WorldTokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, DataError

WORLD = WorldTokenizer()
BYTES = BytesTokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=["world", "bytes"])

TEXTS = [
    "The quick brown fox.\n\n",
    "你好，世界！数据很重要。",
    "😀👩‍👩‍👧 ok",
    "\x00\x01\t\r\n",
    "e\u0301 é ß ﷺ",
    " " * 300,
]


@pytest.fixture(scope="module", autouse=True)
def _vocabulary_is_read():
    """Load it before the tests, because hypothesis would report the first example as slow."""
    WORLD.decode([])


def train_json_tokenizer(path: Path, special: list[str], *, truncate: bool = False) -> str:
    """Train a byte-level BPE with a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if truncate:
        tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return str(path)


def test_world_ids_1_to_256_are_the_single_bytes():
    text = "".join(chr(c) for c in range(0x700)) + "你😀"
    assert WORLD.decode([byte + 1 for byte in text.encode()]) == text
    assert WORLD.encode("a") == [98]


def test_world_agrees_with_the_rwkv_package():
    rwkv_tokenizer = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the rwkv package is a development dependency")
    vocabulary = Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    trie = rwkv_tokenizer.TRIE_TOKENIZER(str(vocabulary))
    assert [WORLD.encode(text) for text in TEXTS] == [trie.encode(text) for text in TEXTS]


@BOTH
@given(text=st.text())
def test_any_unicode_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


@BOTH
@given(data=st.lists(st.binary(max_size=6) | st.text().map(str.encode)).map(b"".join))
def test_any_bytes_round_trip(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert all(0 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode_bytes([*ids, tokenizer.eod]) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@BOTH
@given(text=st.text())
def test_bytes_of_a_text_have_the_ids_of_the_text(tokenizer, text):
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


@BOTH
@given(text=st.text(), data=st.data())
def test_a_text_cut_anywhere_shows_its_complete_characters(tokenizer, text, data):
    """Windows of `--dataload get` may begin and end inside a character."""
    content = text.encode()
    start = data.draw(st.integers(0, len(content)))
    cut = content[start : data.draw(st.integers(start, len(content)))]
    shown = tokenizer.decode(tokenizer.encode_bytes(cut))
    assert shown.replace("\ufffd", "") == cut.decode(errors="ignore").replace("\ufffd", "")


def test_invalid_bytes_have_one_id_each_and_do_not_change_their_neighbors():
    hello, world = WORLD.encode("hello"), WORLD.encode(" 你好")
    assert WORLD.encode_bytes(b"\xffhello\xe4\xbd" + " 你好".encode() + b"\x80") == [256, *hello, 229, 190, *world, 129]


@BOTH
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 70000)))
def test_decode_takes_any_ids(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


@BOTH
def test_incomplete_utf8_and_unknown_ids_become_replacement_characters(tokenizer):
    pieces = [byte + 1 for byte in "a😀".encode()]
    assert [tokenizer.decode(pieces[:n]) for n in range(1, 6)] == ["a", "a\ufffd", "a\ufffd", "a\ufffd", "a😀"]
    assert tokenizer.decode([98, 65530, 98, -1, 0]) == "a\ufffda\ufffd"


def test_identities_distinguish_tokenizers():
    assert WORLD.identity["sha256"] == "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
    assert same_tokenizer(WORLD.identity, load_tokenizer("world").identity)
    assert not same_tokenizer(WORLD.identity, load_tokenizer("bytes").identity)


@pytest.mark.parametrize("text", TEXTS)
def test_json_tokenizer_round_trips(tmp_path, text):
    spec = train_json_tokenizer(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert max(ids) < tokenizer.vocab_size == 300
    assert (tokenizer.spec, tokenizer.eod) == (spec, 1)
    assert tokenizer.decode([*ids, 300, -1, 2**40, *ids]) == text + "\ufffd\ufffd\ufffd" + text


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return load_tokenizer(train_json_tokenizer(path, ["<pad>", "<|endoftext|>"]))


@given(text=st.text())
def test_json_tokenizer_round_trips_any_unicode(json_tokenizer, text):
    ids = json_tokenizer.encode(text)
    assert all(0 <= i < json_tokenizer.vocab_size for i in ids)
    assert json_tokenizer.decode([*ids, json_tokenizer.eod]) == text


@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 299)))
def test_json_tokenizer_decodes_any_ids(json_tokenizer, ids):
    assert isinstance(json_tokenizer.decode(ids), str)


def test_json_tokenizer_never_truncates_and_is_the_same_without_truncation(tmp_path):
    plain = load_tokenizer(train_json_tokenizer(tmp_path / "plain.json", ["</s>"]))
    truncating = load_tokenizer(train_json_tokenizer(tmp_path / "truncating.json", ["</s>"], truncate=True))
    other = load_tokenizer(train_json_tokenizer(tmp_path / "other.json", ["<eos>"]))
    assert len(truncating.encode("word " * 50)) == len(plain.encode("word " * 50)) > 5
    assert same_tokenizer(plain.identity, truncating.identity)
    assert not same_tokenizer(plain.identity, other.identity)


def test_vocab_size_of_a_json_vocabulary_with_missing_ids(tmp_path):
    content = json.loads(Path(train_json_tokenizer(tmp_path / "tokenizer.json", ["</s>"])).read_text())
    content["model"]["vocab"]["zz"] = 5000
    (tmp_path / "holes.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path / "holes.json")).vocab_size == 5001


def test_json_tokenizer_without_eod_is_an_error(tmp_path):
    spec = train_json_tokenizer(tmp_path / "tokenizer.json", ["<pad>"])
    with pytest.raises(DataError, match=r"json: no end-of-document token in the vocabulary.*<\|endoftext\|>"):
        load_tokenizer(spec)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "plain text"])
def test_broken_tokenizer_file_is_an_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(path))


def test_unknown_tokenizer_is_an_error():
    with pytest.raises(ConfigError, match=r"--tokenizer: .*'wrld'.*world, bytes or the path"):
        load_tokenizer("wrld")
