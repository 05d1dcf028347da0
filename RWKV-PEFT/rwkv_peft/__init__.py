"""RWKV-6 fine-tuning with Bone (Block Affine) and other PEFT methods.

The functions below are the Python API, described in docs/api.md. They are imported on first use: importing the package
alone is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_API = {
    "generate": "rwkv_peft.inference.text",
    "inject": "rwkv_peft.peft.injection",
    "load": "rwkv_peft.inference.text",
    "merge": "rwkv_peft.export.merge",
    "train": "rwkv_peft.training.run",
    "RunResult": "rwkv_peft.training.run",
}
"""Name: the module that defines it."""

__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    """Import a function of the Python API on first use (PEP 562)."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_API[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
