"""Products with a frozen matrix, computed in the dtype that is fastest on the device.

On Intel CPUs without AMX, fp32 products are faster than bf16 products (1.8 times with AVX-512 BF16, 10 times with AVX2;
docs/performance.md has an AMD CPU for which this is not true). On a CPU without AMX, bf16 rows are therefore converted
to fp32, and the matrix is converted with them, one slice at a time: it stays in bf16 in memory. Sums are in fp32, and
the result is rounded once, at the end. Generation, with its few rows, keeps bf16. On all other devices, products use
the dtype of the rows.

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

SLICE_ELEMENTS = 2**21
"""Number of matrix elements converted to a wider dtype at a time: 8 MB in fp32, which stays in the cache."""

ROWS_WORTH_WIDENING = 64
"""Smallest number of rows that are widened without gradients. With fewer rows, reading the matrix takes most of the
time, and bf16 halves the bytes to read. Training always widens, so that small updates are not lost to rounding."""


class Matrix(Protocol):
    """The interface of a frozen (O, I) matrix: a Tensor, or the quantized weights of peft/quantization.py."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def element_size(self) -> int:
        """Return bytes per element. If it is smaller than the rows' own, products convert one slice at a time."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return some rows in the matrix's dtype."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for products with rows x (N, I): x's dtype, or fp32 if that is faster."""
    wanted = x.shape[0] >= ROWS_WORTH_WIDENING or torch.is_grad_enabled()
    return torch.float32 if wanted and widens(x.dtype, x.device.type) else x.dtype


def widens(dtype: torch.dtype, device_type: str) -> bool:
    """Return whether training multiplies rows of this dtype in fp32 on this type of device."""
    return dtype in (torch.bfloat16, torch.float16) and device_type == "cpu" and not _has_amx()


def _has_amx() -> bool:
    """Return whether the CPU has AMX matrix units for bf16."""
    return torch.cpu._is_amx_tile_supported()


def times_transposed(x: Tensor, weight: Matrix, add_to: Tensor | None = None) -> Tensor:
    """Return x @ weight.T: (N, I), (O, I) -> (N, O) in x's dtype. `weight` may have any float dtype.

    Args:
        add_to: (N, O) in x's dtype; the product is added to it in place, and the sum is rounded once.
    """
    y = x.new_empty(x.shape[0], weight.shape[0]) if add_to is None else add_to
    beta = int(add_to is not None)
    if not _is_narrower(weight, x):
        return y.addmm_(x, weight[:].to(x.dtype).mT, beta=beta)
    for rows in weight_slices(weight):
        y[:, rows].addmm_(x, weight[rows].to(x.dtype).mT, beta=beta)
    return y


def times(y: Tensor, weight: Matrix) -> Tensor:
    """Return y @ weight: (N, O), (O, I) -> (N, I) in y's dtype. `weight` may have any float dtype."""
    if not _is_narrower(weight, y):
        return y @ weight[:].to(y.dtype)
    x = y.new_empty(y.shape[0], weight.shape[1])
    for rows in weight_slices(weight):
        x.addmm_(y[:, rows], weight[rows].to(y.dtype), beta=int(rows.start > 0))
    return x


def weight_slices(weight: Matrix, multiple: int = 1, elements: int = SLICE_ELEMENTS) -> Iterator[slice]:
    """Yield slices of the matrix's rows with about `elements` elements each, starting at multiples of `multiple`."""
    step = max(1, elements // (weight.shape[1] * multiple)) * multiple
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _is_narrower(weight: Matrix, x: Tensor) -> bool:
    return weight.element_size() < x.element_size()


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """Return y = x W^T in x's dtype, differentiable in both.

    If the matrix has a narrower dtype than x, no copy of it in x's dtype is kept for backward.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), in x's dtype or another one (fp32 master weights under bf16, or quantized weights).
    Returns:
        (..., O) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = product_dtype(rows)
    if dtype == x.dtype and not _is_narrower(weight, x):
        return F.linear(x, weight.to(x.dtype))
    return _WideLinear.apply(rows, weight, dtype).reshape(*x.shape[:-1], weight.shape[0])


def in_own_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast in forward or backward of an operator that chooses the dtype of its products itself.

    Decorates the static methods of an autograd Function.
    """

    @functools.wraps(method)
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*arguments)

    return run


class _WideLinear(torch.autograd.Function):
    """Computes `linear` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.x_dtype = dtype, x.dtype
        trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(*((x, weight) if trained else ()))  # torch then detects in-place changes of it
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
