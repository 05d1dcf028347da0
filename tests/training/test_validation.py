"""Validation loss during training: exact, the same for any number of processes, without effect on training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.adapted_model import load_plain, load_with_adapter
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.validation_set import ValidationSet
from rwkv_peft.errors import CheckpointError, UserError
from rwkv_peft.evaluation.loss import summed, validation_loss
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.run_folder import save_trained
from rwkv_peft.training.sliced_loss import sliced_loss
from tests.helpers import lively_model
from tests.training.distributed.pairs import PairRun, in_a_pair
from tests.training.small_runs import SHAPE, metrics, train, train_flags, validations, write_inputs

BONE = ["--peft", "bone", "--bone_config", '{"r":16}']
QUESTIONS = [f"User: {a} minus {b}?\n\nAssistant: {a - b}." for a in range(3) for b in range(1 + a)]


def write_pair(prefix: Path, texts: list[str] = QUESTIONS) -> str:
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(prefix, tokenizer) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    return str(prefix)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path)


@pytest.fixture
def val(tmp_path: Path) -> str:
    """Return the prefix of a pair of six documents, which 4 does not divide."""
    return write_pair(tmp_path / "questions")


# -------------------------------------------------------------------------------------- the loss


def reference(model, prefix: str, config: DataConfig) -> tuple[float, int]:
    """Return the summed loss in float64 over documents or windows, one at a time, and the number of tokens."""
    reader = BinidxReader(prefix)
    size = config.ctx_len
    if config.dataload in ("get", "walk"):
        stream = reader.tokens
        rows = [stream[first : first + size + 1] for first in range(0, len(stream) - 1, size)]
    else:
        rows = [reader.document(i)[: size + 1] for i in range(len(reader))]
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row.astype("int64"))
        logits = model(ids[None, :-1])[0][0].double()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + float(losses.sum()), count + len(losses)
    return total, count


@pytest.mark.parametrize(
    ("dataload", "ctx_len"), [("get", 64), ("walk", 24), ("pad", 24), ("only", 64), ("pack", 24), ("pack", 64)]
)
@torch.no_grad()
def test_every_token_counts_once_on_any_number_of_processes(dataload, ctx_len, val):
    model = lively_model(SHAPE).eval()
    config = DataConfig(
        data_file=val, dataload=dataload, ctx_len=ctx_len, micro_bsz=1 if dataload == "only" else 3, loss_mask="none"
    )
    data = ValidationSet([BinidxReader(val)], config, SHAPE.vocab_size)
    expected, tokens = reference(model, val, config)
    for world_size in (1, 2, 3, 5):
        shares = [list(data.batches(rank, world_size)) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "ZeRO-3 needs equally many forward passes on every process"
        rows = {len(batch["input_ids"]) for share in shares for batch in share}
        assert rows == {config.micro_bsz}, "and equally many rows in each"
        batches = [batch for share in shares for batch in share]
        total, count = sum(summed(sliced_loss(model, batch, 0), batch["loss_mask"]) for batch in batches).tolist()
        assert count == tokens
        assert total == pytest.approx(expected, rel=2e-6)


def test_validation_loss_equals_that_of_the_saved_adapter(inputs, val, tmp_path):
    """The run measures inside Lightning, this test without it. Perplexity and token count come from the text."""
    train(tmp_path / "run", inputs, *BONE, "--val_data_file", val, "--val_every", "4", "--loss_mask", "none")
    rows = validations(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 4, 6]
    model = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors").model
    assert rows[-1]["val_loss"] == pytest.approx(validation_loss(model, val, ctx_len=48), rel=1e-6)
    assert rows[0]["val_loss"] == pytest.approx(validation_loss(load_plain(inputs[1]), val, ctx_len=48), rel=1e-6)
    assert rows[0]["val_ppl"] == math.exp(rows[0]["val_loss"])
    assert rows[0]["val_tokens"] == sum(len(text) for text in QUESTIONS)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[0].keys() == {"step", "val_loss", "val_ppl", "val_tokens", "time"}


def test_validation_uses_the_loss_mask(inputs, val, tmp_path, capsys):
    train(tmp_path / "run", inputs, *BONE, "--val_data_file", val, "--loss_mask", "qa")
    answers = sum(len(text.split("Assistant:")[1]) + 1 for text in QUESTIONS)  # and the end-of-document token
    assert [row["val_tokens"] for row in validations(tmp_path / "run")] == [answers, answers]
    assert "loss on the tokens of --loss_mask qa" in capsys.readouterr().out


def test_several_pairs_are_one_validation_set(inputs, val, tmp_path):
    other = write_pair(tmp_path / "other", ["Much longer than the others are, for a change."])
    flags = ["--epoch_steps", "1", "--val_data_file"]
    both, *alone = (
        (train(tmp_path / name, inputs, *BONE, *flags, *pairs), validations(tmp_path / name)[0])[1]
        for name, pairs in (("both", [val, other]), ("a", [val]), ("b", [other]))
    )
    assert both["val_tokens"] == sum(row["val_tokens"] for row in alone)
    total = sum(row["val_loss"] * row["val_tokens"] for row in alone)
    assert both["val_loss"] == pytest.approx(total / both["val_tokens"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(inputs, val, tmp_path):
    """At the start and of the trained weights, with a sharded base and with recomputed blocks."""
    common = f"--dataload pad --ctx_len 48 --epoch_steps 5 --lr_init 1e-2 --val_data_file {val} --val_every 2".split()
    odd = write_pair(tmp_path / "odd", ["\u00df\u00e4" * 30])
    stops = ["--val_every", "1", "--patience", "2", "--epoch_steps", "40", "--val_data_file", odd, "--lr_init", "0.1"]
    cases = {
        "even": ["--micro_bsz", "4"],
        "idle": ["--micro_bsz", "6"],  # no rows are left for the second process
        "stops": stops,
    }
    strategies = ("ddp", "deepspeed_stage_3")
    flags = [*inputs, *common, *BONE, "--grad_cp", "1"]
    runs = [
        PairRun([*flags, "--strategy", strategy, *more, "--proj_dir", f"{tmp_path}/{strategy}/{name}"])
        for strategy in strategies
        for name, more in cases.items()
    ]
    in_a_pair(runs, tmp_path / "runs.json")
    before = validation_loss(load_plain(inputs[1]), val, ctx_len=48)
    for strategy in strategies:
        for name in ("even", "idle"):
            check_against_saved_weights(tmp_path / strategy / name, inputs[1], val, before)
        stopped = validations(tmp_path / strategy / "stops")
        assert stopped[-1]["step"] < 40, "no process waits for another"
        assert (tmp_path / strategy / "stops" / "rwkv-0.safetensors").exists()


def check_against_saved_weights(folder: Path, base: str, val: str, before: float) -> None:
    """Compare a run's validations with the loss of the weights that it saved."""
    rows = validations(folder)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert len({row["val_tokens"] for row in rows}) == 1
    losses = [row["val_loss"] for row in rows]
    for name, expected in (("0", losses[-1]), ("best", min(losses))):
        model = load_with_adapter(base, folder / f"rwkv-{name}.safetensors").model
        assert validation_loss(model, val, ctx_len=48) == pytest.approx(expected, rel=1e-6)
    assert losses[0] == pytest.approx(before, rel=1e-6)
    assert losses[-1] < losses[0]


