"""The definitions of the methods, written out without the package's own code, and layers to compare with them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.registry import method_config, method_named
from tests.peft.cases import CASES

SHAPES = [(96, 64), (64, 224), (64, 64)]
"""(O, I)"""


def name_of(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *(f"{key}{value}" for key, value in case[1].items() if key not in ("r", "alpha"))])


def is_mergeable(case: tuple[str, dict]) -> bool:
    return method_named(case[0]).config.mergeable


def goes_onto_embeddings(case: tuple[str, dict]) -> bool:
    method, options = case
    return method_named(method).layer.supports_embedding(method_config(method, options))


MERGEABLE = [case for case in CASES if is_mergeable(case)]


def bone_delta(weight: Tensor, bone: Tensor, mode: str) -> Tensor:
    """dW (O, I) of arXiv 2409.15371v1 with two loops; a counts blocks of output rows, b blocks of input columns.

    Args:
        weight: W (O, I).
        bone: row, hadamard (I/r, r, r); col, left (O/r, r, r); group (g, r, r); unconstrained (2, I/r, r, r).
        mode: the mode of `BoneConfig`.
    """
    r = bone.shape[-1]
    count = weight.shape[1] // r
    rows = []
    for a in range(weight.shape[0] // r):
        row = []
        for b in range(count):
            block = weight[a * r : a * r + r, b * r : b * r + r]
            if mode == "left":
                row.append(bone[a].T @ block + bone[a].T)
            elif mode == "unconstrained":
                row.append(block @ bone[0, b] + bone[1, b])
            elif mode == "hadamard":
                row.append(block * bone[b] + bone[b])
            else:
                matrix = {"row": b, "col": a, "group": (a * count + b) % bone.shape[0]}[mode]
                row.append(block @ bone[matrix] + bone[matrix])
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


Tensors = dict[str, Tensor]


def bone_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    return weight + bone_delta(weight, p["bone"], options.get("mode", "row"))


def miss_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    return weight + torch.cat([p["miss"].T] * (weight.shape[1] // options["r"]), 1)


def lora_update(options: dict, p: Tensors) -> Tensor:
    r = options["r"]
    return options["alpha"] / (math.sqrt(r) if options.get("rslora") else r) * (p["lora_B"] @ p["lora_A"])


def lora_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    return weight + lora_update(options, p)


def dora_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    direction = weight + lora_update(options, p)
    lengths = (direction.detach() ** 2).sum(1, keepdim=True).sqrt()
    return p["lora_magnitude"][:, None] * direction / lengths


def residual_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    """W - B0 A0 + B A, as PiSSA and OLoRA start from the weight's own factors."""
    return weight - start["lora_B"] @ start["lora_A"] + p["lora_B"] @ p["lora_A"]


def lora_ga_matrix(options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    options = {"rslora": True} | options
    return weight - lora_update(options, start) + lora_update(options, p)


MATRICES = {
    "bone": bone_matrix,
    "miss": miss_matrix,
    "lora": lora_matrix,
    "dora": dora_matrix,
    "pissa": residual_matrix,
    "olora": residual_matrix,
    "lora_ga": lora_ga_matrix,
}
"""The one matrix (O, I) of each method, from its options, the base's original weight, the trained parameters, and the
values that these began with."""


def adapter_output(options: dict, h: Tensor, p: Tensors) -> Tensor:
    """(..., O) -> (..., O): the small network on the layer's output h, with gelu written out."""
    inner = F.linear(h, p["adapter_down"], p["adapter_down_bias"])
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return h + F.linear(inner, p["adapter_up"], p["adapter_up_bias"])


OUTPUTS = {"adapter": adapter_output}
"""For methods that are no matrix: the output, from the options, the base layer's output and the trained parameters."""


def matrix(method: str, options: dict, weight: Tensor, p: Tensors, start: Tensors) -> Tensor:
    """The one matrix (O, I) that a method computes with, by its definition."""
    return MATRICES[method](options, weight, p, start)


def output(
    method: str, options: dict, x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensors, start: Tensors
) -> Tensor:
    """(..., I) -> (..., O) by the definition."""
    if method in OUTPUTS:
        return OUTPUTS[method](options, F.linear(x, weight, bias), p)
    return F.linear(x, matrix(method, options, weight, p, start), bias)


def trained_of(layer: PeftLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in layer.adapter_names}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def make_linear(shape: tuple[int, int], *, bias: bool = False, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)


def make_layer(
    method: str, options: dict, base: nn.Linear | nn.Embedding, dtype: torch.dtype | None = None
) -> PeftLinear:
    """A layer as `inject` makes it, of any dtype; its weight is a copy, so that base keeps the original."""
    layer = method_named(method).layer(base, method_config(method, options), dtype or base.weight.dtype)
    layer.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    torch.manual_seed(2)
    layer.initialize(gradient_like(base.weight))
    layer.derive_base()
    return layer


def gradient_like(weight: Tensor) -> Tensor:
    """Something for methods that start from the weight's gradient."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The same for every linear layer and embedding of a model."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    return {name: gradient_like(m.weight) for name, m in modules.items()}


@torch.no_grad()
def train_a_little(module: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """Add noise to every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)


def loss_and_gradients(model: RWKV6, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training loss of a batch, and the gradients of the trainable parameters by name."""
    hidden, _ = model.hidden(ids[:, :-1])
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask
    loss = model.loss(hidden, ids[:, 1:], mask)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def tokens(batch: int = 2, length: int = 19, vocab_size: int = 80) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))
