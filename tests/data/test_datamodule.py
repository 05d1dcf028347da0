from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.datamodule import BinidxDataModule, SampleDataset
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.errors import ConfigError, DataError
from tests.data.pairs import IdsOnly


@pytest.fixture
def prefix(write_pair) -> str:
    """23 documents; document i begins with the token i + 1."""
    return write_pair([[i + 1, 7, 0] for i in range(23)])


def make_module(prefix: str, **settings) -> BinidxDataModule:
    config = DataConfig(data_file=prefix, **{"dataload": "pad", "ctx_len": 6, "micro_bsz": 4} | settings)
    return BinidxDataModule(config, vocab_size=100)


def batches_of_rank(
    prefix: str, rank: int, world_size: int, *, begin: tuple[int, int] = (0, 0), epoch: int = 0, **settings
) -> list[dict[str, torch.Tensor]]:
    """Of the trainer's epoch `epoch`, in a run that begins at (epoch, batch)."""
    module = make_module(prefix, **settings)
    module.begin_at(*begin)
    module.trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, accumulate_grad_batches=1, current_epoch=epoch
    )
    module.setup("fit")
    return list(module.train_dataloader())


def test_batches_have_the_promised_shapes(prefix):
    batch = batches_of_rank(prefix, 0, 1)[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items() if "tokens" not in key} == {
        "input_ids": ((4, 6), torch.int64),
        "targets": ((4, 6), torch.int64),
        "loss_mask": ((4, 6), torch.bool),
        "sample": ((4, 2), torch.int64),
    }
    assert batch["sample"].tolist() == [[0, index] for index in range(4)]


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "pack"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(prefix, dataload, world_size):
    ranks = [batches_of_rank(prefix, q, world_size, dataload=dataload, epoch_steps=5) for q in range(world_size)]
    alone = batches_of_rank(prefix, 0, 1, dataload=dataload, epoch_steps=5, micro_bsz=4 * world_size)
    assert len(alone) == 5
    for step, whole in enumerate(alone):
        for key in ("input_ids", "targets", "loss_mask"):
            assert torch.equal(torch.cat([batches[step][key] for batches in ranks]), whole[key])
        assert sum(batches[step]["window_tokens"] for batches in ranks) == whole["window_tokens"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_of_pad_is_exactly_the_data(prefix, world_size):
    ranks = [batches_of_rank(prefix, q, world_size) for q in range(world_size)]
    order = [row for step in zip(*ranks, strict=True) for batch in step for row in batch["input_ids"][:, 0].tolist()]
    assert sorted(order[:23]) == list(range(1, 24))
    assert len(order) == 24  # the last batch is filled up, with no batch more than needed


def test_batches_of_pack_say_where_documents_begin(prefix):
    """Two documents of 3 tokens a row; the 23rd is alone."""
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
    with pytest.raises(ConfigError, match=f"--micro_bsz: .*found {micro_bsz} with --dataload only.*expected 1"):
        DataConfig(dataload="only", micro_bsz=micro_bsz)


@pytest.mark.parametrize("settings", [{"dataload": "walk"}, {"dataload": "get", "magic_prime": 5}])
def test_the_walk_goes_on_over_epochs(prefix, settings):
    """69 tokens in windows of 10: three epochs of 5 windows go over each of the 5 three times, as if they were one."""
    settings |= {"ctx_len": 10, "micro_bsz": 1, "epoch_steps": 3}
    three = [batches_of_rank(prefix, 0, 1, **settings, epoch_begin=epoch) for epoch in (0, 1, 2, 3, 4)]
    order = [tuple(batch["input_ids"][0].tolist()) for batches in three for batch in batches]
    assert [len(set(order[i : i + 5])) for i in (0, 5, 10)] == [5, 5, 5]
    module = make_module(prefix, **settings)
    module.setup()
    assert module.plan(1).samples_per_pass == 5


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "pack"])
def test_a_run_may_begin_within_an_epoch(prefix, dataload):
    """Then it sees what is left of that epoch, and the next ones whole."""
    settings = {"dataload": dataload, "micro_bsz": 1, "epoch_steps": 5, "epoch_begin": 2}
    whole = [batches_of_rank(prefix, 1, 2, epoch=epoch, **settings) for epoch in range(3)]
    rest, after = (batches_of_rank(prefix, 1, 2, begin=(1, 3), epoch=epoch, **settings) for epoch in (0, 1))
    for found, expected in ((rest, whole[1][3:]), (after, whole[2])):
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "targets", "loss_mask"))


def test_loaders_leave_the_random_numbers_of_the_run_alone(prefix):
    """Else a run that goes on would drop other activations: it makes fewer loaders."""
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
def test_worker_processes_give_what_this_process_gives(prefix, write_pair, dataload):
    other = write_pair([[90, 91, 0]] * 9, name="other")
    module = make_module((f"{prefix}:2", f"{other}:1"), dataload=dataload)
    module.setup()
    keys = [(epoch, index) for epoch in (0, 1) for index in range(30)]
    here = [module._samples.sample(42, *key) for key in keys]
    there = list(DataLoader(SampleDataset(module._samples, 42), batch_size=None, sampler=keys, num_workers=2))
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(torch.from_numpy(a[name]), b[name]) for name in a)


class Recorder(pl.LightningModule):
    """Trains nothing much, and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen[-1] += batch["input_ids"][:, 0].tolist()
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
    """What training should see: the first token of each of an epoch's 24 samples."""
    samples = Samples(module.reader, module.config, vocab_size=100)
    return [[int(samples.sample(module.config.random_seed, e, i)["input_ids"][0]) for i in range(24)] for e in epochs]


def test_lightning_tells_each_epoch_from_the_last(prefix):
    module, recorder = make_module(prefix, epoch_begin=3), Recorder()
    make_trainer(epochs=3).fit(recorder, module)
    assert recorder.seen == first_tokens(module, range(3, 6))
    assert recorder.seen[0] != recorder.seen[1] != recorder.seen[2]


def test_a_resumed_run_goes_on_with_the_next_epoch(prefix, tmp_path):
    first, module = make_trainer(epochs=1), make_module(prefix)
    first.fit(Recorder(), module)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed, recorder = make_module(prefix), Recorder()
    make_trainer(epochs=3).fit(recorder, resumed, ckpt_path=tmp_path / "last.ckpt")
    assert recorder.seen == first_tokens(module, range(1, 3))


def with_identity(prefix: str, sha256: str) -> BinidxDataModule:
    identity = {"name": "other", "sha256": sha256}
    return BinidxDataModule(DataConfig(data_file=prefix), vocab_size=100, tokenizer_identity=identity)


def test_another_tokenizer_than_the_adapters_is_an_error(prefix):
    with pytest.raises(DataError, match=r"another tokenizer.*found ids \(sha256 0000.*expected other \(sha256 ffff"):
        with_identity(prefix, "f" * 64).setup("fit")


def test_the_adapters_tokenizer_under_another_name_is_taken(prefix):
    module = with_identity(prefix, IdsOnly().identity["sha256"])
    module.setup("fit")
    assert module.plan(world_size=1).documents == 23


def test_a_pair_that_does_not_know_its_tokenizer_is_taken(prefix):
    Path(prefix + ".meta.json").unlink()
    module = with_identity(prefix, "f" * 64)
    module.setup("fit")
    assert module.reader.meta is None


def test_setup_checks_the_vocabulary(prefix):
    with pytest.raises(DataError, match="beyond the vocabulary"):
        BinidxDataModule(DataConfig(data_file=prefix), vocab_size=20).setup("fit")
