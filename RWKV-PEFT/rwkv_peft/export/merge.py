"""Merge an adapter into its base model: one `.pth` file that any RWKV-6 program loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.adapted_model import Loaded, load_plain, load_with_adapter
from rwkv_peft.base_model import check_keys, load_base, save_base, shape_of, time_states
from rwkv_peft.config.method import MethodConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.adapter_file import refuse_base_model
from rwkv_peft.peft.injection import peft_layers
from rwkv_peft.peft.quantization import QuantizedWeight
from rwkv_peft.peft.registry import method_named

PROBE_TOKENS = 64
"""Length of the token sequence on which a merged model is compared with the trained one."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed, and how exactly the stored weights represent the update dW."""

    method: str
    layers: int
    """Number of layers with an adapter."""
    replaced: int
    """Number of other parameters of the base model that were trained, and are replaced."""
    relative_size: float
    """||dW|| / ||W||, over all merged layers."""
    kept: float
    """Share of dW that is left after rounding to the stored dtype: <stored - W, dW> / ||dW||^2. 1 is all of it; bf16
    rounds small updates away."""
    dtype: torch.dtype
    """Dtype of the stored matrices."""
    probe: float | None
    """Relative difference between the logits of the merged and the trained model; None unless --quant was used."""

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers ({self.method}), {self.replaced} other parameters replaced\n"
            f"|dW|/|W| = {self.relative_size:.2e}; stored as {str(self.dtype).removeprefix('torch.')}; "
            f"{100 * self.kept:.1f} % of the update is kept"
        )
        if self.kept < 0.9:
            text += "\nThe stored dtype rounds a part of the update away. Use --dtype fp32 to keep all of it."
        if self.probe is not None:
            text += f"\nlogits differ by {100 * self.probe:.2f} % from the trained model (on {PROBE_TOKENS} tokens)"
        return text


def merge(
    base_model: str | Path,
    adapter: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    *,
    onto: str = "original",
    method: MethodConfig | None = None,
) -> MergeReport:
    """Merge an adapter into its base model, and write the result to a `.pth` file.

    W + dW is computed in fp32 and rounded once. The keys keep the order of the base file.

    Example:
        >>> print(rwkv_peft.merge("base.pth", "out/rwkv-0.safetensors", "merged.pth"))

    Args:
        base_model: `.pth` file that the adapter was trained on.
        adapter: `.safetensors` file of a run; the method, its options and the layers are read from it.
        output: `.pth` file to write. It appears complete or not at all.
        dtype: of the stored tensors; None keeps the dtype of each tensor.
        onto: for an adapter that was trained with --quant. `original`: add the update to the original weights.
            `quantized`: add it to the quantized weights that training used, including their quantization error.
        method: method and options of a `.pth` adapter of RWKV-PEFT, which does not contain them.
    Returns:
        What was merged; `str()` of it is text for the terminal.
    Raises:
        CheckpointError: a file is missing or damaged, the adapter was trained on another base model, the output would
            overwrite an input, the method cannot be merged, or `onto` is `quantized` and the base was not.
    """
    onto = "quantized" if onto == "quantised" else onto
    _check_output(output, base_model, adapter)
    loaded = load_with_adapter(base_model, adapter, as_trained=onto == "quantized", method=method)
    _check_mergeable(loaded, adapter, onto)
    merged, sums = _merge_layers(loaded, dtype)
    save_base(merged, output)
    return MergeReport(
        method=loaded.info.method,
        layers=len(loaded.info.targets),
        replaced=sum(name in loaded.base for name in loaded.trained),
        relative_size=(sums.delta_squared / sums.weight_squared) ** 0.5,
        kept=sums.kept / sums.delta_squared if sums.delta_squared else 1.0,
        dtype=dtype or loaded.base["head.weight"].dtype,
        probe=None if loaded.info.quant == "none" else probe(base_model, adapter, output),
    )


