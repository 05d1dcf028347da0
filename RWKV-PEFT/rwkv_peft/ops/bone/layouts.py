"""Bone (Block Affine, arXiv 2409.15371v1): the update dW = W bone + bone, applied block by block.

W is (O, I), cut into r x r blocks W_ab (a: output block, b: input block). The three layouts differ in which blocks
share a matrix:

    row   bone (I/r, r, r)   dW_ab = W_ab B_b + B_b        one matrix per input block  (eq. 8-10 by rows)
    col   bone (O/r, r, r)   dW_ab = W_ab B_a + B_a        one matrix per output block (eq. 5-7, Tables 2-4)
    left  bone (O/r, r, r)   dW_ab = B_a^T W_ab + B_a^T    eq. 8-10 read literally in Y = X (W + dW)

`block_affine_delta` is the definition of these layouts and of the variants in ops/bone/variants.py. The functions
below it never keep a weight-sized tensor for backward.

A bf16 value does not change if less than half a step of its grid is added, and the updates of early training are that
small. If products are in fp32 (ops/products.py), only y is rounded, once. If products are in bf16, the sum of the
update and the tensor it is added to (x for row, y for left, W for col) can be rounded stochastically. The update is
then preserved on average.

Letters: N rows (batch x time), O out_features, I in_features, r block size; s = sum_b x_b.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.bone.block_products import column_blocks, mix_blocks, outer_blocks, row_blocks
from rwkv_peft.ops.products import (
    Matrix,
    in_own_dtype,
    linear,
    product_dtype,
    times,
    times_transposed,
    weight_slices,
)

COL_SLICE_ELEMENTS = 2**22
"""Number of elements of W + dW that `bone_col` builds at a time, 16 MB in fp32: large enough for a fast product."""

COL_FEW_ROWS = 16
"""With at most this many rows and no gradients, `bone_col` does not build W + dW. This is 11 times faster for one row;
at about 20 rows both ways take the same time."""


def block_affine_delta(weight: Tensor, bone: Tensor, mode: str) -> Tensor:
    """Return dW by its definition, all blocks at once.

    Args:
        weight: (O, I); r divides both.
        bone: in weight's dtype: (I/r, r, r) for `row` and `hadamard`, (O/r, r, r) for `col` and `left`,
            (2, I/r, r, r) for `unconstrained`, (g, r, r) for `group`, where g divides the number of blocks.
        mode: row, col, left, group, unconstrained or hadamard.
    Returns:
        (O, I), the difference from `weight`.
    Raises:
        ValueError: unknown mode.
    """
    r = bone.shape[-1]
    blocks = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (O/r, I/r, r, r)
    if mode == "row":
        delta = blocks @ bone + bone
    elif mode == "col":
        delta = blocks @ bone[:, None] + bone[:, None]
    elif mode == "left":
        delta = bone.mT[:, None] @ blocks + bone.mT[:, None]
    elif mode == "group":
        copies = blocks.shape[0] * blocks.shape[1] // bone.shape[0]
        matrices = bone.repeat(copies, 1, 1).unflatten(0, blocks.shape[:2])  # block i, counted by rows: bone[i mod g]
        delta = blocks @ matrices + matrices
    elif mode == "unconstrained":
        factors, summands = bone
        delta = blocks @ factors + summands
    elif mode == "hadamard":
        delta = blocks * bone + bone
    else:
        raise ValueError(f"bone: mode must be row, col, left, group, unconstrained or hadamard; found {mode!r}")
    return delta.transpose(1, 2).reshape(weight.shape)


def bone_row(x: Tensor, weight: Matrix, bone: Tensor, stochastic: bool = False) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = W_ab B_b + B_b, one r x r matrix per *input* block.

    The update acts on the input only: W_ab B_b x_b = W_ab (B_b x_b), so with p_b = B_b x_b
        y = W (x + p) + tile(sum_b p_b)
    which costs I*r per row in addition to the frozen product. Saves only x, W and bone for backward.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), any float dtype, frozen (no gradient); r divides O and I (checked at injection).
        bone: (I/r, r, r), any float dtype.
        stochastic: round x + p stochastically if x and the products are bf16.
    Returns:
        (..., O) in x's dtype.
    """
    return _on_rows(_BoneRow, x, weight, bone, stochastic)


