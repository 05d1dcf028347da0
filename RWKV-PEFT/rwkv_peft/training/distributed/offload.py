"""The optimizer of the offload strategies, which runs on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from rwkv_peft.console import note
from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.build import first_errors, missing_compiler, ninja_on_path, only_builder

OPERATOR = "cpu_adam"
"""DeepSpeed's name of the operator and of its build folder."""


def cpu_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW for CPUs (decoupled weight decay), which DeepSpeed compiles on first use.

    ZeRO-Offload needs this one: torch's AdamW would keep its state on the device of the gradients.

    Args:
        groups: as for torch.optim.AdamW.
        options: lr, betas, eps, as for torch.optim.AdamW.
    Raises:
        ConfigError: it cannot be compiled.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # not at the top: it takes seconds, and most runs do not need it

    folder = Path(cpp_extension._get_build_directory(OPERATOR, verbose=False))
    is_built = (folder / f"{OPERATOR}.so").exists()
    if not is_built and (reason := missing_compiler()):
        raise _cannot(reason)
    try:
        with only_builder(folder), ninja_on_path():
            if not is_built:
                note("building DeepSpeed's CPU Adam (about a minute, once)")
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except (RuntimeError, OSError) as error:
        raise _cannot(first_errors(_messages(error))) from error


def _cannot(reason: str) -> ConfigError:
    return ConfigError(
        "strategy",
        what="offload needs DeepSpeed's CPU Adam, which could not be compiled",
        found=reason,
        hint="Fix that, or use the same stage without _offload. --debug shows more.",
    )


def _messages(error: BaseException) -> str:
    """Return the messages of an exception and its causes."""
    cause = "" if error.__cause__ is None else _messages(error.__cause__)
    return f"{error}\n{cause}"
