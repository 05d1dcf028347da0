"""LISA: which blocks are active, and which parameters a run changes."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.config.sections import OptimConfig, RunConfig
from rwkv_peft.training.optim.lisa import BlockFreezer
from rwkv_peft.training.optim.optimizer import build_optimizer
from rwkv_peft.training.step import TrainingModule
from tests.helpers import lively_model, with_shape
from tests.training.small_runs import config_of, train, write_inputs

BLOCKS = 4
SHAPE = with_shape(vocab_size=257, n_layer=BLOCKS)


def lisa_config(*flags: str, n_layer: int = 8, **options: int) -> RunConfig:
    """Return the configuration of a LISA run with these options of the method."""
    shape = f"--n_layer {n_layer} --n_embd 64 --head_size 32 --dry_run".split()
    return config_of(["--peft", "lisa", "--lisa_config", json.dumps(options), *shape, *flags])


def draws_of(seed: int, count: int = 20, **options: int) -> list[frozenset[int]]:
    """Return the active blocks, of 8, in each of the first `count` steps if they change in every step."""
    method = lisa_config(**{"layers": 2, **options}, interval=1).peft.method
    return [method.active_blocks(step, 8, seed) for step in range(count)]


def test_active_blocks_depend_on_seed_and_step_only():
    torch.manual_seed(0)
    first = draws_of(7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert draws_of(7) == first
    assert torch.equal(torch.get_rng_state(), state), "no random numbers of the run are drawn"
    assert draws_of(8) != first
    assert all(len(blocks) == 2 and blocks <= set(range(8)) for blocks in first)
    slow = lisa_config(layers=2, interval=3).peft.method
    assert [slow.active_blocks(step, 8, 7) for step in (59, 9, 11)] == [first[19], first[3], first[3]]


def test_all_blocks_are_active_equally_often():
    counts = torch.zeros(8)
    for blocks in draws_of(0, count=2000):
        counts[list(blocks)] += 1
    assert (counts - 500).abs().max() < 100, counts  # five standard deviations


def test_more_layers_than_blocks_means_all():
    assert draws_of(0, count=3, layers=9) == [set(range(8))] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lisa")


@pytest.fixture(scope="module")
def records(folder):
    """What each step of a run with an interval of 2 changed, and which moments and gradients existed."""
    recorded, with_gradient = [], []
    plain_step, plain_update = TrainingModule.training_step, torch.optim.AdamW.step

    def snapshot(module):
        return {name: p.detach().clone() for name, p in module.model.named_parameters()}

    def update(optimizer, *args, **kwargs):
        with_gradient[:] = [id(p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        return plain_update(optimizer, *args, **kwargs)

    def recording(module, *args):
        before, step = snapshot(module), module.step
        plain_step(module, *args)
        names = {id(p): name for name, p in module.model.named_parameters()}
        after, optimizer = snapshot(module), module.trainer.optimizers[0]
        recorded.append(
            {
                "step": step,
                "moved": {name for name in after if not torch.equal(before[name], after[name])},
                "rates": {(g["block"], g["lr"] > 0) for g in optimizer.param_groups},
                "moments": {names[id(p)] for p in optimizer.state},
                "trainable": {name for name, p in module.model.named_parameters() if p.requires_grad},
                "gradients": {names[key] for key in with_gradient},
            }
        )

    inputs = write_inputs(folder, SHAPE)
    lisa = ["--peft", "lisa", "--lisa_config", json.dumps({"layers": 1, "interval": 2}), "--random_seed", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", recording)
        patch.setattr(torch.optim.AdamW, "step", update)
        train(folder / "run", inputs, *lisa, "--weight_decay", "0.1", "--epoch_steps", "8")
    return recorded


def test_only_active_blocks_and_parameters_outside_blocks_change(records, folder):
    method = lisa_config(layers=1, interval=2).peft.method
    active = [method.active_blocks(step, BLOCKS, 5) for step in range(8)]
    assert len(set(active)) > 1, "otherwise this tests nothing"
    assert [record["step"] for record in records] == list(range(8))
    names = set(load_base(folder / "base.pth"))
    outside = {name for name in names if not name.startswith("blocks.")}
    assert outside == {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    for record, blocks in zip(records, active, strict=True):
        (block,) = blocks
        expected = outside | {name for name in names if name.startswith(f"blocks.{block}.")}
        rates = {(None, True), *((number, number == block) for number in range(BLOCKS))}
        assert record["rates"] == rates, "DeepSpeed updates with a zero gradient, so the rate must be 0, too"
        for what in ("moved", "moments", "trainable", "gradients"):
            assert record[what] == expected, (record["step"], what, record[what] ^ expected)


def test_the_run_saves_a_whole_model(records, folder):
    before, after = load_base(folder / "base.pth"), load_base(folder / "run" / "rwkv-0.pth")
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set().union(*(record["moved"] for record in records))


def test_moments_start_again_when_a_block_becomes_active_again():
    config = lisa_config(n_layer=2, layers=1, interval=1)
    model = lively_model(with_shape(n_layer=2))
    add_adapter(model, config.peft)
    optimizer = build_optimizer(model, OptimConfig(), by_block=True)
    freezer, block = BlockFreezer(config), model.blocks[0]
    first, second = (
        [s for s in range(50) if config.peft.method.active_blocks(s, 2, config.data.random_seed) == {number}]
        for number in (0, 1)
    )
    for step in (first[0], first[1], second[0], first[2]):
        freezer.apply(model.blocks, optimizer, step)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert int(optimizer.state[block.att.key.weight]["step"]) == 1
    assert int(optimizer.state[model.head.weight]["step"]) == 4
    assert model.blocks[1].att.key.weight not in optimizer.state


def test_only_train_parts_of_an_active_block_train():
    config = lisa_config("--train_parts", "ln", "head", n_layer=2, layers=1, interval=1)
    model = lively_model()
    add_adapter(model, config.peft)
    optimizer = build_optimizer(model, OptimConfig(), by_block=True)
    freezer = BlockFreezer(config)
    for step in range(6):
        freezer.apply(model.blocks, optimizer, step)
        (block,) = config.peft.method.active_blocks(step, 2, config.data.random_seed)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {
            name
            for name, _ in model.named_parameters()
            if name == "head.weight" or (".ln" in f".{name}" and name.startswith(("ln_out", f"blocks.{block}.")))
        }
