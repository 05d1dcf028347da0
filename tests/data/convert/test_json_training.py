"""--data_type jsonl and sft: a run on JSON equals a run on the converted pair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.cpp_extension import get_default_build_root

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.convert import command_line as convert_cli
from rwkv_peft.data.convert import file_hashes, token_cache
from rwkv_peft.data.convert.file_hashes import FileHashes
from rwkv_peft.data.convert.json_pairs import pairs_of
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.errors import ConfigError, DataError, UserError
from rwkv_peft.files import file_lock
from rwkv_peft.run_config import config_from_settings, settings_from_argv
from tests.helpers import write_base
from tests.training.small_runs import SHAPE, train

ROOT = Path(__file__).resolve().parents[3]
SUMS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(6) for b in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Use an empty token cache, but the usual cache of compiled operators."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "rwkv_peft" / "data"


def write_sums(path: Path, asked: str = "query", answered: str = "response") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({asked: q, answered: a}) for q, a in SUMS), encoding="utf-8")
    return str(path)


def pair(*sources: str, **settings) -> str:
    """Return the prefix of the pair for these settings."""
    settings = {"data_type": "jsonl", "tokenizer": "bytes"} | settings
    ((prefix, _),) = pairs_of(DataConfig(data_file=sources, **settings))
    return prefix


def files_of(prefix: str) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each file of a pair, which a second conversion would change."""
    found = {path.name: path.stat() for path in Path(prefix).parent.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def rows(config: DataConfig, count: int) -> list[dict[str, np.ndarray]]:
    source = open_data(config).samples
    return [source.sample(1, 0, index) for index in range(count)]


# ------------------------------------------------------------------------------------ what is trained on


@pytest.mark.parametrize("dataload", ["get", "pad", "pack"])
def test_rows_equal_those_of_a_converted_pair(tmp_path, dataload):
    source = write_sums(tmp_path / "sums.jsonl")
    convert_cli.main(["--input", source, "--output_prefix", str(tmp_path / "pair"), "--tokenizer", "bytes"])
    common = {"dataload": dataload, "ctx_len": 80, "micro_bsz": 1}
    straight = rows(DataConfig(data_file=source, data_type="jsonl", tokenizer="bytes", **common), 9)
    by_hand = rows(DataConfig(data_file=str(tmp_path / "pair"), **common), 9)
    for ours, wanted in zip(straight, by_hand, strict=True):
        assert ours.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(ours[name], wanted[name])
    masks = np.concatenate([np.asarray(row["loss_mask"]) for row in straight])
    assert 0 < masks.sum() < masks.size


def test_losses_equal_those_with_a_converted_pair(tmp_path):
    source = write_sums(tmp_path / "sums.jsonl")
    write_base(tmp_path / "base.pth", SHAPE)
    convert_cli.main(["--input", source, "--output_prefix", str(tmp_path / "pair"), "--tokenizer", "bytes"])
    base = ["--load_model", str(tmp_path / "base.pth"), "--peft", "bone", "--bone_config", '{"r":32}']
    by_hand = train(tmp_path / "a", [*base, "--data_file", str(tmp_path / "pair")])
    flags = "--data_type sft --sft_field query response --sft_split train --tokenizer bytes".split()
    straight = train(tmp_path / "b", [*base, "--data_file", source, *flags])
    assert [row["loss"] for row in straight] == [row["loss"] for row in by_hand]
    again = train(tmp_path / "c", ["--config", str(tmp_path / "b" / "config.yaml")])
    assert [row["loss"] for row in again] == [row["loss"] for row in by_hand]


def test_only_answers_train(tmp_path):
    """With RWKV-PEFT's flag names, and keys that the converter does not recognize without them."""
    source = write_sums(tmp_path / "sums.jsonl", "asked", "reply")
    words = ["--data_file", source, "--data_type", "sft", "--sft_field", "asked", "reply", "--dataload", "pad"]
    config = config_from_settings(settings_from_argv([*words, "--ctx_len", "64"])).data
    tokenizer = load_tokenizer("world")
    trained = {tokenizer.decode(row["targets"][np.asarray(row["loss_mask"]) == 1]) for row in rows(config, len(SUMS))}
    assert trained == {f" {answer}\n\n" for _, answer in SUMS}


def test_a_text_a_folder_a_glob_and_shares(tmp_path):
    folder = tmp_path / "folder"
    write_sums(folder / "a.jsonl")
    (folder / "b.txt").write_text("A text.\n")
    assert pair(str(folder)) == pair(str(folder / "*"))
    mixed = DataConfig(
        data_file=(f"{folder}/a.jsonl:0.75", f"{folder}/b.txt:0.25"), data_type="jsonl", tokenizer="bytes", ctx_len=32
    )
    parts = open_data(mixed).parts
    assert [(part.share, len(part.samples.reader)) for part in parts] == [(0.75, len(SUMS)), (0.25, 1)]


# ------------------------------------------------------------------------------------ the cache


def test_the_pair_is_made_and_reported_once(tmp_path, capsys):
    source = write_sums(tmp_path / "sums.jsonl")
    prefix = pair(source)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {source}: {len(SUMS)} documents, ")
    assert "% in answers, which are in the loss)" in said
    assert f"cached in {Path(prefix).parent}\n" in said
    before = files_of(prefix)
    assert set(before) == {"data.bin", "data.idx", "data.meta.json", "data.mask.bin"}
    shutil.copy(source, tmp_path / "same bytes, another name.jsonl")
    assert pair(source, data_type="sft") == pair(str(tmp_path / "same bytes, another name.jsonl")) == prefix
    assert files_of(prefix) == before
    assert capsys.readouterr().err == ""


def test_the_key_depends_on_content_and_settings(tmp_path, monkeypatch):
    source = write_sums(tmp_path / "sums.jsonl")
    (tmp_path / "form").write_text("{{ record.query }}{{ answer_begin }}{{ record.response }}{{ answer_end }}")
    kinds = [{}, {"tokenizer": "world"}, {"text_key": "query"}, {"fields": ("response", "query")}]
    kinds.append({"template": str(tmp_path / "form")})
    prefixes = [pair(source, **kind) for kind in kinds]
    (tmp_path / "form").write_text("{{ record.query }} {{ answer_begin }}{{ record.response }}{{ answer_end }}")
    prefixes.append(pair(source, **kinds[-1]))
    Path(source).write_bytes(Path(source).read_bytes().replace(b"It is 3.", b"It is 4.", 1))
    prefixes.append(pair(source))
    text = tmp_path / "sums.txt"
    shutil.copy(source, text)
    prefixes.append(pair(str(text)))
    monkeypatch.setattr(token_cache, "META_VERSION", 99)
    prefixes.append(pair(source))
    assert len(set(prefixes)) == len(prefixes) == 9


@pytest.mark.parametrize("damage", ["idx", "bin", "mask.bin", "meta.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_pair_is_made_again(tmp_path, damage, how):
    source = write_sums(tmp_path / "sums.jsonl")
    prefix = pair(source)
    path = Path(f"{prefix}.{damage}")
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-9])
    assert pair(source) == prefix
    assert path.read_bytes() == whole


def test_an_invalid_record_is_reported_and_leaves_nothing(tmp_path, cache):
    source = write_sums(tmp_path / "sums.jsonl")
    with open(source, "a") as file:
        file.write('\n{"query": "?"}\n')
    with pytest.raises(DataError, match=rf"sums\.jsonl:{len(SUMS) + 1}: no text"):
        pair(source)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_leftovers_of_killed_conversions_are_deleted_from_the_cache(tmp_path, cache):
    keys = ["0" * 32, "1" * 32]
    leftover, running = (cache / f".{key}.other-123.tmp" for key in keys)
    for part in (leftover, running):
        part.mkdir(parents=True)
        (part / ".data.bin.other-123.tmp").write_bytes(b"half")
    with file_lock(cache / f"{keys[0]}.lock", wait=False):
        pass
    with file_lock(cache / f"{keys[1]}.lock", wait=False):
        prefix = pair(write_sums(tmp_path / "sums.jsonl"))
    assert (leftover.exists(), running.exists(), Path(prefix + ".idx").exists()) == (False, True, True)


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, cache, monkeypatch):
    source = write_sums(tmp_path / "sums.jsonl")
    convert = token_cache.convert

    def convert_and_touch(*arguments):
        summary = convert(*arguments)
        Path(source).write_text('{"text": "another"}')
        return summary

    monkeypatch.setattr(token_cache, "convert", convert_and_touch)
    with pytest.raises(DataError, match="changed while it was read"):
        pair(source)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


