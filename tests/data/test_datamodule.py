from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.datamodule import BinidxDataModule, MicroBatch, StepDataset
from rwkv_peft.data.training_data import TrainingData, open_data
from rwkv_peft.errors import ConfigError, DataError
from tests.data.pairs import IdsOnly


@pytest.fixture
def prefix(write_pair) -> str:
    """Write 23 documents; document i begins with token i + 1."""
    return write_pair([[i + 1, 7, 0] for i in range(23)])


def make_module(prefix: str, per_step: int = 1, **settings) -> BinidxDataModule:
    config = DataConfig(data_file=prefix, **{"dataload": "pad", "ctx_len": 6, "micro_bsz": 4} | settings)
    return BinidxDataModule(open_data(config, vocab_size=100), per_step)


def steps_of_rank(
    prefix: str, rank: int, world_size: int, *, begin: tuple[int, int] = (0, 0), epoch: int = 0, **settings
) -> list[list[MicroBatch]]:
    """Return the steps of the trainer's epoch `epoch`, in a run that begins at (epoch, micro-batch)."""
    module = make_module(prefix, **settings)
    module.begin_at(*begin)
    module.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, current_epoch=epoch)
    loader = module.train_dataloader()
    steps = list(loader)
    assert len(loader) == len(steps)
    return steps


def batches_of_rank(*arguments, **settings) -> list[MicroBatch]:
    """Return the micro-batches of all steps."""
    return [batch for step in steps_of_rank(*arguments, **settings) for batch in step]


def assert_equal(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_the_promised_shapes(prefix):
    batch = batches_of_rank(prefix, 0, 1)[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((4, 6), torch.int64),
        "targets": ((4, 6), torch.int64),
        "loss_mask": ((4, 6), torch.bool),
        "sample": ((4, 2), torch.int64),
    }
    assert batch["sample"].tolist() == [[0, index] for index in range(4)]


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "pack"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_together_get_the_rows_of_one_process(prefix, dataload, world_size):
    ranks = [batches_of_rank(prefix, q, world_size, dataload=dataload, epoch_steps=5) for q in range(world_size)]
    alone = batches_of_rank(prefix, 0, 1, dataload=dataload, epoch_steps=5, micro_bsz=4 * world_size)
    assert len(alone) == 5
    for step, whole in enumerate(alone):
        for key in ("input_ids", "targets", "loss_mask"):
            assert torch.equal(torch.cat([batches[step][key] for batches in ranks]), whole[key])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_of_pad_is_exactly_the_data(prefix, world_size):
    ranks = [batches_of_rank(prefix, q, world_size) for q in range(world_size)]
    order = [row for step in zip(*ranks, strict=True) for batch in step for row in batch["input_ids"][:, 0].tolist()]
    assert sorted(order[:23]) == list(range(1, 24))
    assert len(order) == 24  # the last batch is filled up, with no batch more than needed


def test_batches_of_pack_say_where_documents_begin(prefix):
    """Each row has two documents of 3 tokens; the 23rd document has its own row."""
    batches = batches_of_rank(prefix, 0, 1, dataload="pack")
    assert len(batches) == 3
    assert all(batch["starts"].dtype == torch.bool for batch in batches)
    assert all(batch["starts"].sum().item() == 8 for batch in batches)
    assert batches[0]["starts"].tolist() == 4 * [[True, False, False, True, False, False]]


def test_batches_of_only_are_as_long_as_the_document(write_pair):
    prefix = write_pair([[1] * n for n in (2, 5, 4, 9)])
    batches = batches_of_rank(prefix, 0, 1, dataload="only", micro_bsz=1)
    assert sorted(tuple(batch["targets"].shape) for batch in batches) == [(1, 1), (1, 3), (1, 4), (1, 6)]
    assert all(batch["loss_mask"].all() for batch in batches)


@pytest.mark.parametrize("micro_bsz", [2, 4])
def test_only_takes_one_document_at_a_time(micro_bsz):
    with pytest.raises(ConfigError, match=f"--micro_bsz: must be 1 with --dataload only.*found {micro_bsz}"):
        DataConfig(dataload="only", micro_bsz=micro_bsz)


@pytest.mark.parametrize("settings", [{"dataload": "walk"}, {"dataload": "get", "magic_prime": 5}])
def test_the_walk_continues_over_epochs(prefix, settings):
    """69 tokens give 5 windows of 10 targets. Five epochs of 3 windows use each window three times, in three passes."""
    settings |= {"ctx_len": 10, "micro_bsz": 1, "epoch_steps": 3}
    three = [batches_of_rank(prefix, 0, 1, **settings, epoch_begin=epoch) for epoch in (0, 1, 2, 3, 4)]
    order = [tuple(batch["input_ids"][0].tolist()) for batches in three for batch in batches]
    assert [len(set(order[i : i + 5])) for i in (0, 5, 10)] == [5, 5, 5]
    module = make_module(prefix, **settings)
    assert module.data.plan(1).samples_per_pass == 5


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "pack"])
def test_a_run_may_begin_within_an_epoch(prefix, dataload):
    """The first epoch is then the rest of that epoch; the next ones are complete."""
    settings = {"dataload": dataload, "micro_bsz": 1, "epoch_steps": 5, "epoch_begin": 2}
    whole = [batches_of_rank(prefix, 1, 2, epoch=epoch, **settings) for epoch in range(3)]
    rest, after = (batches_of_rank(prefix, 1, 2, begin=(1, 3), epoch=epoch, **settings) for epoch in (0, 1))
    assert_equal(rest, whole[1][3:])
    assert_equal(after, whole[2])


