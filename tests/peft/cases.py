"""Every registered method with the options it is tested with; a new method or variant is one more line."""

from __future__ import annotations

# Matrices for group: 4 and 8 divide the blocks of every tested shape at r=16. On a width of 64 they are once and twice
# the blocks of a row (I/r), on a width of 224 neither divides the other: the general form.
CASES: list[tuple[str, dict]] = [
    ("bone", {"r": 16, "mode": "row"}),
    ("bone", {"r": 16, "mode": "col"}),
    ("bone", {"r": 16, "mode": "left"}),
    ("bone", {"r": 16, "mode": "group", "g": 4}),
    ("bone", {"r": 16, "mode": "group", "g": 8}),
    ("bone", {"r": 16, "mode": "unconstrained"}),
    ("bone", {"r": 16, "mode": "hadamard"}),
    ("miss", {"r": 16}),
    ("lora", {"r": 4, "alpha": 8.0}),
    ("lora", {"r": 4, "alpha": 8.0, "dropout": 0.1, "lr_ratio": 16.0}),
    ("lora", {"r": 4, "alpha": 8.0, "rslora": True}),
    ("dora", {"r": 4, "alpha": 8.0}),
    ("pissa", {"r": 4, "svd_niter": 0}),
    ("pissa", {"r": 4, "svd_niter": 4}),
    ("olora", {"r": 4}),
    ("lora_ga", {"r": 4, "alpha": 8.0}),
    ("adapter", {"r": 8}),
]
"""Methods with layers."""

MODEL_CASES: list[tuple[str, dict]] = [
    ("prompt", {"tokens": 5}),
    ("lisa", {"layers": 1, "interval": 2}),
    ("none", {}),
]
"""Methods without."""
