"""The PEFT methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from rwkv_peft.errors import ConfigError, nearest
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.methods.adapter import AdapterConfig, AdapterLinear
from rwkv_peft.peft.methods.bone import BoneConfig, BoneLinear
from rwkv_peft.peft.methods.dora import DoraConfig, DoraLinear
from rwkv_peft.peft.methods.lisa import LisaConfig
from rwkv_peft.peft.methods.lora import LoraConfig, LoraLinear
from rwkv_peft.peft.methods.lora_ga import LoraGaConfig, LoraGaLinear
from rwkv_peft.peft.methods.miss import MissConfig, MissLinear
from rwkv_peft.peft.methods.olora import OloraConfig, OloraLinear
from rwkv_peft.peft.methods.pissa import PissaConfig, PissaLinear
from rwkv_peft.peft.methods.prompt import PromptConfig, add_prompt


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Options of `--peft none`: there are none."""


@dataclass(frozen=True)
class Method:
    """One PEFT method: layers, or something added to the model, or neither, where the base itself trains."""

    config: type
    """Its options."""
    layer: type[PeftLinear] | None = None
    """Takes the place of the targeted layers."""
    add: Callable[..., None] | None = None
    """Adds a parameter to the model."""

    @property
    def trains_base(self) -> bool:
        return self.layer is None and self.add is None

    @property
    def mergeable(self) -> bool:
        """Whether an adapter of this method is a change of the base's own matrices."""
        return self.layer is not None and self.layer.mergeable


METHODS: Mapping[str, Method] = {
    "none": Method(FullConfig),
    "bone": Method(BoneConfig, BoneLinear),
    "miss": Method(MissConfig, MissLinear),
    "lora": Method(LoraConfig, LoraLinear),
    "dora": Method(DoraConfig, DoraLinear),
    "pissa": Method(PissaConfig, PissaLinear),
    "olora": Method(OloraConfig, OloraLinear),
    "lora_ga": Method(LoraGaConfig, LoraGaLinear),
    "adapter": Method(AdapterConfig, AdapterLinear),
    "prompt": Method(PromptConfig, add=add_prompt),
    "lisa": Method(LisaConfig),
}


def method_of(name: str) -> Method:
    """Raises ConfigError for an unknown method; names the nearest."""
    if name not in METHODS:
        expected = ", ".join(METHODS)
        raise ConfigError("peft", what="unknown method", found=name, expected=expected, hint=nearest(name, METHODS))
    return METHODS[name]


def canonical(method: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Method and options in our own words.

    Later RWKV-PEFT calls row `"bone_mode":"bat"` and MiSS `"bone_mode":"bone"`, and both disha; its disha without a
    mode is MiSS. Hugging Face calls col `"init_weights":"bat"`. `bone_r` means `r`, `lora_alpha` means `alpha`.
    """
    options = dict(options)
    if options.get("bone_mode") == "bat":
        options["bone_mode"] = "row"
    options = _strip_prefix(method, options)
    if method == "pissa" and options.get("init") == "":
        del options["init"]  # RWKV-PEFT's second file, where it has none
    if method == "disha":
        mode = options.get("mode", "bone")
        method, options["mode"] = "bone", "row" if mode == "bat" else mode
    if method == "bone" and "init_weights" in options:
        if (init := options.pop("init_weights")) != "bat" or "mode" in options:
            raise ConfigError("bone_config", "init_weights", found=init, expected="bat, or mode instead")
        options["mode"] = "col"
    if method == "bone" and options.get("mode") == "bone":
        del options["mode"]
        return "miss", options
    return method, options


def method_config(method: str, options: Mapping[str, Any]) -> Any:
    """The method's config from options as `canonical` gives them.

    Raises:
        ConfigError: unknown method, unknown key (names the nearest), or a value of the wrong type.
    """
    config_class = method_of(method).config
    known = {spec.name: spec for spec in fields(config_class)}
    flag = f"{method}_config"
    for key, value in options.items():
        if key not in known:
            expected = ", ".join(known) or "no options"
            raise ConfigError(flag, key, what="unknown key", expected=expected, hint=nearest(key, known))
        if not _fits(value, _default(known[key])):
            raise ConfigError(flag, key, found=repr(value), expected=f"a value like {_default(known[key])!r}")
    return config_class(**{key: type(_default(known[key]))(value) for key, value in options.items()})


def _default(spec: Field) -> Any:
    return spec.default_factory() if spec.default is MISSING else spec.default


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and value in (True, False)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def _strip_prefix(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key.removeprefix(f"{method}_"): value for key, value in options.items()}
    if len(plain) < len(options):
        raise ConfigError(f"{method}_config", what="says one thing twice", found=", ".join(options))
    return plain