def bone_left(x: Tensor, weight: Matrix, bone: Tensor, stochastic: bool = False) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = B_a^T W_ab + B_a^T, one r x r matrix per *output* block.

    The update acts on the output only: with h = W x, y_a = h_a + B_a^T (h_a + s). Saves h and s for backward instead
    of x.

    Args and returns as for `bone_row`, but bone is (O/r, r, r), and `stochastic` applies to y.
    """
    return _on_rows(_BoneLeft, x, weight, bone, stochastic)


def bone_col(x: Tensor, weight: Matrix, bone: Tensor, stochastic: bool = False) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = W_ab B_a + B_a, one r x r matrix per *output* block.

    B_a mixes the columns of every block in its row of blocks, so it cannot be applied to x or y. W + W B is therefore
    built for one slice of output rows at a time and discarded after use. Saves only x, W and bone for backward.

    For a few rows without gradients (generation), W (x + B_a x) is computed for each a instead, without W + W B.

    Args and returns as for `bone_row`, but bone is (O/r, r, r), and `stochastic` applies to W + W B.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or bone.requires_grad)
    few = x[..., 0].numel() <= COL_FEW_ROWS
    if few and not needs_grad:
        return _col_on_few_rows(x, weight, bone)
    return _on_rows(_BoneCol, x, weight, bone, stochastic)


def bone_materialized(x: Tensor, weight: Matrix, bone: Tensor, mode: str) -> Tensor:
    """Return y = x (W + dW)^T as in the paper's code, which builds dW and W + dW and keeps them for backward.

    Intended for comparison. Args and returns as for the function of `mode`; weight and bone are used in x's dtype.
    """
    weight = weight[:].to(x.dtype)
    return linear(x, weight + block_affine_delta(weight, bone.to(x.dtype), mode))


def add_stochastically(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b in bf16, rounded up or down at random such that the expected value is the exact sum.

    Noise smaller than a bf16 step is added to the fp32 sum, which is then truncated. The noise of element (n, m) is
    noise[n] xor noise[m]. It is uniform, and any two elements are independent. The mean and the variance of a product
    with the result depend on nothing else, so N + M random numbers are enough instead of N * M.

    Args:
        a, b: (N, M) bf16.
    Returns:
        (N, M) bf16. The random numbers come from torch's generator of the device, which checkpointing restores.
    """
    bits = a.to(torch.float32, copy=True).add_(b).view(torch.int32)
    rows = torch.randint(2**16, (a.shape[0], 1), dtype=torch.int32, device=a.device)
    columns = torch.randint(2**16, (1, a.shape[1]), dtype=torch.int32, device=a.device)
    bits.add_(rows ^ columns)  # carries into the upper half with the right probability
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _on_rows(form: type[torch.autograd.Function], x: Tensor, weight: Matrix, bone: Tensor, stochastic: bool) -> Tensor:
    """Apply an autograd Function for rows (N, I) to x (..., I)."""
    rows = x.reshape(-1, x.shape[-1])
    dtype = product_dtype(rows)
    stochastic = stochastic and dtype == torch.bfloat16
    return form.apply(rows, weight, bone, dtype, stochastic).reshape(*x.shape[:-1], weight.shape[0])


def _block_sum(x: Tensor, r: int) -> Tensor:
    """Return s = sum_b x_b: (N, I) -> (N, r)."""
    return x.unflatten(-1, (-1, r)).sum(1)


def _add_to_blocks(y: Tensor, s: Tensor) -> Tensor:
    """Compute y_a += s in place and return y: (N, O), (N, r) -> (N, O)."""
    y.unflatten(-1, (-1, s.shape[-1])).add_(s.unsqueeze(1))
    return y


