"""From plain settings, such as flags, to a typed RunConfig: the steps that need to know the methods.

Nothing here imports torch before it is needed, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rwkv_peft.config.flags import note_unused, parse_flags
from rwkv_peft.config.sections import DataConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from rwkv_peft.console import note


def config_from_argv(argv: Sequence[str]) -> RunConfig:
    """Return the configuration of a command line. The model's shape may be open; `train` reads it from the base model.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    return config_from_settings(settings_from_argv(argv))


def settings_from_argv(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a command line and its `--config` file, by flag name; defaults are absent.

    Prints a note for flags that have no effect.

    Raises:
        UserError: an unknown flag, an invalid value, bad JSON or bad YAML.
    """
    flags, settings = parse_flags(argv)
    is_pair = settings.get("data_type", "binidx") == "binidx"
    if "data_type" not in flags and is_pair and _is_text_data(flags.get("data_file", ())):
        note(f"--data_file {' '.join(flags['data_file'])} is read as --data_type jsonl")
        settings["data_type"] = "jsonl"
    note_unused(flags, settings)
    return settings


def config_from_settings(settings: Mapping[str, Any]) -> RunConfig:
    """Check settings as far as that is possible without opening a file, and return them typed.

    Raises:
        ConfigError: a value out of range, an unknown method, a bad option.
    """
    from rwkv_peft.peft.registry import import_method, method_config

    def section(cls: type, **more: Any) -> Any:
        return cls(**{spec.name: settings[spec.name] for spec in fields(cls) if spec.name in settings}, **more)

    name = settings.get("peft", "none")
    import_method(name)
    return RunConfig(
        model=section(ModelConfig),
        peft=section(PeftConfig, method=method_config(name, settings.get("peft_config", {}))),
        data=section(DataConfig),
        optim=section(OptimConfig),
        train=section(TrainConfig),
    )


def uses_starter(settings: Mapping[str, Any]) -> bool:
    """Return whether neither a model, nor data, nor a shape is given, so that the starter model is used."""
    shape = any(settings.get(spec.name) for spec in fields(ModelConfig))
    return not (settings.get("load_model") or settings.get("data_file") or shape)


def _is_text_data(words: Sequence[str]) -> bool:
    """Return whether `--data_file` names files of JSON or text only, and not binidx pairs."""
    from rwkv_peft.data.convert.sources import is_text_data

    paths = [path for path, _ in DataConfig(data_file=tuple(words)).sources]
    return bool(paths) and all(map(is_text_data, paths))
