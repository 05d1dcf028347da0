"""The states of a process's random generators, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch (and of the CUDA device, if any), numpy and Python."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (other libraries draw from it)
    version, words, gauss = random.getstate()
    return {
        "torch": _text(torch.get_rng_state()),
        "device": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned. A device's generator is not changed if the state has none for it."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["device"]), device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
