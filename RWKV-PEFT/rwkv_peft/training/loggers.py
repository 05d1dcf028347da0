"""Where metrics go beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from rwkv_peft.config import RunConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.callbacks import StepMetrics


def wandb_logger(project: str, config: RunConfig) -> Callable[[StepMetrics], None]:
    """A consumer of step metrics that logs to Weights & Biases.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "wandb", what="the package wandb is not installed", hint="pip install wandb, or leave the flag away."
        ) from None
    wandb.init(project=project, config=asdict(config))
    return lambda metrics: wandb.log(asdict(metrics), step=metrics.step)
