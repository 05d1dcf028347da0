"""Products with a frozen matrix, in the arithmetic that is fastest and keeps the most.

A CPU without AMX multiplies fp32 faster than bf16 (measured on x86: 1.8x with AVX-512 BF16, 10x with AVX2). There bf16
rows, unless they are few, are widened to fp32, and the matrix with them, a slice at a time: it stays bf16 in memory,
sums are fp32, and whoever computes with the widened rows rounds once, at the end. Everywhere else products are in the
dtype of the rows.
Letters: N rows (batch x time), O out_features, I in_features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_NUMBERS = 2**21
"""Numbers of a matrix that are widened at a time: 8 MB in fp32, read again from the cache."""

ROWS_WORTH_WIDENING = 64
"""With fewer rows a product is limited by reading the matrix, and bf16 is half to read. Training widens them all the
same, so that no update is rounded away; generation does not."""


class Matrix(Protocol):
    """What operators ask of a frozen (O, I) matrix. A Tensor is one; so is peft/quantization.py's, stored quantised."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def element_size(self) -> int:
        """Bytes a number; below that of the rows, products read a slice of the matrix at a time."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some rows, in the matrix' dtype."""


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of the rows x (N, I) should be computed in: x's dtype, or fp32 where that is faster."""
    wanted = x.shape[0] >= ROWS_WORTH_WIDENING or torch.is_grad_enabled()
    return torch.float32 if wanted and widens(x.dtype, x.device.type) else x.dtype


def widens(dtype: torch.dtype, device_type: str) -> bool:
    """Whether rows of this dtype are multiplied in fp32 on this kind of device, unless a few of them are generated."""
    return dtype in (torch.bfloat16, torch.float16) and device_type == "cpu" and not _has_amx()


def _has_amx() -> bool:
    """Whether the CPU has matrix units for bf16."""
    return torch.cpu._is_amx_tile_supported()


def times_transposed(x: Tensor, weight: Matrix, add_to: Tensor | None = None) -> Tensor:
    """x @ weight.T: (N, I), (O, I) -> (N, O) in x's dtype. `weight` may be of any float dtype.

    Args:
        add_to: (N, O) in x's dtype; the product is added to it, in place, and the sum rounded once.
    """
    y = x.new_empty(x.shape[0], weight.shape[0]) if add_to is None else add_to
    beta = int(add_to is not None)
    if not _is_narrower(weight, x):
        return y.addmm_(x, weight[:].to(x.dtype).mT, beta=beta)
    for rows in weight_slices(weight):
        y[:, rows].addmm_(x, weight[rows].to(x.dtype).mT, beta=beta)
    return y


def times(y: Tensor, weight: Matrix) -> Tensor:
    """y @ weight: (N, O), (O, I) -> (N, I) in y's dtype. `weight` may be of any float dtype."""
    if not _is_narrower(weight, y):
        return y @ weight[:].to(y.dtype)
    x = y.new_empty(y.shape[0], weight.shape[1])
    for rows in weight_slices(weight):
        x.addmm_(y[:, rows], weight[rows].to(y.dtype), beta=int(rows.start > 0))
    return x


def weight_slices(weight: Matrix, multiple: int = 1, numbers: int = SLICE_NUMBERS) -> Iterator[slice]:
    """Slices of a matrix' rows, about `numbers` each; each begins at a multiple of `multiple`."""
    step = max(1, numbers // (weight.shape[1] * multiple)) * multiple
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _is_narrower(weight: Matrix, x: Tensor) -> bool:
    return weight.element_size() < x.element_size()


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """y = x W^T in x's dtype, differentiable in both. A narrower matrix than x is not kept for backward in x's dtype.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), x's dtype or another (fp32 master weights under bf16, a quantised one).
    Returns:
        (..., O) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = product_dtype(rows)
    if dtype == x.dtype and not _is_narrower(weight, x):
        return F.linear(x, weight.to(x.dtype))
    return _WideLinear.apply(rows, weight, dtype).reshape(*x.shape[:-1], weight.shape[0])


def in_own_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
    """For forward and backward of an operator that chooses the dtype of its products: autocast would change some.

    A decorator of a Function's static methods.
    """

    @functools.wraps(method)
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*arguments)

    return run


class _WideLinear(torch.autograd.Function):
    """`linear` on (N, I) rows, computed in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.x_dtype = dtype, x.dtype
        trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(*((x, weight) if trained else ()))  # torch then notices a change of the weight
        ctx.weight = None if trained else weight
        return times_transposed(x.to(dtype), weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors or (None, ctx.weight)
        grad_y = grad_y.to(ctx.dtype)
        grad_x = times(grad_y, weight).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_y.mT @ x.to(ctx.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
