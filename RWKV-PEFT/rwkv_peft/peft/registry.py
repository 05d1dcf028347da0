"""The PEFT methods by name: those of this package, and modules of the user's own.

Each method is a module with a `METHOD`. This package's are in `peft/methods/`, and `METHODS` lists their names. Any
other name is the import path of a module, which only `import_method` imports: a file's content never does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rwkv_peft.config.method import METHODS, FullConfig, MethodConfig, flag_of
from rwkv_peft.config.spellings import METHOD_FLAGS, canonical
from rwkv_peft.errors import ConfigError, nearest
from rwkv_peft.peft.base import Method

FULL = Method(config=FullConfig)
"""Full fine-tuning: `--peft none`."""


def method_named(name: str) -> Method:
    """Return the method with this name; a module of the user's must already be imported.

    Raises:
        ConfigError: there is no such method, or its module has not been imported.
    """
    if name == "none":
        return FULL
    if name in METHODS:
        return importlib.import_module(f"rwkv_peft.peft.methods.{name}").METHOD
    if name in sys.modules:
        return _method_of_module(name)
    hint = nearest(name, METHODS)
    raise ConfigError("peft", what="unknown method", found=name, expected=", ".join(METHODS), hint=hint)


def is_available(name: str) -> bool:
    """Return whether the method is part of this package or a module that has been imported."""
    return name in METHODS or name in sys.modules


def method_of(config: MethodConfig) -> Method:
    """Return the method that a config belongs to."""
    return method_named(config.name)


def import_method(name: str) -> None:
    """Import the module that `--peft my_package.my_method` names; does nothing for this package's methods.

    Raises:
        ConfigError: there is no such module, or it has no METHOD.
    """
    if name in METHODS or name in METHOD_FLAGS.values():
        return
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError("peft", what=f"the module {name} cannot be imported ({error})") from error
        if "." in name:
            hint = "Set PYTHONPATH to the folder that contains it."
            raise ConfigError("peft", what=f"module {error.name} not found", hint=hint) from error
        method_named(name)  # raises: probably a misspelled name
    except ImportError as error:
        raise ConfigError("peft", what=f"the module {name} cannot be imported ({error})") from error
    _method_of_module(name)


def method_config(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """Return a method's options, typed and checked, from their plain form; other spellings are understood.

    Raises:
        ConfigError: an unknown method, an unknown option, or an invalid value.
    """
    name, options = canonical(name, options)
    config = method_named(name).config
    known = [spec.name for spec in fields(config)]
    for key in options:
        if key not in known:
            expected = ", ".join(known) or "no options"
            raise ConfigError(flag_of(name), key, what="unknown option", expected=expected, hint=nearest(key, known))
    return config(**options)


def _method_of_module(name: str) -> Method:
    method = getattr(sys.modules[name], "METHOD", None)
    if not isinstance(method, Method):
        found = "none" if method is None else repr(method)
        expected = "METHOD = Method(config=..., layer=...) at the end of the module"
        raise ConfigError("peft", what=f"the module {name} has no METHOD", found=found, expected=expected)
    if method.config.name != name:
        what = f"the config class of module {name} has another name"
        raise ConfigError("peft", what=what, found=repr(method.config.name), expected="name = __name__")
    return method