# --------------------------------------------------------------------------- effect on training


DROPOUT = '{"lora_r":8,"lora_alpha":16,"lora_dropout":0.2}'


@pytest.mark.parametrize(
    "method",
    [
        ["--peft", "lora", "--lora_config", DROPOUT],
        ["--peft", "prompt", "--prompt_config", '{"tokens":3}', "--dataload", "get"],
        ["--peft", "lisa", "--lisa_config", '{"layers":1,"interval":2}'],
        [*BONE, "--quant", "nf4", "--grad_cp", "1"],
        "--peft lora --peft_targets att head --dataload pack --accumulate_grad_batches 2".split(),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_validation_does_not_change_training_in_any_bit(method, inputs, val, tmp_path):
    """For example, dropout draws random numbers in training, but must not during validation."""
    plain = train(tmp_path / "a", inputs, *method)
    measured = train(tmp_path / "b", inputs, *method, "--val_data_file", val, "--val_every", "1")
    steps = [row["step"] for row in measured]
    assert [row["step"] for row in validations(tmp_path / "b")] == [0, *steps]
    for a, b in zip(plain, measured, strict=True):
        assert {**a, "time": 0, "tokens_per_s": 0} == {**b, "time": 0, "tokens_per_s": 0}


def test_validation_does_not_count_as_training_time(inputs, val, tmp_path, monkeypatch):
    """With a clock that only advances during validation, and a little when it is read."""
    from rwkv_peft.training import validation
    from rwkv_peft.training.metrics import recorder

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 0.001
            return self.now

    clock = Clock()

    def measure(*args) -> tuple[float, int]:
        clock.now += 1000
        return 1.0, 1

    monkeypatch.setattr(recorder, "time", clock)
    monkeypatch.setattr(validation, "time", clock)
    monkeypatch.setattr(validation, "validation_loss", measure)
    rows = train(tmp_path / "run", inputs, *BONE, "--val_data_file", val, "--val_every", "1")
    assert all(row["time"] < 1 for row in metrics(tmp_path / "run"))
    assert all(row["tokens_per_s"] > 1000 for row in rows)


# ------------------------------------------------------------------- best weights, stopping, resuming


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that replaces the measured losses by given ones."""

    def script(losses: list[float]) -> None:
        left = iter(losses)
        monkeypatch.setattr("rwkv_peft.training.validation.validation_loss", lambda *args: (next(left), 10))

    return script


def test_patience_ends_the_run_and_the_best_weights_are_saved(inputs, val, tmp_path, scripted, capsys):
    scripted([5.0, 3.0, 4.0, 3.0, 3.5])
    flags = ["--val_data_file", val, "--val_every", "2", "--patience", "3", "--epoch_steps", "20"]
    rows = train(tmp_path / "run", inputs, *BONE, *flags, "--epoch_count", "3", "--epoch_save", "2")
    assert [row["step"] for row in rows] == list(range(1, 9))
    out = capsys.readouterr().out
    assert "step 2  validation loss 3.0000  perplexity 20.09  (best so far, saved as rwkv-best.safetensors)" in out
    assert "step 6  validation loss 3.0000  perplexity 20.09  (best 3.0000, step 2)" in out
    assert "stopping early at step 8: no better validation loss in 3 validations" in out
    assert f"best validation loss 3.0000 at step 2: {tmp_path}/run/rwkv-best.safetensors" in out
    assert sorted(path.name for path in (tmp_path / "run").glob("rwkv*")) == [
        "rwkv-0.safetensors",
        "rwkv-best.safetensors",
    ]
    train(tmp_path / "short", inputs, *BONE, "--epoch_steps", "2")
    best, _ = read_adapter(tmp_path / "run" / "rwkv-best.safetensors")
    expected, _ = read_adapter(tmp_path / "short" / "rwkv-0.safetensors")
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def test_the_best_full_model_is_saved_as_pth(inputs, val, tmp_path, scripted):
    scripted([2.0, 1.0])
    train(tmp_path / "run", inputs, "--val_data_file", val)
    best, last = (load_plain(tmp_path / "run" / f"rwkv-{name}.pth").state_dict() for name in ("best", 0))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_a_loss_that_is_not_finite_is_an_error(inputs, val, tmp_path, scripted):
    scripted([2.0, math.nan])
    with pytest.raises(UserError, match="validation after step 2: validation loss nan is not finite"):
        train(tmp_path / "run", inputs, *BONE, "--val_data_file", val, "--val_every", "2")


def test_state_round_trip():
    from rwkv_peft.training.validation import Validator

    def validator(documents: int = 5) -> Validator:
        data = SimpleNamespace(identity=[{"documents": documents}])
        return Validator(data, every=2, patience=3, recorder=None, keep=Path)

    before, after = validator(), validator()
    before.best_loss, before.best_step, before.not_better, before.last_step = 2.5, 40, 2, 80
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    assert after.has_measured, "a resumed run does not validate again at the start"
    assert not validator().has_measured
    other = validator(6)
    other.load_state_dict(before.state_dict())
    assert other.state_dict() == validator(6).state_dict(), "losses on other data cannot be compared"


def test_the_last_validation_is_in_the_last_checkpoint(inputs, val, tmp_path, scripted):
    """Otherwise a resumed run could replace the best weights by worse ones."""
    flags = [*BONE, "--val_data_file", val]
    scripted([5.5, 3.0])
    train(tmp_path / "run", inputs, *flags)
    scripted([3.5])
    train(tmp_path / "run", inputs, *flags, "--epoch_count", "2", "--resume", "auto")
    assert [row["val_loss"] for row in validations(tmp_path / "run")] == [5.5, 3.0, 3.5]
    best, first = (read_adapter(tmp_path / "run" / f"rwkv-{name}.safetensors")[0] for name in ("best", 0))
    assert all(torch.equal(best[name], first[name]) for name in first)


def test_a_run_that_patience_ended_is_finished(inputs, val, tmp_path, scripted, capsys):
    flags = [*BONE, "--val_data_file", val, "--val_every", "1", "--epoch_steps", "9"]
    scripted([5.0, 6.0, 6.0])
    rows = train(tmp_path / "run", inputs, *flags, "--patience", "2")
    assert train(tmp_path / "run", inputs, *flags, "--patience", "2", "--resume", "auto") == rows
    assert "--patience 2 ended the run; a larger value continues it" in capsys.readouterr().out
    scripted([4.0, *[7.0] * 3])
    more = train(tmp_path / "run", inputs, *flags, "--patience", "3", "--resume", "auto")
    assert [row["step"] for row in more] == [1, 2, 3, 4, 5, 6]
    scripted([5.0, *[6.0] * 9])
    train(tmp_path / "run", inputs, *flags)  # replaces the finished run without an error


def test_training_continues_if_the_best_weights_cannot_be_saved(inputs, val, tmp_path, monkeypatch, capsys):
    def full(folder, name, *rest):
        if name == "best":
            raise CheckpointError(str(folder), "cannot be written (No space left on device)")
        return save_trained(folder, name, *rest)

    monkeypatch.setattr("rwkv_peft.training.fit.save_trained", full)
    train(tmp_path / "run", inputs, *BONE, "--val_data_file", val)
    printed = capsys.readouterr()
    assert "(No space left on device). Training continues." in printed.err
    assert "(best so far, not saved)" in printed.out
    assert (tmp_path / "run" / "rwkv-0.safetensors").exists()


# ----------------------------------------------------------------------------- validation data


def summary_of(capsys, *flags: str) -> str:
    capsys.readouterr()
    with mock.patch("rwkv_peft.training.run.announce_memory", return_value=None):  # it takes time
        train_flags([*flags, "--dataload", "pad", "--ctx_len", "48", *BONE, "--dry_run"])
    return capsys.readouterr().out


def test_a_pair_named_data_val_is_the_default_validation_set(inputs, val, tmp_path, capsys):
    assert "\nval " not in summary_of(capsys, *inputs)
    write_pair(tmp_path / "data_val")
    out = summary_of(capsys, *inputs, "--val_every", "50")
    assert f"val     {tmp_path}/data_val (" in out
    assert "): 6 documents" in out.split("\nval ")[1]
    assert "2 batches at the start, every 50 steps and at the end; loss on every token" in out
    assert f"val     {val} (--val_data_file): " in summary_of(capsys, *inputs, "--val_data_file", val)
    assert "\nval " not in summary_of(capsys, *inputs, "--val_data_file", "none")
    assert "\nval " not in summary_of(capsys, *inputs[:2], "--data_file", inputs[3], val)
    train(tmp_path / "run", inputs, *BONE, "--val_data_file", "none")
    assert not validations(tmp_path / "run")


def test_validation_documents_are_not_trained_on(inputs, tmp_path, capsys):
    from rwkv_peft.data.training_data import open_data

    for dataload in ("get", "walk", "pad", "pack"):
        config = DataConfig(data_file=inputs[3], val_fraction=0.25, ctx_len=48, dataload=dataload)
        data = open_data(config)
        documents = data.validation.parts[0].reader
        assert 10 < len(documents) < 40
        rows = b"".join(row["input_ids"].numpy().astype("u1").tobytes() for row in data.first_samples(500))
        for i in range(len(documents)):
            assert documents.document(i).astype("u1").tobytes() not in rows, dataload
    out = summary_of(capsys, *inputs, "--val_fraction", "0.25")
    assert f"{96 - len(documents)} documents" in out
    assert f"): {len(documents)} documents" in out.split("\nval ")[1]
    assert len(train(tmp_path / "run", inputs, *BONE, "--val_fraction", "0.25")) == 6
    assert len(validations(tmp_path / "run")) == 2


def test_validating_on_the_training_data_is_noted(inputs, tmp_path, capsys):
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"data{suffix}", tmp_path / f"copy{suffix}")
    for prefix in (inputs[3], f"{tmp_path}/copy"):
        out = summary_of(capsys, *inputs, "--val_data_file", prefix)
        assert f"note: {prefix} is training data: the validation loss says nothing about other text" in out


def test_different_masks_in_training_and_validation_are_noted(inputs, tmp_path, capsys):
    with BinidxWriter(tmp_path / "masked", load_tokenizer("bytes")) as writer:
        writer.add_document([5, 6, 7, 0], [0, 0, 1, 1])
    out = summary_of(capsys, *inputs, "--val_data_file", f"{tmp_path}/masked")
    assert "note: the training loss is on every token, the validation loss on the tokens of --loss_mask file" in out


@pytest.fixture(scope="module")
def bad_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with bad pairs: another tokenizer, an id outside the vocabulary, too few tokens."""
    folder = tmp_path_factory.mktemp("bad")
    world, in_bytes = load_tokenizer("world"), load_tokenizer("bytes")
    for name, tokenizer, ids in (("world", world, [5, 0]), ("high", world, [5, 300, 0]), ("short", in_bytes, [0])):
        with BinidxWriter(folder / name, tokenizer) as writer:
            writer.add_document(ids)
    (folder / "high.meta.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--val_data_file {0}/gone", r"gone.idx: no such file"),
        ("--val_data_file {0}/world", r"a different tokenizer than --data_file; found rwkv-world .*expected bytes"),
        ("--val_data_file {0}/high", r"high.bin: a token id is outside the vocabulary; found 300 at token 1 of"),
        ("--val_data_file {0}/short", r"short.bin: "),
        ("--val_fraction 1e-9", r"--val_fraction: .*found 1e-09"),
        ("--val_every 5", r"--val_every: there is no validation set; found 5. Give --val_data_file or"),
        ("--val_every 5 --val_data_file none", r"--val_every: there is no validation set"),
        ("--val_fraction 0.1 --val_data_file {0}/high", r"--val_fraction: cannot be combined with --val_data_file"),
        ("--val_fraction 1", r"--val_fraction: invalid value; found 1.0, expected"),
        ("--patience 3", "--patience: needs --val_every"),
    ],
)
def test_errors_of_bad_flags(flags, message, inputs, bad_pairs, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", inputs, *BONE, *flags.format(bad_pairs).split())
    assert not (tmp_path / "run").exists()
