"""A run's `config.yaml`: writing it, and reading it or a flat file of flag names."""

from __future__ import annotations

import argparse
import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml

from rwkv_peft.config.field_types import describe, field_types, text_converter
from rwkv_peft.config.sections import SECTIONS, PeftConfig, RunConfig
from rwkv_peft.errors import ConfigError, UserError

FORMAT_VERSION = 1
"""Version of the format of config.yaml. A file without a version has version 1 too."""


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a `config.yaml`, or a flat file with flag names as its keys.

    Returns:
        The settings of the sections, by flag name and of the flags' types; and the entries outside of sections, as YAML
        gives them.
    Raises:
        UserError: no such file, not YAML, written by a newer version, or a key or value that does not fit.
    """
    if not path.is_file():
        raise ConfigError("config", what=f"{'a folder' if path.is_dir() else 'no such file'} {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}", f"not valid YAML: {(error.problem or '').split(', but ')[0]}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        expected = f"the sections {', '.join(SECTIONS)}, or flag names"
        raise ConfigError("config", what=f"{path} has no keys", expected=expected)
    _check_version(content.pop("format_version", FORMAT_VERSION), path)
    settings, flat = {}, {}
    for key, value in content.items():
        if key in SECTIONS and isinstance(value, dict | None):
            settings |= _read_section(key, value or {})
        else:
            flat[str(key)] = value
    return settings, flat


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved config; `--config` reads it back to the same run."""
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}))  # tuples become lists
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _check_version(version: Any, path: Path) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(
            "config",
            what=f"{path} was written by a newer version of this program",
            found=f"format_version {version!r}",
            expected=f"at most {FORMAT_VERSION}",
            hint="Update the program.",
        )


def _read_section(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one section, by flag name."""
    kinds, owner = _key_types(name), SECTIONS[name]
    paths = {spec.name for spec in fields(owner) if spec.metadata.get("paths")}
    for key in values:
        if key not in kinds:
            raise ConfigError("config", f"{name}.{key}", what="unknown key", hint=_nearest_key(str(key)))
    return {key: _from_yaml(key, kinds[key], value, is_path=key in paths) for key, value in values.items()}


def _key_types(section: str) -> dict[str, Any]:
    """Return the keys of a section, and their types."""
    kinds = dict(field_types(SECTIONS[section]))
    if SECTIONS[section] is PeftConfig:
        del kinds["method"]
        kinds = {"peft": str, "peft_config": Mapping[str, Any], **kinds}
    return kinds


def _nearest_key(key: str) -> str | None:
    """Return a hint that suggests the most similar key of all sections; None if none is similar."""
    sections = {known: name for name in SECTIONS for known in _key_types(name)}
    longer = [known for known in sections if known.startswith(f"{key}_")]  # lr: lr_init
    close = longer or difflib.get_close_matches(key, sections, n=1, cutoff=0.5)
    return f"Did you mean {sections[close[0]]}.{close[0]}?" if close else None


def _from_yaml(key: str, kind: Any, value: Any, *, is_path: bool) -> Any:
    """Return a YAML value as the field's type."""
    origin = typing.get_origin(kind)
    if origin is tuple or origin not in (None, Literal):
        plain = list if origin is tuple else dict
        if is_path and isinstance(value, str):
            value = [value] if value else []  # one path, as earlier versions wrote it
        if not isinstance(value, plain | None):
            raise ConfigError("config", key, found=repr(value), expected=f"a YAML {plain.__name__}")
        return tuple(str(item) for item in value or ()) if origin is tuple else dict(value or {})
    if value is None:
        raise ConfigError("config", key, found="nothing", expected=describe(kind))
    choices = typing.get_args(kind)
    try:
        converted = text_converter(kind)(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError("config", key, found=value, expected=describe(kind)) from error
    if choices and converted not in choices:
        raise ConfigError("config", key, found=value, expected=describe(kind))
    return converted
