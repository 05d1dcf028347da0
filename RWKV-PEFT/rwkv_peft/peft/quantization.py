"""The frozen matrix of `--quant`: stored in 4 or 8 bits, read a few rows at a time.

The numbers and the kernels are bitsandbytes'. Every row is padded to whole blocks of BLOCK numbers that share a scale,
so any rows can be dequantised without the others, whatever I is; no target of RWKV-6 has a row to pad.
Letters: O out_features, I in_features, P = I padded to a multiple of BLOCK.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.products import linear, weight_slices
from rwkv_peft.peft.base import PeftLinear

KINDS = ("nf4", "fp4", "int8")

BLOCK = 64
"""Numbers that share a scale. On normal weights int8 errs by 0.95 % with 64 and by 1.08 % with 256."""


class QuantizedWeight(nn.Module):
    """A frozen (O, I) matrix that is only held quantised.

    It is what the operators in ops/ take for a weight (products.Matrix): they ask for its shape, dtype, device and
    element_size, and for `weight[rows]`, which gives those rows as a Tensor. `weight[:]` is the whole matrix.
    """

    codes: Tensor
    """(O, P / 2) for 4 bits, two numbers a byte, or (O, P); uint8."""
    absmax: Tensor
    """(O, P / BLOCK), the scale of every block; fp32."""
    code_book: Tensor | None
    """(256,), what int8's codes stand for; bitsandbytes knows the 4-bit ones by name."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        """Quantise a float matrix.

        Args:
            weight: (O, I), any float dtype; rows come back in it. Not kept.
            kind: nf4, fp4 or int8.
        Raises:
            ConfigError: an unknown kind, or bitsandbytes is missing.
        """
        super().__init__()
        if kind not in KINDS:
            raise ConfigError("quant", found=kind, expected=" | ".join(KINDS))
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        # bitsandbytes needs several times the memory of what it quantises: a slice of rows at a time.
        parts = [_quantise_rows(weight[rows].detach(), kind) for rows in weight_slices(weight)]
        codes, scales, code_books = zip(*parts, strict=True)
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("absmax", torch.cat(scales))
        self.register_buffer("code_book", code_books[0])

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows, dequantised: (rows, I) in `dtype`."""
        # bitsandbytes has no float64: the numbers are then those of fp32.
        dtype = self.dtype if self.dtype in (torch.float16, torch.bfloat16) else torch.float32
        padded = _dequantise_rows(self.codes[rows], self.absmax[rows], self.code_book, self.kind, dtype)
        return padded[:, : self.shape[1]].to(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """What the matrix takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def element_size(self) -> int:
        """1, also for 4 bits: below that of any rows it meets, so that products dequantise slices, never the whole."""
        return 1

    def _apply(self, fn, recurse: bool = True) -> QuantizedWeight:
        """Buffers move between devices with the model, but `model.to(bf16)` must not round the scales: `fn`, which
        casts float tensors only, gets to see bytes."""
        return super()._apply(lambda buffer: fn(buffer.view(torch.uint8)).view(buffer.dtype), recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in another process, the operators must be registered there."""
        super().__setstate__(state)
        _bitsandbytes(self.kind)

    def extra_repr(self) -> str:
        out_features, in_features = self.shape
        return f"{in_features}, {out_features}, {self.kind}"


class QuantizedLinear(PeftLinear):
    """y = W x with a quantised W and nothing that trains: a linear layer which no adapter was put on."""

    adapter_names = ()

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)


def quantise_base(model: nn.Module, kind: str, keep: Sequence[str] = ("head",)) -> None:
    """Hold every frozen linear layer's weight quantised, with an adapter or without, in place.

    Embeddings, the layers named in `keep` unless they carry an adapter, and what trains stay as they are; so does all
    that is on meta.

    Args:
        model: with its adapters in place and initialised, and its trained parameters marked.
        kind: none, nf4, fp4 or int8.
        keep: names of layers.
    Raises:
        ConfigError: there is nothing frozen to quantise, or bitsandbytes is missing.
    """
    if kind == "none":
        return
    frozen = {name: module for name, module in model.named_modules() if _is_frozen_linear(module, name in keep)}
    if not frozen:
        raise ConfigError("quant", found=kind, expected="none where the base itself trains")
    for name, module in frozen.items():
        if module.weight.is_meta:
            continue
        layer = module
        if not isinstance(module, PeftLinear):
            layer = QuantizedLinear(module, None)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        layer.hold(QuantizedWeight(layer.weight, kind))


def _is_frozen_linear(module: nn.Module, kept: bool) -> bool:
    if isinstance(module, PeftLinear):
        return not module.looks_up
    return isinstance(module, nn.Linear) and not module.weight.requires_grad and not kept


def _quantise_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, I) -> codes (rows, P / 2 or P), scales (rows, P / BLOCK) and the code book of int8."""
    bnb = _bitsandbytes(kind)
    weight = weight.float() if weight.dtype == torch.float64 else weight
    padded = F.pad(weight, (0, -weight.shape[1] % BLOCK)).contiguous()  # zeros change no scale
    if kind == "int8":
        codes, state = bnb.quantize_blockwise(padded, blocksize=BLOCK)
    else:
        codes, state = bnb.quantize_4bit(padded, blocksize=BLOCK, quant_type=kind)
    rows = weight.shape[0]
    return codes.view(rows, -1), state.absmax.view(rows, -1), state.code if kind == "int8" else None


def _dequantise_rows(codes: Tensor, absmax: Tensor, code_book: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """The inverse of `_quantise_rows`, but for the padding: (rows, P) in `dtype`."""
    # The operators below bitsandbytes' functions: torch.compile takes them whole.
    operators, scales = torch.ops.bitsandbytes, absmax.reshape(-1)
    if kind == "int8":
        return operators.dequantize_blockwise.default(codes, scales, code_book, BLOCK, dtype)
    shape = (codes.shape[0], codes.shape[1] * 2)
    return operators.dequantize_4bit.default(codes, scales, BLOCK, kind, shape, dtype)


@functools.cache
def _bitsandbytes(kind: str) -> ModuleType:
    """bitsandbytes' functions, imported on first use: whoever quantises nothing does not need the package."""
    # On import it may complain that a kernel for generation is missing, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        what = f"needs the package bitsandbytes, which cannot be imported ({error})"
        raise ConfigError("quant", kind, what=what, hint="Try: pip install bitsandbytes==0.50.2") from error
    return functional
