"""The PEFT methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rwkv_peft.errors import ConfigError, nearest
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.bone import BoneConfig, BoneLinear
from rwkv_peft.peft.lora import LoraConfig, LoraLinear


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Options of `--peft none`: there are none."""


METHODS: Mapping[str, tuple[type, type[PeftLinear] | None]] = {
    "none": (FullConfig, None),
    "bone": (BoneConfig, BoneLinear),
    "lora": (LoraConfig, LoraLinear),
}
"""Name -> (options, layer). A method without a layer trains the base weights themselves."""


def layer_class(method: str) -> type[PeftLinear] | None:
    """The layer that replaces `nn.Linear`; None for full fine-tuning."""
    return _entry(method)[1]


def method_config(method: str, options: Mapping[str, Any]) -> Any:
    """The method's config from the user's options, with older spellings understood.

    `bone_r` means `r`, `lora_alpha` means `alpha`, and so on.

    Raises:
        ConfigError: unknown method, unknown key (names the nearest), or a value of the wrong type.
    """
    config_class = _entry(method)[0]
    flag = f"{method}_config"
    rename = getattr(config_class, "older_spellings", dict)
    known = {spec.name: spec for spec in fields(config_class)}
    values: dict[str, Any] = {}
    for key, value in _strip_prefix(flag, method, rename(options)).items():
        if key not in known:
            expected = ", ".join(known) or "no options"
            raise ConfigError(flag, key, what="unknown key", expected=expected, hint=nearest(key, known))
        default = known[key].default
        kind = type(default)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ConfigError(flag, key, found=repr(value), expected=f"a value like {default!r}")
        values[key] = kind(value)
    return config_class(**values)


def _strip_prefix(flag: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key.removeprefix(f"{method}_"): value for key, value in options.items()}
    if len(plain) < len(options):
        raise ConfigError(flag, what="says one thing twice", found=", ".join(options))
    return plain


def _entry(method: str) -> tuple[type, type[PeftLinear] | None]:
    if method not in METHODS:
        expected = ", ".join(METHODS)
        raise ConfigError("peft", what="unknown method", found=method, expected=expected, hint=nearest(method, METHODS))
    return METHODS[method]
