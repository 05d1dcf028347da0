"""Fold an adapter into its base: one `.pth` that any RWKV-6 program loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.adapted_model import Loaded, load_plain, load_with_adapter
from rwkv_peft.base_model import check_keys, load_base, save_base, shape_of, time_states
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.injection import peft_layers
from rwkv_peft.peft.quantization import QuantizedWeight
from rwkv_peft.peft.registry import method_of

PROBE_TOKENS = 64
"""Length of the text that shows how far a merge is from what trained."""


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
    probe: float | None
    """Where the base was quantised in training: how far the merged model's logits are from those that trained."""

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers ({self.method}), {self.replaced} other parameters replaced\n"
            f"|dW|/|W| = {self.relative_size:.2e}; stored as {str(self.dtype).removeprefix('torch.')}, "
            f"which realises {self.realised:.1%} of dW"
        )
        if self.realised < 0.9:
            text += "\nThe stored dtype rounds part of the training away: --dtype fp32 keeps it."
        if self.probe is not None:
            text += f"\nlogits of {PROBE_TOKENS} tokens differ by {self.probe:.2%} from those on the quantised base"
        return text


def merge(
    base_model: str | Path,
    adapter: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    *,
    onto: str = "original",
    says: PeftConfig | None = None,
) -> MergeReport:
    """Write base + adapter to `output`, in the base's key order.

    The sum is made in fp32 and rounded once.

    Args:
        base_model: `.pth` the adapter was trained on.
        adapter: `.safetensors` of a run; method, layout and targets are read from it.
        output: `.pth` to write, whole or not at all.
        dtype: of the stored tensors; None keeps each tensor's own.
        onto: original, or quantised: the base as it was held in training, with its quantisation errors.
        says: the method of a `.pth` adapter of RWKV-PEFT, which does not say it.
    Raises:
        CheckpointError: see assembly.load_with_adapter; or the output would overwrite the base, the method cannot be
            merged, or the base was not quantised.
    """
    _check_output(output, base_model, adapter)
    loaded = load_with_adapter(base_model, adapter, as_trained=onto == "quantised", says=says)
    _check_mergeable(loaded, adapter, onto)
    merged, sums = _merge_layers(loaded, dtype)
    save_base(merged, output)
    return MergeReport(
        method=loaded.info.method,
        layers=len(loaded.info.targets),
        replaced=sum(name in loaded.base for name in loaded.trained),
        relative_size=(sums.delta_squared / sums.weight_squared) ** 0.5,
        realised=sums.realised / sums.delta_squared if sums.delta_squared else 1.0,
        dtype=dtype or loaded.base["head.weight"].dtype,
        probe=None if loaded.info.quant == "none" else probe(base_model, adapter, output),
    )


def is_tuned_state(path: str | Path) -> bool:
    """Whether a `.pth` is what `--train_type state` saves: states that texts begin with, and nothing else.

    Raises:
        CheckpointError: missing or damaged.
    """
    tensors = load_base(path)
    return len(time_states(tensors)) == len(tensors)


def merge_state(base_model: str | Path, state: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> str:
    """Write base + tuned state to `output`, as the `rwkv` package loads it; a state in the base is replaced.

    Args:
        base_model: `.pth` the state was trained on.
        state: `.pth` of a run with `--train_type state`.
        output: `.pth` to write, whole or not at all.
        dtype: of the stored tensors; None keeps each tensor's own.
    Returns:
        What was done, in words.
    Raises:
        CheckpointError: a file is damaged, their shapes differ, or the output would overwrite one.
    """
    _check_output(output, base_model, state)
    base, tuned = load_base(base_model), load_base(state)
    shape = shape_of(base, base_model)
    size = torch.Size((shape.n_head, shape.head_size, shape.head_size))
    names = [f"blocks.{layer}.att.time_state" for layer in range(shape.n_layer)]
    check_keys(dict.fromkeys(names, size), tuned, state, what=f"model's states ({base_model})")
    merged: dict[str, Tensor] = {}
    for key, tensor in base.items():
        merged[key] = tensor
        parent, _, child = key.rpartition(".")
        if child == "time_faaaa":  # the state's place among a block's parameters
            merged[f"{parent}.time_state"] = tuned[f"{parent}.time_state"]
    merged |= tuned  # where the base had some, after time_faaaa
    save_base({key: tensor.to(dtype or tensor.dtype) for key, tensor in merged.items()}, output)
    return f"merged the states of {len(names)} layers, {size.numel() * len(names):,} numbers"


def _check_output(output: str | Path, base_model: str | Path, adapter: str | Path) -> None:
    for source, name in ((base_model, "base model"), (adapter, "adapter")):
        if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
            raise CheckpointError(str(output), f"would overwrite the {name}", hint="Choose another --output.")


def _check_mergeable(loaded: Loaded, adapter: str | Path, onto: str) -> None:
    info = loaded.info
    if not method_of(info.method).mergeable:
        what = f"method {info.method} changes more than matrices, so it cannot be merged into them"
        raise CheckpointError(str(adapter), what, hint="Use it unmerged: demo/chat.py --adapter.")
    if onto == "quantised" and info.quant == "none":
        raise CheckpointError(str(adapter), "was not trained on a quantised base", hint="Leave --onto away.")


@torch.no_grad()
def probe(base_model: str | Path, adapter: str | Path, merged: str | Path) -> float:
    """||a - b|| / ||a|| of the logits a of the model as it was trained and b of the merged one, on 64 fixed tokens."""
    trained = load_with_adapter(base_model, adapter, as_trained=True).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, trained.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    logits = trained(ids)[0].float()
    del trained  # one model in memory at a time
    return float((load_plain(merged)(ids)[0].float() - logits).norm() / logits.norm())


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
        quantised = isinstance(layer.weight, QuantizedWeight)
        full = layer.effective_weight() if quantised else layer.merged_weight(tensor)
        merged[key] = full.to(stored_dtype)
        sums.add(tensor, full, merged[key])
    return merged, sums