def _rows(blocks: Tensor) -> Tensor:
    """Return the rows that `column_blocks` was applied to: (G, N, r) -> (N, G*r)."""
    return blocks.transpose(0, 1).flatten(1)


class _BoneRow(torch.autograd.Function):
    """Computes `bone_row` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, bone: Tensor, dtype: torch.dtype, stochastic: bool) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight, ctx.dtype, r = weight, dtype, bone.shape[-1]
        blocks, matrices = column_blocks(x, r), bone.to(dtype).mT
        if stochastic:
            update = torch.bmm(blocks, matrices)  # (I/r, N, r)
            # Round both terms once: added to a rounded y, the second term could be lost, as p would be in x.
            tile = update.sum(0).repeat(1, weight.shape[0] // r)  # (N, O)
            return times_transposed(add_stochastically(x, _rows(update)), weight, add_to=tile)
        mixed, s = mix_blocks(blocks, matrices, want_sum=True, dtype=dtype)
        return _add_to_blocks(times_transposed(_rows(mixed), weight), s).to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, bone = ctx.saved_tensors
        r, grad_y = bone.shape[-1], grad_y.to(ctx.dtype)
        grad_mixed = column_blocks(times(grad_y, ctx.weight), r)  # (I/r, N, r)
        tile = _block_sum(grad_y, r)  # grad_mixed + tile is the gradient of p
        grad_x = grad_bone = None
        if ctx.needs_input_grad[2]:
            grad_bone = outer_blocks(grad_mixed, column_blocks(x, r), tile=tile, dtype=ctx.dtype).to(bone.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _rows(mix_blocks(grad_mixed, bone.to(ctx.dtype), tile=tile, dtype=x.dtype)[0])
        return grad_x, None, grad_bone, None, None


class _BoneLeft(torch.autograd.Function):
    """Computes `bone_left` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, bone: Tensor, dtype: torch.dtype, stochastic: bool) -> Tensor:
        ctx.weight, ctx.dtype, r, y_dtype = weight, dtype, bone.shape[-1], x.dtype
        x, bone_ = x.to(dtype), bone.to(dtype)
        h, s = times_transposed(x, weight), _block_sum(x, r)  # (N, O), (N, r)
        ctx.save_for_backward(h.to(y_dtype), s, bone)
        if stochastic:
            update = torch.bmm(column_blocks(h, r) + s, bone_)
            return add_stochastically(h, _rows(update))
        return _rows(mix_blocks(column_blocks(h, r), bone_, tile=s, dtype=y_dtype)[0])

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        h, s, bone = ctx.saved_tensors
        blocks = column_blocks(grad_y, bone.shape[-1])
        grad_x = grad_bone = None
        if ctx.needs_input_grad[0]:
            grad_h, grad_s = mix_blocks(blocks, bone.to(ctx.dtype).mT, want_sum=True, dtype=ctx.dtype)
            grad_x = _add_to_blocks(times(_rows(grad_h), ctx.weight), grad_s).to(h.dtype)
        if ctx.needs_input_grad[2]:
            h_blocks = column_blocks(h, bone.shape[-1])
            grad_bone = outer_blocks(h_blocks, blocks, tile=s, dtype=ctx.dtype).to(bone.dtype)
        return grad_x, None, grad_bone, None, None


