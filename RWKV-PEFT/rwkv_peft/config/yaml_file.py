"""A run's `config.yaml`, and how a field's text becomes its value, on the command line and there."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from rwkv_peft.config.sections import SECTIONS, RunConfig
from rwkv_peft.errors import ConfigError, nearest


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a `config.yaml`: sections as in RunConfig, each a mapping of fields."""
    if not path.is_file():
        raise ConfigError("config", what=f"{'a folder' if path.is_dir() else 'no such file'} {path}")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", what=f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict):
        raise ConfigError("config", what=f"{path} is not a config", expected=f"sections {', '.join(SECTIONS)}")
    settings: dict[str, Any] = {}
    for name, values in sections.items():
        if name not in SECTIONS or not isinstance(values, dict | None):
            what = f"{path}: {name!r} is not a section of settings"
            raise ConfigError("config", what=what, expected=f"mappings {', '.join(SECTIONS)}")
        specs = {spec.name: spec for spec in fields(SECTIONS[name])}
        for key, value in (values or {}).items():
            if key not in specs:
                raise ConfigError("config", f"{name}.{key}", what="unknown key", hint=nearest(str(key), specs))
            settings[key] = _from_yaml(SECTIONS[name], specs[key], value)
    return settings


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved config; `--config` reads it back to the same run."""
    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _from_yaml(owner: type, spec: Field, value: Any) -> Any:
    kind = typing.get_type_hints(owner)[spec.name]
    origin = typing.get_origin(kind)
    if origin is tuple or origin not in (None, Literal):
        plain = list if origin is tuple else dict
        if spec.metadata.get("paths") and isinstance(value, str):
            value = [value] if value else []  # one path, as earlier versions wrote it
        if not isinstance(value, plain | None):
            raise ConfigError("config", spec.name, found=repr(value), expected=f"a YAML {plain.__name__}")
        return tuple(str(item) for item in value or ()) if origin is tuple else dict(value or {})
    if value is None:
        raise ConfigError("config", spec.name, found="nothing", expected=type_name(kind))
    choices = typing.get_args(kind)
    try:
        converted = converter(kind)(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError("config", spec.name, found=value, expected=type_name(kind)) from error
    if choices and converted not in choices:
        raise ConfigError("config", spec.name, found=value, expected=" | ".join(map(str, choices)))
    return converted


def converter(kind: Any) -> Callable[[str], Any]:
    """What turns a field's text into its value; raises ValueError or ArgumentTypeError on bad text."""
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])
    if kind is bool:
        return _parse_bool
    return kind


def _parse_bool(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 1 or 0")
    return values[text.lower()]


def type_name(kind: Any) -> str:
    """How help texts and errors call a field's type."""
    if typing.get_origin(kind) is tuple:
        return "NAME"
    return {int: "N", float: "X", str: "TEXT", bool: "0|1"}.get(kind, "JSON")
