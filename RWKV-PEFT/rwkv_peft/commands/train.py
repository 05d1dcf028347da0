"""Fine-tune RWKV-6: `rwkv-peft train`, and train.py in a clone."""

from __future__ import annotations

from collections.abc import Sequence

from rwkv_peft.commands.starter import with_starter
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.run_config import config_from_settings, settings_from_argv, uses_starter


def main(argv: Sequence[str]) -> None:
    """Train as the flags say. Without a model and data, use the small starter model (commands/starter.py)."""
    settings = settings_from_argv(argv)
    if uses_starter(settings):
        _check(config_from_settings(settings))  # report a mistake before the starter model is made
        settings = with_starter(settings)
    config = config_from_settings(settings)
    # Imported late: --help and wrong flags do not wait for torch.
    from rwkv_peft.training.distributed.launch import leave_group
    from rwkv_peft.training.run import train

    train(config)
    leave_group()


def _check(config: RunConfig) -> None:
    """Raise UserError if a file, a folder or a package that the flags name is missing."""
    from rwkv_peft.training.run import check_files

    check_files(config)
