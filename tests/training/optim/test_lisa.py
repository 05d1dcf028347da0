"""LISA: which blocks are drawn, and what a run with it really moves."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.config.sections import OptimConfig, PeftConfig
from rwkv_peft.peft.methods.lisa import LisaConfig
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.optim.lisa import BlockDraw
from rwkv_peft.training.optim.optimizer import build_optimizer
from tests.helpers import lively_model, with_shape
from tests.training.small_runs import train, write_inputs

BLOCKS = 4
SHAPE = with_shape(vocab_size=257, n_layer=BLOCKS)


def drawn(seed: int, layers: int = 2, draws: int = 20, n_layer: int = 8) -> list[set[int]]:
    draw = BlockDraw(LisaConfig(layers=layers), n_layer, seed)
    return [draw.blocks(number) for number in range(draws)]


def test_draws_are_a_function_of_seed_and_number_alone():
    torch.manual_seed(0)
    first = drawn(7)
    torch.manual_seed(1)
    torch.randn(5)
    assert drawn(7) == first
    late = BlockDraw(LisaConfig(layers=2), 8, 7)
    assert [late.blocks(number) for number in (19, 3)] == [first[19], first[3]]
    state = torch.get_rng_state()
    late.blocks(0)
    assert torch.equal(torch.get_rng_state(), state), "drawing leaves the run's random numbers alone"
    assert drawn(8) != first
    assert all(len(blocks) == 2 and blocks <= set(range(8)) for blocks in first)


def test_every_block_is_drawn_as_often_as_any_other():
    counts = torch.zeros(8)
    for blocks in drawn(0, draws=2000):
        counts[list(blocks)] += 1
    assert (counts - 500).abs().max() < 100, counts  # five standard deviations


def test_more_layers_than_there_are_means_all():
    assert drawn(0, layers=9, draws=3) == [set(range(8))] * 3


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """What every optimizer step of a run with an interval of 2 moved, and whose moments it kept."""
    recorded = []

    def snapshot(module):
        return {name: p.detach().clone() for name, p in module.model.named_parameters()}

    plain = TrainingModule.optimizer_step

    def recording(module, *args, **kwargs):
        before, step = snapshot(module), module.trainer.global_step
        plain(module, *args, **kwargs)
        names = {id(p): name for name, p in module.model.named_parameters()}
        after, state = snapshot(module), module.trainer.optimizers[0].state
        recorded.append(
            {
                "step": step,
                "moved": {name for name in after if not torch.equal(before[name], after[name])},
                "rates": {(g["block"], g["lr"] > 0) for g in module.trainer.optimizers[0].param_groups},
                "moments": {names[id(p)] for p in state},
                "trains": {name for name, p in module.model.named_parameters() if p.requires_grad},
                "gradients": {name for name, p in module.model.named_parameters() if p.grad is not None},
            }
        )

    monkeypatch.setattr(TrainingModule, "optimizer_step", recording)
    inputs = write_inputs(tmp_path, SHAPE)
    lisa = ["--peft", "lisa", "--lisa_config", json.dumps({"layers": 1, "interval": 2}), "--random_seed", "5"]
    train(tmp_path / "run", inputs, *lisa, "--weight_decay", "0.1", "--epoch_steps", "8")
    return recorded


def test_only_the_drawn_block_and_what_is_outside_of_blocks_move(steps, tmp_path):
    draw = BlockDraw(LisaConfig(layers=1, interval=2), BLOCKS, 5)
    chosen = [draw.blocks(step // 2) for step in range(8)]
    assert len({frozenset(blocks) for blocks in chosen}) > 1, "the draws must differ for this test to mean anything"
    assert [record["step"] for record in steps] == list(range(8))
    names = set(load_base(tmp_path / "base.pth"))
    outside = {name for name in names if not name.startswith("blocks.")}
    assert outside == {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    for record, blocks in zip(steps, chosen, strict=True):
        (block,) = blocks
        expected = outside | {name for name in names if name.startswith(f"blocks.{block}.")}
        rates = {(None, True), *((number, number == block) for number in range(BLOCKS))}
        assert record["rates"] == rates, "DeepSpeed steps with a zero gradient: the rate must be 0 too"
        for what in ("moved", "moments", "trains", "gradients"):
            assert record[what] == expected, (record["step"], what, record[what] ^ expected)


def test_a_run_leaves_a_whole_model(steps, tmp_path):
    before, after = load_base(tmp_path / "base.pth"), load_base(tmp_path / "run" / "rwkv-0.pth")
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set().union(*(record["moved"] for record in steps))


def test_moments_begin_anew_when_a_block_is_drawn_again():
    model = lively_model(with_shape(n_layer=2))
    add_adapter(model, PeftConfig(peft="lisa"))
    optimizer = build_optimizer(model, OptimConfig(), by_block=True)
    draw = BlockDraw(LisaConfig(layers=1, interval=1), 2, 0)
    block = model.blocks[0]
    for chosen in ({0}, {0}, {1}, {0}):
        draw.drawn = None
        draw.blocks = lambda number, chosen=chosen: chosen
        draw.apply(model.blocks, optimizer, 0)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert int(optimizer.state[block.att.key.weight]["step"]) == 1
    assert int(optimizer.state[model.head.weight]["step"]) == 4
    assert model.blocks[1].att.key.weight not in optimizer.state


def test_parts_that_were_not_asked_for_stay_frozen():
    """`--train_parts` beside LISA: a drawn block trains its parts, not all of itself."""
    model = lively_model()
    add_adapter(model, PeftConfig(peft="lisa", train_parts=("ln", "head")))
    optimizer = build_optimizer(model, OptimConfig(), by_block=True)
    draw = BlockDraw(LisaConfig(layers=1, interval=1), 2, 0)
    for step in range(6):
        draw.apply(model.blocks, optimizer, step)
        (block,) = draw.blocks(step)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {
            name
            for name, _ in model.named_parameters()
            if name == "head.weight" or (".ln" in f".{name}" and name.startswith(("ln_out", f"blocks.{block}.")))
        }
