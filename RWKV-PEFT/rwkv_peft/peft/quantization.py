"""The frozen matrix of `--quant`: stored in 4 or 8 bits, read a few rows at a time.

Formats and kernels are those of bitsandbytes. Every row is padded to whole blocks of BLOCK elements that share a scale,
so any rows can be dequantized without the others. No target of RWKV-6 needs padding.
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
"""Elements that share a scale. The error of int8 on normal weights is 0.95 % with 64 and 1.08 % with 256."""


class QuantizedWeight(nn.Module):
    """A frozen (O, I) matrix that is stored quantized.

    The operators in ops/ accept it as a weight (products.Matrix): it has shape, dtype, device and element_size, and
    `weight[rows]` returns those rows as a Tensor. `weight[:]` is the whole matrix.
    """

    codes: Tensor
    """(O, P / 2) for 4 bits, two elements per byte, or (O, P) for 8 bits; uint8."""
    absmax: Tensor
    """(O, P / BLOCK), the scale of each block; fp32."""
    code_book: Tensor | None
    """(256,), the values of the int8 codes; None for 4 bits, whose values bitsandbytes knows by name."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        """Quantize a float matrix.

        Args:
            weight: (O, I), any float dtype; rows are returned in this dtype. No reference is kept.
            kind: nf4, fp4 or int8.
        Raises:
            ConfigError: an unknown kind, or bitsandbytes is missing.
        """
        super().__init__()
        if kind not in KINDS:
            raise ConfigError("quant", found=kind, expected=" | ".join(KINDS))
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        # A slice of rows at a time, because bitsandbytes needs several times the memory of its input.
        parts = [_quantize_rows(weight[rows].detach(), kind) for rows in weight_slices(weight)]
        codes, scales, code_books = zip(*parts, strict=True)
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("absmax", torch.cat(scales))
        self.register_buffer("code_book", code_books[0])

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows, dequantized: (rows, I) in `dtype`."""
        # bitsandbytes has no float64; the values are then those of fp32.
        dtype = self.dtype if self.dtype in (torch.float16, torch.bfloat16) else torch.float32
        padded = _dequantize_rows(self.codes[rows], self.absmax[rows], self.code_book, self.kind, dtype)
        return padded[:, : self.shape[1]].to(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix occupies."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def element_size(self) -> int:
        """Return 1, also for 4 bits: smaller than any input's, so that products dequantize slices, never all rows."""
        return 1

    def _apply(self, fn, recurse: bool = True) -> QuantizedWeight:
        """Apply `fn` to the buffers as bytes.

        The buffers move between devices with the model, but `model.to(bf16)`, which casts float tensors only, must not
        round the scales.
        """
        return super()._apply(lambda buffer: fn(buffer.view(torch.uint8)).view(buffer.dtype), recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register bitsandbytes' operators, which a new process that unpickles the weight needs."""
        super().__setstate__(state)
        _bitsandbytes(self.kind)

    def extra_repr(self) -> str:
        out_features, in_features = self.shape
        return f"{in_features}, {out_features}, {self.kind}"


class QuantizedLinear(PeftLinear):
    """y = W x with a quantized W and no adapter."""

    adapter_names = ()

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)


def quantize_base(model: nn.Module, kind: str, keep: Sequence[str] = ("head",)) -> None:
    """Quantize the weight of every frozen linear layer, with or without an adapter, in place.

    These stay unchanged: embeddings, trainable parameters, everything on meta, and layers in `keep` without an adapter.

    Args:
        model: with initialized adapters and marked trainable parameters.
        kind: none, nf4, fp4 or int8.
        keep: names of layers.
    Raises:
        ConfigError: there is no frozen layer to quantize, or bitsandbytes is missing.
    """
    if kind == "none":
        return
    frozen = {name: module for name, module in model.named_modules() if _is_frozen_linear(module, name in keep)}
    if not frozen:
        what = f"{kind} cannot be used with --peft none, because a quantized base cannot be trained"
        raise ConfigError("quant", what=what, hint="Use another --peft, or omit --quant.")
    for name, module in frozen.items():
        if module.weight.is_meta:
            continue
        layer = module
        if not isinstance(module, PeftLinear):
            layer = QuantizedLinear(module, None)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        layer.replace_weight(QuantizedWeight(layer.weight, kind))


def _is_frozen_linear(module: nn.Module, kept: bool) -> bool:
    if isinstance(module, PeftLinear):
        return not module.is_embedding
    return isinstance(module, nn.Linear) and not module.weight.requires_grad and not kept


def _quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize (rows, I) to codes (rows, P / 2 or P), scales (rows, P / BLOCK) and the code book of int8."""
    bnb = _bitsandbytes(kind)
    weight = weight.float() if weight.dtype == torch.float64 else weight
    padded = F.pad(weight, (0, -weight.shape[1] % BLOCK)).contiguous()  # zeros change no scale
    if kind == "int8":
        codes, state = bnb.quantize_blockwise(padded, blocksize=BLOCK)
    else:
        codes, state = bnb.quantize_4bit(padded, blocksize=BLOCK, quant_type=kind)
    rows = weight.shape[0]
    return codes.view(rows, -1), state.absmax.view(rows, -1), state.code if kind == "int8" else None


def _dequantize_rows(codes: Tensor, absmax: Tensor, code_book: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """Invert `_quantize_rows`, with the padding: return (rows, P) in `dtype`."""
    # These are the operators behind bitsandbytes' functions, which torch.compile captures in one graph.
    operators, scales = torch.ops.bitsandbytes, absmax.reshape(-1)
    if kind == "int8":
        return operators.dequantize_blockwise.default(codes, scales, code_book, BLOCK, dtype)
    shape = (codes.shape[0], codes.shape[1] * 2)
    return operators.dequantize_4bit.default(codes, scales, BLOCK, kind, shape, dtype)


@functools.cache
def _bitsandbytes(kind: str) -> ModuleType:
    """Import bitsandbytes on first use, so that it is not needed without `--quant`, and return its functions."""
    # The import may log that a kernel for generation is missing, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        what = f"needs the package bitsandbytes, which cannot be imported ({error})"
        raise ConfigError("quant", kind, what=what, hint="Try: pip install bitsandbytes==0.50.2") from error
    return functional