@pytest.mark.parametrize(("per_step", "sizes"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (10, [6])])
def test_a_step_is_a_list_of_micro_batches(prefix, per_step, sizes):
    """The number of micro-batches in a step does not change them; an epoch's last step may be shorter."""
    steps = steps_of_rank(prefix, 0, 1, per_step=per_step)
    assert [len(step) for step in steps] == sizes
    assert_equal([batch for step in steps for batch in step], batches_of_rank(prefix, 0, 1))


@pytest.mark.parametrize("dataload", ["pack", "walk"])
def test_a_run_may_begin_at_a_step_within_an_epoch(prefix, dataload):
    settings = {"dataload": dataload, "micro_bsz": 1, "epoch_steps": 8, "per_step": 3}
    whole = steps_of_rank(prefix, 1, 2, epoch=1, **settings)
    rest = steps_of_rank(prefix, 1, 2, begin=(1, 3), **settings)
    assert [len(step) for step in rest] == [3, 2]
    for found, expected in zip(rest, whole[1:], strict=True):
        assert_equal(found, expected)
    assert [len(step) for step in steps_of_rank(prefix, 1, 2, begin=(0, 3), epoch=1, **settings)] == [3, 3, 2]


def test_a_step_is_read_only_when_it_is_needed(prefix, monkeypatch):
    module = make_module(prefix, per_step=3)
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0)
    read, sample = [], module.data.sample
    monkeypatch.setattr(module.data, "sample", lambda epoch, index: read.append(index) or sample(epoch, index))
    steps = iter(module.train_dataloader())
    for rows in (12, 24):
        next(steps)
        assert read == list(range(rows))


def test_loaders_do_not_use_the_random_numbers_of_the_run(prefix):
    """Otherwise dropout would differ in a resumed run, which makes fewer loaders."""
    before = torch.get_rng_state()
    batches_of_rank(prefix, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_pairs_in_one_run(write_pair):
    a, b = (write_pair([[first + i, 7, 0] for i in range(6)], name=f"from_{first}") for first in (1, 51))
    ranks = [batches_of_rank((f"{a}:2", f"{b}:1"), q, 2, micro_bsz=3) for q in range(2)]
    tokens = [int(t) for step in zip(*ranks, strict=True) for batch in step for t in batch["input_ids"][:, 0]]
    assert len(tokens) == 18
    assert set(tokens) == {*range(1, 7), *range(51, 57)}
    assert sum(token > 50 for token in tokens) == 6


@pytest.mark.parametrize("dataload", ["get", "pack"])
def test_loader_workers_give_the_same_batches(prefix, write_pair, dataload):
    other = write_pair([[90, 91, 0]] * 9, name="other")
    data = make_module((f"{prefix}:2", f"{other}:1"), dataload=dataload).data
    keys = [[[(epoch, index)], [(epoch, index + 1)]] for epoch in (0, 1) for index in range(30)]
    here, there = StepDataset(data), DataLoader(StepDataset(data), batch_size=None, sampler=keys, num_workers=2)
    for key, step in zip(keys, there, strict=True):
        assert_equal(step, here[key])


class Recorder(pl.LightningModule):
    """Records what it was given; its one parameter does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> torch.Tensor:
        for micro_batch in batch:
            self.seen[-1] += micro_batch["input_ids"][:, 0].tolist()
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield


def first_tokens(module: BinidxDataModule, epochs: range) -> list[list[int]]:
    """Return the first token of each of the 24 rows, for each epoch."""
    return [[int(module.data.sample(e, i)["input_ids"][0]) for i in range(24)] for e in epochs]


def test_lightning_epochs_have_different_orders(prefix):
    module, recorder = make_module(prefix, per_step=4, epoch_begin=3), Recorder()
    make_trainer(epochs=3).fit(recorder, module)
    assert recorder.seen == first_tokens(module, range(3, 6))
    assert recorder.seen[0] != recorder.seen[1] != recorder.seen[2]


def test_a_resumed_run_continues_with_the_next_epoch(prefix, tmp_path):
    first, module = make_trainer(epochs=1), make_module(prefix)
    first.fit(Recorder(), module)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed, recorder = make_module(prefix), Recorder()
    make_trainer(epochs=3).fit(recorder, resumed, ckpt_path=tmp_path / "last.ckpt")
    assert recorder.seen == first_tokens(module, range(1, 3))


def check_identity(data: TrainingData, sha256: str) -> None:
    data.check_tokenizer({"name": "other", "sha256": sha256}, "the adapter's")


def test_another_tokenizer_than_the_adapters_is_an_error(prefix):
    with pytest.raises(DataError, match=r"different tokenizer.*found ids \(sha256 0000.*expected other \(sha256 ffff"):
        check_identity(open_data(DataConfig(data_file=prefix)), "f" * 64)


def test_the_adapters_tokenizer_is_accepted_under_another_name(prefix):
    data = open_data(DataConfig(data_file=prefix))
    check_identity(data, IdsOnly().identity["sha256"])
    data.check_tokenizer(None, "the adapter's")


def test_a_pair_without_a_sidecar_is_accepted(prefix):
    Path(prefix + ".meta.json").unlink()
    data = open_data(DataConfig(data_file=prefix))
    check_identity(data, "f" * 64)
    assert data.meta is None


def test_opening_checks_the_vocabulary(prefix):
    with pytest.raises(DataError, match="outside the vocabulary"):
        open_data(DataConfig(data_file=prefix), vocab_size=20)
