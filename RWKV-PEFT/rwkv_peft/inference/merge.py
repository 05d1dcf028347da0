"""Fold an adapter into its base: one `.pth` that any RWKV-6 program loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.assembly import Loaded, load_with_adapter
from rwkv_peft.checkpoint import save_base
from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.inject import peft_layers


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    method: str
    layers: int
    """Linear layers that carried an adapter."""
    replaced: int
    """Other base parameters that trained and were replaced."""
    relative_size: float
    """||dW|| / ||W|| over all merged layers."""
    realised: float
    """Share of dW that the stored weights moved along it: 1 is all; storage in bf16 rounds small updates away."""
    dtype: torch.dtype
    """Of the stored matrices."""

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers ({self.method}), {self.replaced} other parameters replaced\n"
            f"|dW|/|W| = {self.relative_size:.2e}; stored as {str(self.dtype).removeprefix('torch.')}, "
            f"which realises {self.realised:.1%} of dW"
        )
        if self.realised < 0.9:
            text += "\nThe stored dtype rounds part of the training away: --dtype fp32 keeps it."
        return text


def merge(
    base_model: str | Path, adapter: str | Path, output: str | Path, dtype: torch.dtype | None = None
) -> MergeReport:
    """Write base + adapter to `output`, in the base's key order.

    The sum is made in fp32 and rounded once.

    Args:
        base_model: `.pth` the adapter was trained on.
        adapter: `.safetensors` of a run; method, layout and targets are read from it.
        output: `.pth` to write, whole or not at all.
        dtype: of the stored tensors; None keeps each tensor's own.
    Raises:
        CheckpointError: see assembly.load_with_adapter; or the output would overwrite the base.
    """
    for source, name in ((base_model, "base model"), (adapter, "adapter")):
        if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
            raise CheckpointError(str(output), f"would overwrite the {name}", hint="Choose another --output.")
    loaded = load_with_adapter(base_model, adapter)
    merged, sums = _merge_layers(loaded, dtype)
    save_base(merged, output)
    return MergeReport(
        method=loaded.info.method,
        layers=len(loaded.info.targets),
        replaced=sum(name in loaded.base for name in loaded.trained),
        relative_size=(sums.delta_squared / sums.weight_squared) ** 0.5,
        realised=sums.realised / sums.delta_squared if sums.delta_squared else 1.0,
        dtype=dtype or loaded.base["head.weight"].dtype,
    )


@dataclass
class _Sums:
    """Scalar products over all merged layers, for the report."""

    weight_squared: float = 0.0
    delta_squared: float = 0.0
    realised: float = 0.0

    def add(self, weight: Tensor, merged: Tensor, stored: Tensor) -> None:
        weight = weight.to(merged.dtype)
        delta = merged - weight
        self.weight_squared += float(weight.square().sum())
        self.delta_squared += float(delta.square().sum())
        self.realised += float(((stored.to(merged.dtype) - weight) * delta).sum())


@torch.no_grad()
def _merge_layers(loaded: Loaded, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], _Sums]:
    layers, merged, sums = peft_layers(loaded.model), {}, _Sums()
    for key, tensor in loaded.base.items():
        stored_dtype = dtype or tensor.dtype
        layer = layers.get(key.removesuffix(".weight"))
        if layer is None:
            merged[key] = loaded.trained.get(key, tensor).to(stored_dtype)
            continue
        layer.weight.data = tensor  # as the file has it: the model may hold it in a narrower dtype
        full = layer.merged_weight()
        merged[key] = full.to(stored_dtype)
        sums.add(tensor, full, merged[key])
    return merged, sums
