"""Bone's block products, with every instruction set of this CPU, compared with torch in float64."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.ops.bone import block_products as blocks
from rwkv_peft.ops.bone.block_products import column_blocks, mix_blocks, outer_blocks, row_blocks
from tests.helpers import relative_error
from tests.ops.cpu_levels import each_cpu_level


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if not blocks._has_compiled():
        pytest.skip("the compiled products cannot be built on this machine")


@pytest.mark.parametrize(
    ("groups", "rows", "r", "dtype"),
    [
        (1, 1, 16, torch.float32),
        (6, 37, 16, torch.bfloat16),
        (3, 64, 48, torch.float32),
        (5, 130, 64, torch.bfloat16),
        (2, 67, 128, torch.float32),
    ],
)
def test_every_instruction_set(groups, rows, r, dtype):
    torch.manual_seed(0)
    x, other = (column_blocks(torch.randn(rows, groups * r).to(dtype), r) for _ in range(2))
    matrices, tile = torch.randn(groups, r, r), torch.randn(rows, r)
    update = (x.double() + tile.double()) @ matrices.double()
    for level in each_cpu_level("bone"):
        for out_dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
            out, total = torch.ops.rwkv_peft.mix_blocks(x, matrices, tile, True, out_dtype)
            assert out.dtype == out_dtype
            assert relative_error(out, x.double() + update) < limit, level
            assert relative_error(total, update.sum(0)) < 1e-6, level
        products = torch.ops.rwkv_peft.outer_blocks(x, other, tile)
        assert relative_error(products, (x.double() + tile.double()).mT @ other.double()) < 1e-6, level


def test_bf16_results_are_rounded_as_in_torch():
    """Ties, values that round to inf, and NaN, one value per row."""
    x = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3e38, 3.4e38, 1e-40, 0.1, float("nan")])
    x = x[:, None].repeat(1, 16)[None]  # (1, 8, 16)
    out, _ = torch.ops.rwkv_peft.mix_blocks(x, torch.zeros(1, 16, 16), None, False, torch.bfloat16)
    assert torch.equal(out[:, :7], x.bfloat16()[:, :7])
    assert out[:, 7].isnan().all()


@pytest.mark.parametrize("tile", [None, torch.full((9, 16), 0.5)])
def test_plain_torch_form_agrees(monkeypatch, tile):
    torch.manual_seed(0)
    x, matrices = column_blocks(torch.randn(9, 48), 16), torch.randn(3, 16, 16)
    calls = [
        lambda: mix_blocks(x, matrices, tile=tile, want_sum=True, dtype=torch.float32),
        lambda: (outer_blocks(x, x, tile=tile, dtype=torch.float32),),
    ]
    compiled = [call() for call in calls]
    monkeypatch.setattr(blocks, "_has_compiled", lambda: False)
    for fast, plain in zip(compiled, [call() for call in calls], strict=True):
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(fast, plain, strict=True))
        assert all(a.stride() == b.stride() for a, b in zip(fast, plain, strict=True))


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, matrices, before = row_blocks(torch.randn(128, 96), 32), torch.randn(4, 32, 32), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out, total = mix_blocks(x, matrices, want_sum=True, dtype=torch.float32)
        results.append((out, total, outer_blocks(x, x, dtype=torch.float32)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_that_are_not_contiguous():
    """Transposed and expanded inputs are copied for the compiled form."""
    x, matrices = column_blocks(torch.randn(48, 9).T, 16), torch.randn(3, 16, 16)
    out, _ = mix_blocks(x, matrices, dtype=torch.float32)
    assert relative_error(out, x + x @ matrices) < 1e-6
    ones = torch.ones(()).expand(3, 9, 16)
    assert relative_error(outer_blocks(ones, x, dtype=torch.float32), ones.mT @ x) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4, 8), torch.zeros(2, 8, 8), None), "multiple of 16; found 8"),
        ((torch.zeros(2, 4, 16), torch.zeros(3, 16, 16), None), r"matrices must be contiguous \(2, 16, 16\)"),
        ((torch.zeros(2, 4, 16), torch.zeros(2, 16, 16), torch.zeros(3, 16)), r"tile must be contiguous \(4, 16\)"),
        ((torch.zeros(2, 4, 16).double(), torch.zeros(2, 16, 16), None), "fp32 or bf16"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rwkv_peft.mix_blocks(*arguments, False, torch.float32)


def test_opcheck():
    x, matrices = column_blocks(torch.randn(9, 48), 16), torch.randn(3, 16, 16)
    torch.library.opcheck(torch.ops.rwkv_peft.mix_blocks, (x, matrices, torch.randn(9, 16), True, torch.bfloat16))
    for blocks_in in (x, x.bfloat16()):
        torch.library.opcheck(torch.ops.rwkv_peft.mix_blocks, (blocks_in, matrices, None, False, torch.float32))
    torch.library.opcheck(torch.ops.rwkv_peft.outer_blocks, (x, x, None))