class _BoneCol(torch.autograd.Function):
    """Computes `bone_col` on (N, I) rows with products in `dtype`.

    In fp32 and wider, the slices of W + W B include the "+ B_a" term, because W_ab B_a + B_a = (W_ab + 1) B_a. In half
    precision, rounding W + dW would lose most of this term, the larger part of dW. It is then computed separately, as
    B_a s in every output block.
    """

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, bone: Tensor, dtype: torch.dtype, stochastic: bool) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight, ctx.dtype, y_dtype = weight, dtype, x.dtype
        x, bone = x.to(dtype), bone.to(dtype)
        unit = _unit_tile(weight, bone)
        y = x.new_empty(x.shape[0], weight.shape[0])
        if unit is None:  # before the large product, so that y is rounded after both
            torch.mm(_block_sum(x, bone.shape[-1]), bone.flatten(0, 1).mT, out=y)
        for rows, blocks in _slices(weight, bone):
            mixed = _mixed(weight[rows], bone[blocks], unit, stochastic)
            y[:, rows].addmm_(x, mixed.mT, beta=int(unit is None))
        return y.to(y_dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        weight, (x_saved, bone_saved) = ctx.weight, ctx.saved_tensors
        x, bone, grad_y = (t.to(ctx.dtype) for t in (x_saved, bone_saved, grad_y))
        r, unit = bone.shape[-1], _unit_tile(weight, bone)
        grad_x, grad_bone = torch.empty_like(x), torch.empty_like(bone)
        for rows, blocks in _slices(weight, bone):
            part = weight[rows]  # (rows, I), read once: this dequantizes a quantized weight
            if ctx.needs_input_grad[0]:
                mixed = _mixed(part, bone[blocks], unit, False)
                grad_x.addmm_(grad_y[:, rows], mixed, beta=int(rows.start > 0))
            if ctx.needs_input_grad[2]:
                grad_w = grad_y[:, rows].mT @ x  # (rows, I): the gradient of these rows of dW
                left, right = row_blocks(part, r), row_blocks(grad_w, r)
                grad_bone[blocks] = outer_blocks(left, right, tile=unit, dtype=ctx.dtype)
        if unit is None and ctx.needs_input_grad[0]:
            _add_to_blocks(grad_x, grad_y @ bone.flatten(0, 1))
        if unit is None and ctx.needs_input_grad[2]:
            grad_bone += (grad_y.mT @ _block_sum(x, r)).view(grad_bone.shape)
        return (
            grad_x.to(x_saved.dtype) if ctx.needs_input_grad[0] else None,
            None,
            grad_bone.to(bone_saved.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _col_on_few_rows(x: Tensor, weight: Matrix, bone: Tensor) -> Tensor:
    """Compute `bone_col` as y_a = W_a (x + B_a x) + B_a s: fast for a few rows, because W + W B is not built."""
    r = bone.shape[-1]
    rows, bone = x.reshape(-1, x.shape[-1]), bone.to(x.dtype)
    update = rows.unflatten(-1, (-1, r)) @ bone.mT[:, None]  # (O/r, N, I/r, r)
    mixed = rows + update.flatten(2)  # (O/r, N, I)
    parts = [mixed[a] @ weight[rows].to(x.dtype).unflatten(0, (-1, r)).mT for rows, a in _slices(weight, bone)]
    y = torch.cat(parts) + update.sum(2)  # (O/r, N, r)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def _slices(weight: Matrix, bone: Tensor):
    """Yield slices of W's rows together with the matching slices of bone's matrices."""
    r = bone.shape[-1]
    for rows in weight_slices(weight, multiple=r, elements=COL_SLICE_ELEMENTS):
        yield rows, slice(rows.start // r, rows.stop // r)


def _unit_tile(weight: Matrix, bone: Tensor) -> Tensor | None:
    """Return the identity matrix, repeated as in `row_blocks` of W, (r * I/r, r); None in half precision."""
    if bone.dtype in (torch.bfloat16, torch.float16):
        return None
    r = bone.shape[-1]
    return torch.eye(r, dtype=bone.dtype, device=bone.device).repeat_interleave(weight.shape[1] // r, 0)


def _mixed(weight: Tensor, bone: Tensor, unit: Tensor | None, stochastic: bool) -> Tensor:
    """Return W_ab + (W_ab + unit) B_a for a slice of W's rows, in bone's dtype: (g*r, I), (g, r, r) -> (g*r, I)."""
    blocks = row_blocks(weight, bone.shape[-1])
    if stochastic:
        return add_stochastically(weight.to(bone.dtype), torch.bmm(blocks.to(bone.dtype), bone).view(weight.shape))
    return mix_blocks(blocks, bone, tile=unit, dtype=bone.dtype)[0].view(weight.shape)
