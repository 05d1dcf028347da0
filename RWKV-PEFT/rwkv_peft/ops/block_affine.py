"""Bone (Block Affine, arXiv 2409.15371): the update dW = W bone + bone, block by block.

W is (O, I), cut into r x r blocks W_ab (a: output block, b: input block). Three layouts share matrices:

    row   bone (I/r, r, r)   dW_ab = W_ab B_b + B_b        one matrix per input block  (eq. 8-10 by rows)
    col   bone (O/r, r, r)   dW_ab = W_ab B_a + B_a        one matrix per output block (eq. 5-7, Tables 2-4)
    left  bone (O/r, r, r)   dW_ab = B_a^T W_ab + B_a^T    eq. 8-10 read literally in Y = X (W + dW)

`block_affine_delta` is the definition. The functions below it never hold a weight-sized tensor for backward.
A number on the bf16 grid plus less than half a step is itself, and updates of early training are that small: row and
left can round stochastically where the update joins x or y, so that all of it arrives in the mean.
Letters: N rows (batch x time), O out_features, I in_features, r block size; s = sum_b x_b.
"""

from __future__ import annotations

import torch
from torch import Tensor

COL_GROUP_ROWS = 512
"""Output rows of W + dW that `bone_col` builds at a time: large enough for a fast matmul, small beside W."""


def block_affine_delta(weight: Tensor, bone: Tensor, mode: str) -> Tensor:
    """dW by its definition, all blocks at once.

    Args:
        weight: (O, I), r divides both.
        bone: (I/r, r, r) for `row`, (O/r, r, r) for `col` and `left`; weight's dtype.
        mode: row, col or left.
    Returns:
        (O, I), a pure delta.
    """
    r = bone.shape[-1]
    blocks = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (O/r, I/r, r, r)
    if mode == "row":
        delta = blocks @ bone + bone
    elif mode == "col":
        delta = blocks @ bone[:, None] + bone[:, None]
    elif mode == "left":
        delta = bone.mT[:, None] @ blocks + bone.mT[:, None]
    else:
        raise ValueError(f"mode {mode!r} is none of row, col, left")
    return delta.transpose(1, 2).reshape(weight.shape)


def bone_row(x: Tensor, weight: Tensor, bone: Tensor, stochastic: bool = False) -> Tensor:
    """y = x (W + dW)^T with dW_ab = W_ab B_b + B_b, one r x r matrix per *input* block.

    The update acts on the input alone: W_ab B_b x_b = W_ab (B_b x_b), so with p_b = B_b x_b
        y = W (x + p) + tile(sum_b p_b)
    which costs I*r per row beside the frozen product. Backward keeps x, W and bone only.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I) in x's dtype, frozen: it gets no gradient; r divides O and I (checked at injection).
        bone: (I/r, r, r) in x's dtype.
        stochastic: round x + p stochastically; x must be bf16.
    Returns:
        (..., O) in x's dtype.
    """
    return _on_rows(_BoneRow, x, weight, bone, stochastic)


def bone_left(x: Tensor, weight: Tensor, bone: Tensor, stochastic: bool = False) -> Tensor:
    """y = x (W + dW)^T with dW_ab = B_a^T W_ab + B_a^T, one r x r matrix per *output* block.

    The update acts on the output alone: with h = W x,  y_a = h_a + B_a^T (h_a + s). Backward keeps h + tile(s)
    in place of x.

    Args and returns as `bone_row`, but bone is (O/r, r, r), and what is rounded stochastically is y.
    """
    return _on_rows(_BoneLeft, x, weight, bone, stochastic)


def bone_col(x: Tensor, weight: Tensor, bone: Tensor) -> Tensor:
    """y = x (W + dW)^T with dW_ab = W_ab B_a + B_a, one r x r matrix per *output* block.

    B_a mixes the columns of every block of its row of blocks, so it cannot be moved to x or y: W + W B is
    needed, and is built a group of output rows at a time and dropped. Backward keeps x, W and bone only.

    Args and returns as `bone_row`, but bone is (O/r, r, r).
    """
    return _on_rows(_BoneCol, x, weight, bone)


def add_stochastically(a: Tensor, b: Tensor) -> Tensor:
    """a + b in bf16, rounded up or down at random so that its mean is the exact sum.

    Noise below the bf16 grid is added to the fp32 sum, which is then cut off. The noise of place (n, m) is that of
    row n xor that of column m: uniform everywhere and pairwise independent, which is all that the mean and the
    variance of any product with the result depend on, for N + M random numbers instead of N * M.

    Args:
        a, b: (N, M) bf16.
    Returns:
        (N, M) bf16. The numbers come from torch's generator of the device, which checkpointing replays.
    """
    bits = a.float().add_(b).view(torch.int32)
    rows = torch.randint(2**16, (a.shape[0], 1), dtype=torch.int32, device=a.device)
    columns = torch.randint(2**16, (1, a.shape[1]), dtype=torch.int32, device=a.device)
    bits.add_(rows ^ columns)  # carries into the upper half as often as the lower half says
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _on_rows(form: type[torch.autograd.Function], x: Tensor, *arguments: Tensor | bool) -> Tensor:
    """Apply a form that takes (N, I) rows to (..., I)."""
    return form.apply(x.reshape(-1, x.shape[-1]), *arguments).unflatten(0, x.shape[:-1])


def _per_block(x: Tensor, bone: Tensor) -> Tensor:
    """B_b x_b for every block: (N, I) with (I/r, r, r) -> (N, I/r, r), a transposed view."""
    blocks = x.unflatten(-1, (-1, bone.shape[-1])).transpose(0, 1)  # (I/r, N, r)
    return torch.bmm(blocks, bone.mT).transpose(0, 1)


