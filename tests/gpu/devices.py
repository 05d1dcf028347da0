"""Tests that run on the CPU and, if there is one, on a GPU. So the tests themselves are checked without a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.wkv6.fla import load_fla
from tests.helpers import relative_error

FP32_FLOOR = 2e-6
"""Relative error that is always accepted for fp32 results, even if the plain computation is more precise."""

on_cuda = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


def each_backend(*on_cpu: str, cuda: tuple[str, ...]):
    """Parametrize over (device, backend) pairs."""
    pairs = [("cpu", backend) for backend in on_cpu]
    return pytest.mark.parametrize(
        ("device", "backend"), [*pairs, *(pytest.param("cuda", backend, marks=on_cuda) for backend in cuda)]
    )


def skip_without(backend: str, device: str) -> None:
    """Skip the test if the backend is fla and the package is not installed."""
    if backend == "fla" and (reason := load_fla(device)):
        pytest.skip(reason)


def assert_as_precise_as_plain(
    found: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Check that every error against float64 is at most twice the error of the plain low-precision computation.

    The tensors must have many elements: the error of a single element can be small by chance.
    """
    assert found.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert value.numel() > 50, name
        error, limit = (relative_error(x[name].cpu(), value.cpu()) for x in (found, plain))
        assert limit == limit, f"{name}: the plain computation is NaN"
        assert error <= max(2 * limit, FP32_FLOOR), f"{name}: error {error:.1e}, of the plain computation {limit:.1e}"


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check that a single element differs from the exact one by at most one rounding to `dtype`."""
    limit = max(torch.finfo(dtype).eps / 2, FP32_FLOOR)
    assert relative_error(found.cpu(), exact.cpu()) <= limit, f"found {float(found)}, expected {float(exact)}"
