"""One body for every device: what a GPU is to pass has been seen to pass on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.wkv6.fla import load_fla
from tests.helpers import relative_error

FP32_FLOOR = 2e-6
"""Relative error that any fp32 result may have, however exact the plain computation happens to be."""

on_cuda = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


def each_backend(*on_cpu: str, cuda: tuple[str, ...]):
    """Parametrise over (device, backend) pairs."""
    pairs = [("cpu", backend) for backend in on_cpu]
    return pytest.mark.parametrize(
        ("device", "backend"), [*pairs, *(pytest.param("cuda", backend, marks=on_cuda) for backend in cuda)]
    )


def skip_without(backend: str, device: str) -> None:
    """fla is optional; asked only where there is a GPU to run it."""
    if backend == "fla" and (reason := load_fla(device)):
        pytest.skip(reason)


def assert_as_good_as_plain(
    found: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Every result is at most twice as far from the float64 one as the plain low-precision computation's is.

    For tensors of many elements: how near a single number comes is luck.
    """
    assert found.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert value.numel() > 50, name
        error, limit = (relative_error(x[name].cpu(), value.cpu()) for x in (found, plain))
        assert limit == limit, f"{name}: the plain computation is NaN"
        assert error <= max(2 * limit, FP32_FLOOR), f"{name}: {error:.1e}, the plain computation {limit:.1e}"


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """A single number is off by at most one rounding to `dtype`."""
    limit = max(torch.finfo(dtype).eps / 2, FP32_FLOOR)
    assert relative_error(found.cpu(), exact.cpu()) <= limit, f"{float(found)}, exactly {float(exact)}"