def _block_sum(x: Tensor, r: int) -> Tensor:
    """s = sum_b x_b: (N, I) -> (N, r)."""
    return x.unflatten(-1, (-1, r)).sum(1)


def _add_to_blocks(y: Tensor, s: Tensor) -> Tensor:
    """y_a += s_a in place: (N, O) with (N, O/r, r), or with (N, 1, r) for the same in every block."""
    y.unflatten(-1, (-1, s.shape[-1])).add_(s)
    return y


def _bone_gradient(grad: Tensor, x: Tensor, r: int) -> Tensor:
    """Gradient of B in p_b = B_b x_b: grad (N, I) of p, x (N, I) -> (I/r, r, r)."""
    grad_blocks, x_blocks = (t.unflatten(-1, (-1, r)).transpose(0, 1) for t in (grad, x))  # (I/r, N, r)
    return torch.bmm(grad_blocks.mT, x_blocks)


class _BoneRow(torch.autograd.Function):
    """`bone_row` on (N, I) rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bone: Tensor, stochastic: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bone)
        p = _per_block(x, bone)  # (N, I/r, r)
        s = p.sum(1, keepdim=True)  # (N, 1, r)
        if not stochastic:
            return _add_to_blocks((x.unflatten(-1, p.shape[1:]) + p).flatten(1) @ weight.mT, s)
        # One rounding for both terms: y on the bf16 grid would swallow the second as x swallows p.
        tile = s.flatten(1).repeat(1, weight.shape[0] // bone.shape[-1])  # (N, O)
        return torch.addmm(tile, add_stochastically(x, p.flatten(1)), weight.mT)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight, bone = ctx.saved_tensors
        grad_mixed = grad_y @ weight  # (N, I)
        grad_tile = _block_sum(grad_y, bone.shape[-1]).unsqueeze(1)  # (N, 1, r)
        grad_p = _add_to_blocks(grad_mixed.clone(), grad_tile)  # (N, I)
        grad_bone = _bone_gradient(grad_p, x, bone.shape[-1]) if ctx.needs_input_grad[2] else None
        grad_x = _add_to_blocks(grad_mixed, _per_block(grad_p, bone.mT)) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_bone, None


class _BoneLeft(torch.autograd.Function):
    """`bone_left` on (N, I) rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bone: Tensor, stochastic: bool) -> Tensor:
        r = bone.shape[-1]
        h = x @ weight.mT  # (N, O)
        inner = _add_to_blocks(h.clone(), _block_sum(x, r).unsqueeze(1))  # h + tile(s)
        ctx.save_for_backward(inner, weight, bone)
        update = _per_block(inner, bone.mT)  # (N, O/r, r)
        return add_stochastically(h, update.flatten(1)) if stochastic else _add_to_blocks(h, update)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        inner, weight, bone = ctx.saved_tensors
        r = bone.shape[-1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_inner = _per_block(grad_y, bone)  # (N, O/r, r)
            grad_h = (grad_y.unflatten(-1, (-1, r)) + grad_inner).flatten(1)  # (N, O)
            grad_x = _add_to_blocks(grad_h @ weight, grad_inner.sum(1, keepdim=True))
        grad_bone = _bone_gradient(inner, grad_y, r) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bone, None


class _BoneCol(torch.autograd.Function):
    """`bone_col` on (N, I) rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bone)
        s = _block_sum(x, bone.shape[-1])  # (N, r)
        y = (s @ bone.flatten(0, 1).mT).contiguous()  # (N, O): the "+ B_a" term, B_a s in every output block
        for rows, blocks in _groups(weight, bone):
            y[:, rows].addmm_(x, _mixed(weight[rows], bone[blocks]).mT)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weight, bone = ctx.saved_tensors
        r = bone.shape[-1]
        grad_x = grad_bone = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            for rows, blocks in _groups(weight, bone):
                grad_x.addmm_(grad_y[:, rows], _mixed(weight[rows], bone[blocks]))
            grad_s = grad_y @ bone.flatten(0, 1)  # (N, r)
            _add_to_blocks(grad_x, grad_s.unsqueeze(1))
        if ctx.needs_input_grad[2]:
            grad_bone = (grad_y.mT @ _block_sum(x, r)).unflatten(0, (-1, r))  # (O/r, r, r): the "+ B_a" term
            for rows, blocks in _groups(weight, bone):
                grad_w = grad_y[:, rows].mT @ x  # (rows, I): the gradient of these rows of dW
                grad_bone[blocks] += _row_blocks(weight[rows], r).mT @ _row_blocks(grad_w, r)
        return grad_x, None, grad_bone


def _groups(weight: Tensor, bone: Tensor):
    """Slices of W's rows and of bone's matrices, about COL_GROUP_ROWS rows each."""
    r = bone.shape[-1]
    step = max(1, COL_GROUP_ROWS // r)
    for start in range(0, bone.shape[0], step):
        stop = min(start + step, bone.shape[0])
        yield slice(start * r, stop * r), slice(start, stop)


def _row_blocks(weight: Tensor, r: int) -> Tensor:
    """(g*r, I) -> (g, r * I/r, r): the blocks of each block row stacked; a view, no copy."""
    return weight.reshape(weight.shape[0] // r, -1, r)


def _mixed(weight: Tensor, bone: Tensor) -> Tensor:
    """W_ab + W_ab B_a for a group of block rows: (g*r, I), (g, r, r) -> (g*r, I)."""
    blocks = _row_blocks(weight, bone.shape[-1])
    return torch.baddbmm(blocks, blocks, bone).view(weight.shape)