def is_tuned_state(path: str | Path) -> bool:
    """Return whether a `.pth` file is a result of `--train_type state`: it contains initial states and nothing else.

    Raises:
        CheckpointError: the file is missing or damaged, or is a base model.
    """
    tensors = load_base(path)
    refuse_base_model(tensors, path)
    return len(time_states(tensors)) == len(tensors)


def merge_state(base_model: str | Path, state: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> str:
    """Add a tuned initial state to its base model, and write the result to a `.pth` file for the `rwkv` package.

    A state that the base model already has is replaced.

    Args:
        base_model: `.pth` file that the state was trained on.
        state: `.pth` file of a run with `--train_type state`.
        output: `.pth` file to write. It appears complete or not at all.
        dtype: of the stored tensors; None keeps the dtype of each tensor.
    Returns:
        A line for the terminal.
    Raises:
        CheckpointError: a file is missing or damaged, the shapes differ, or the output would overwrite an input.
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
        if child == "time_faaaa":  # where the state belongs among a block's parameters
            merged[f"{parent}.time_state"] = tuned[f"{parent}.time_state"]
    merged |= tuned  # replaces states that the base has after time_faaaa
    save_base({key: tensor.to(dtype or tensor.dtype) for key, tensor in merged.items()}, output)
    return f"merged the initial states of {len(names)} layers ({size.numel() * len(names):,} elements)"


def _check_output(output: str | Path, base_model: str | Path, adapter: str | Path) -> None:
    """Raise CheckpointError if the output is one of the inputs."""
    for source, name in ((base_model, "base model"), (adapter, "adapter")):
        if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
            raise CheckpointError(str(output), f"would overwrite the {name}", hint="Choose another --output.")


def _check_mergeable(loaded: Loaded, adapter: str | Path, onto: str) -> None:
    """Raise CheckpointError if the adapter cannot be merged in this way."""
    info = loaded.info
    if not method_named(info.method).config.mergeable:
        what = f"method {info.method} is not a change of weight matrices, so it cannot be merged"
        raise CheckpointError(
            str(adapter), what, hint="Use it without merging: rwkv-peft chat --model BASE.pth --adapter ADAPTER."
        )
    if onto == "quantized" and info.quant == "none":
        raise CheckpointError(str(adapter), "was not trained on a quantized base model", hint="Omit --onto.")


@torch.no_grad()
def probe(base_model: str | Path, adapter: str | Path, merged: str | Path) -> float:
    """Return ||a - b|| / ||a|| for the logits a of the trained model and b of the merged model, on fixed tokens."""
    trained = load_with_adapter(base_model, adapter, as_trained=True).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, trained.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    logits = trained(ids)[0].float()
    del trained  # only one model in memory at a time
    return float((load_plain(merged)(ids)[0].float() - logits).norm() / logits.norm())


@dataclass
class _Sums:
    """Scalar products, summed over all merged layers, for the MergeReport."""

    weight_squared: float = 0.0
    delta_squared: float = 0.0
    kept: float = 0.0

    def add(self, weight: Tensor, merged: Tensor, stored: Tensor) -> None:
        """Add a layer: its original weight, W + dW in fp32, and what is stored of it."""
        weight = weight.to(merged.dtype)
        delta = merged - weight
        self.weight_squared += float(weight.square().sum())
        self.delta_squared += float(delta.square().sum())
        self.kept += float(((stored.to(merged.dtype) - weight) * delta).sum())


@torch.no_grad()
def _merge_layers(loaded: Loaded, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], _Sums]:
    """Return the merged tensors in the order of the base file, and the sums over the layers with an adapter."""
    layers, merged, sums = peft_layers(loaded.model), {}, _Sums()
    for key, tensor in loaded.base.items():
        stored_dtype = dtype or tensor.dtype
        layer = layers.get(key.removesuffix(".weight"))
        if layer is None:
            merged[key] = loaded.trained.get(key, tensor).to(stored_dtype)
            continue
        quantized = isinstance(layer.weight, QuantizedWeight)
        full = layer.effective_weight() if quantized else layer.merged_weight(tensor)
        merged[key] = full.to(stored_dtype)
        sums.add(tensor, full, merged[key])
    return merged, sums