RACER = """
import sys, time
sys.path.insert(0, {package!r})
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.convert import token_cache
from rwkv_peft.data.convert.json_pairs import pairs_of
convert = token_cache.convert
def slowly(*arguments):
    print("converting", flush=True)
    time.sleep({seconds})
    return convert(*arguments)
token_cache.convert = slowly
print(pairs_of(DataConfig(data_file={source!r}, data_type="jsonl", tokenizer="bytes"))[0][0])
"""


def start_racer(source: str, seconds: float) -> subprocess.Popen[str]:
    code = RACER.format(package=str(ROOT / "RWKV-PEFT"), source=source, seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_only_one_of_two_processes_converts(tmp_path):
    source = write_sums(tmp_path / "sums.jsonl")
    first = start_racer(source, 2.0)
    assert first.stdout.readline() == "converting\n"
    second = start_racer(source, 0.0)
    said, complaints = second.communicate(timeout=60)
    prefix = first.communicate(timeout=60)[0].strip()
    assert (first.returncode, second.returncode) == (0, 0)
    assert said.strip() == prefix
    assert complaints == f"note: waiting for another process that tokenizes {source}\n"
    assert pair(source) == prefix


def test_a_killed_conversion_does_not_keep_others_waiting(tmp_path, cache):
    source = write_sums(tmp_path / "sums.jsonl")
    racer = start_racer(source, 60.0)
    assert racer.stdout.readline() == "converting\n"
    racer.kill()
    racer.communicate(timeout=60)
    prefix = pair(source)
    assert {path.name for path in cache.iterdir()} == {Path(prefix).parent.name, Path(prefix).parent.name + ".lock"}


def test_a_cache_that_cannot_be_written_is_an_error_with_a_hint(tmp_path, monkeypatch):
    source = write_sums(tmp_path / "sums.jsonl")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"file/rwkv_peft/data: .*cannot be cached here; found Not a directory.*XDG_CACHE_"
    ):
        pair(source)


