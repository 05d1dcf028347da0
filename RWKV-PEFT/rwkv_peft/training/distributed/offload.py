"""The optimizer of the offload strategies, which runs on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from rwkv_peft.console import say
from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.build import first_errors, missing_compiler, ninja_on_path, only_builder

OPERATOR = "cpu_adam"
"""DeepSpeed's name for it, and that of its build folder."""


def cpu_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPUs (decoupled weight decay), which it compiles at first use.

    ZeRO-Offload takes no other: torch's would hold its state where the gradients are.

    Args:
        groups: as of torch.optim.AdamW.
        options: lr, betas, eps, as of torch.optim.AdamW.
    Raises:
        ConfigError: it cannot be built here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # not above: it takes seconds, and most runs do without

    folder = Path(cpp_extension._get_build_directory(OPERATOR, verbose=False))
    is_built = (folder / f"{OPERATOR}.so").exists()
    if not is_built and (reason := missing_compiler()):
        raise _cannot(reason)
    try:
        with only_builder(folder), ninja_on_path():
            if not is_built:
                say("note: building DeepSpeed's CPU Adam (about a minute, once)")
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except (RuntimeError, OSError) as error:
        raise _cannot(first_errors(_messages(error))) from error


def _cannot(reason: str) -> ConfigError:
    return ConfigError(
        "strategy",
        what="offload needs DeepSpeed's CPU Adam, which could not be built here",
        found=reason,
        hint="Mend that, or use the same stage without _offload. --debug shows more.",
    )


def _messages(error: BaseException) -> str:
    """Of an exception and of those it came from."""
    cause = "" if error.__cause__ is None else _messages(error.__cause__)
    return f"{error}\n{cause}"
