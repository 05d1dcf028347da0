"""The methods with the options they are tested with. A new method, or a variant of one, is one more line.

A method with layers that compute one matrix also needs its definition in `definitions.MATRICES`.
"""

from __future__ import annotations

# group takes g=8, which divides the number of blocks of every tested shape at r=16. On a width of 224 neither g nor
# the number of blocks in a row divides the other: the general form.
CASES: list[tuple[str, dict]] = [
    ("bone", {"r": 16, "mode": "row"}),
    ("bone", {"r": 16, "mode": "col"}),
    ("bone", {"r": 16, "mode": "left"}),
    ("bone", {"r": 16, "mode": "group", "g": 8}),
    ("bone", {"r": 16, "mode": "unconstrained"}),
    ("bone", {"r": 16, "mode": "hadamard"}),
    ("miss", {"r": 16}),
    ("lora", {"r": 4, "alpha": 8.0}),
    ("lora", {"r": 4, "alpha": 8.0, "dropout": 0.1, "lr_ratio": 16.0}),
    ("dora", {"r": 4, "alpha": 8.0}),
    ("pissa", {"r": 4, "svd_niter": 4}),
    ("olora", {"r": 4}),
    ("lora_ga", {"r": 4, "alpha": 8.0}),
    ("adapter", {"r": 8}),
]
"""Methods with layers."""

VARIANTS: list[tuple[str, dict]] = [
    ("bone", {"r": 16, "mode": "group", "g": 4}),
    ("lora", {"r": 4, "alpha": 8.0, "rslora": True}),
    ("pissa", {"r": 4, "svd_niter": 0}),
]
"""Options that change what a layer computes and nothing else: only the tests of single layers take them."""

MODEL_CASES: list[tuple[str, dict]] = [
    ("prompt", {"tokens": 5}),
    ("lisa", {"layers": 1, "interval": 2}),
    ("none", {}),
]
"""Methods without layers."""