def test_a_full_disk_is_an_error_with_a_hint(tmp_path, cache, monkeypatch):
    source = write_sums(tmp_path / "sums.jsonl")

    def full(*arguments):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise DataError("data", "the disk is full", hint="--output_prefix") from error

    monkeypatch.setattr(token_cache, "convert", full)
    with pytest.raises(DataError, match=r"found No space left on device\. Set XDG_CACHE_HOME"):
        pair(source)


def test_a_complete_pair_in_a_read_only_cache_is_used(tmp_path, monkeypatch):
    source = write_sums(tmp_path / "sums.jsonl")
    prefix = pair(source)
    monkeypatch.setattr(token_cache, "_locked", None)  # whatever writes comes after this
    assert pair(source) == prefix


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "STORE_FROM", 4)
    big, hashes = tmp_path / "big", FileHashes(tmp_path / "hashes.json")
    big.write_bytes(b"12345")
    fresh = hashes.of(str(big))
    assert not (tmp_path / "hashes.json").exists()  # it may change within the resolution of its times
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)
    assert hashes.of(str(big)) == fresh
    reads = []
    monkeypatch.setattr(file_hashes.hashlib, "file_digest", lambda *_: reads.append(1))
    assert (FileHashes(tmp_path / "hashes.json").of(str(big)), reads) == (fresh, [])
    monkeypatch.undo()
    stat = big.stat()
    big.write_bytes(b"12346")
    os.utime(big, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time of writing
    assert hashes.of(str(big)) != fresh
    (tmp_path / "hashes.json").write_bytes(b"[3")
    assert hashes.of(str(big)) != fresh


# ------------------------------------------------------------------------------------ flags and mistakes


def test_without_data_type_the_file_name_decides(tmp_path, capsys):
    source = write_sums(tmp_path / "sums.jsonl")

    def data_type(*words: str) -> str:
        return config_from_settings(settings_from_argv(words)).data.data_type

    assert data_type("--data_file", source) == "jsonl"
    assert "is read as --data_type jsonl" in capsys.readouterr().err
    assert data_type("--data_file", f"{source}:0.5", f"{source}:0.5") == "jsonl"
    capsys.readouterr()
    assert data_type("--data_file", str(tmp_path / "sums")) == "binidx"
    assert data_type("--data_file", source, "--data_type", "binidx") == "binidx"
    assert data_type("--data_file", source, "--data_type", "sft") == "sft"
    shutil.copy(pair(source) + ".idx", source + ".idx")  # a pair of that name
    assert data_type("--data_file", source) == "binidx"
    assert "read as" not in capsys.readouterr().err


def test_flags_for_json_are_noted_as_ignored_for_a_pair(capsys):
    settings_from_argv(["--data_file", "pair", "--tokenizer", "bytes"])
    assert capsys.readouterr().err == "note: --tokenizer has no effect with --data_type binidx\n"


def test_errors_have_a_hint(tmp_path):
    source = write_sums(tmp_path / "sums.jsonl")
    prefix = pair(source)
    for settings, message in (
        ({"data_file": source, "data_type": "binidx"}, r"is a file, not the prefix .*--data_type jsonl"),
        ({"data_file": str(tmp_path), "data_type": "binidx"}, r"is a folder, not the prefix .*--data_type jsonl"),
        ({"data_file": prefix, "data_type": "sft"}, r"is a binidx pair, but --data_type sft reads JSON and text"),
        ({"data_file": prefix + ".bin", "data_type": "jsonl"}, r"is a binidx pair"),
        ({"data_file": "-", "data_type": "jsonl"}, r"-: cannot be read twice"),
        ({"data_file": str(tmp_path / "none.jsonl"), "data_type": "jsonl"}, r"none\.jsonl: no such file"),
        ({"data_file": source, "data_type": "jsonl", "tokenizer": "wrld"}, r"--tokenizer: invalid value; found 'wrld'"),
        ({"data_file": source, "data_type": "jsonl", "template": "no"}, r"--template: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            pairs_of(DataConfig(**settings))
    with pytest.raises(ConfigError, match="--text_key: cannot be combined with --fields"):
        pair(source, text_key="query", fields=("query", "response"))
    with pytest.raises(ConfigError, match=r"--fields: invalid value; found query, expected two keys"):
        DataConfig(fields=("query",))
    with pytest.raises(ConfigError, match=r"--sft_split: invalid value; found test, expected train"):
        settings_from_argv(["--sft_split", "test"])


@pytest.mark.slow
def test_end_to_end_as_a_user_starts_it(tmp_path):
    """Run train.py on JSON; then tools/inspect_data.py shows the same data from the cache."""
    write_sums(tmp_path / "sums.jsonl")
    shape = "--n_layer 1 --n_embd 32 --head_size 16 --dim_ffn 64 --ctx_len 64 --micro_bsz 4 --wkv torch".split()
    words = [*shape, "--data_file", "sums.jsonl", "--tokenizer", "bytes", "--dataload", "pad", "--epoch_steps", "2"]
    words += ["--accelerator", "cpu"]

    def start(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    done = start("train.py", *words)
    assert "note: --data_file sums.jsonl is read as --data_type jsonl\n" in done.stderr
    assert done.stderr.count("cached in") == 1
    assert f"data    sums.jsonl: {len(SUMS)} documents" in done.stdout
    assert (tmp_path / "out" / "rwkv-0.pth").exists()
    shown = start("tools/inspect_data.py", "sums.jsonl", "--tokenizer", "bytes", "--documents", "0")
    assert (shown.stderr, shown.stdout.count("⟦ It is 0.")) == ("", 1)
