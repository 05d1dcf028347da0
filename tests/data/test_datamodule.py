from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from rwkv_peft.config import DataConfig
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.data.sampling import Samples
from rwkv_peft.errors import DataError
from tests.data.pairs import IdsOnly


@pytest.fixture
def prefix(write_pair) -> str:
    """23 documents; document i begins with the token i + 1."""
    return write_pair([[i + 1, 7, 0] for i in range(23)])


def make_module(prefix: str, **settings) -> BinidxDataModule:
    config = DataConfig(data_file=prefix, **{"dataload": "pad", "ctx_len": 6, "micro_bsz": 4} | settings)
    return BinidxDataModule(config, vocab_size=100)


def batches_of_rank(prefix: str, rank: int, world_size: int, **settings) -> list[dict[str, torch.Tensor]]:
    module = make_module(prefix, **settings)
    module.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    module.setup("fit")
    return list(module.train_dataloader())


def test_batches_have_the_promised_shapes(prefix):
    batch = batches_of_rank(prefix, 0, 1)[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((4, 6), torch.int64),
        "targets": ((4, 6), torch.int64),
        "loss_mask": ((4, 6), torch.bool),
    }


@pytest.mark.parametrize("dataload", ["get", "pad"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(prefix, dataload, world_size):
    ranks = [batches_of_rank(prefix, q, world_size, dataload=dataload, epoch_steps=5) for q in range(world_size)]
    alone = batches_of_rank(prefix, 0, 1, dataload=dataload, epoch_steps=5, micro_bsz=4 * world_size)
    assert len(alone) == 5
    for step, whole in enumerate(alone):
        for key, value in whole.items():
            assert torch.equal(torch.cat([batches[step][key] for batches in ranks]), value)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_of_pad_is_exactly_the_data(prefix, world_size):
    ranks = [batches_of_rank(prefix, q, world_size) for q in range(world_size)]
    order = [row for step in zip(*ranks, strict=True) for batch in step for row in batch["input_ids"][:, 0].tolist()]
    assert sorted(order[:23]) == list(range(1, 24))
    assert len(order) == 24  # the last batch is filled up, with no batch more than needed


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
