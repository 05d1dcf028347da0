"""Types of settings: check values and read text by a dataclass field's annotation.

The annotation is the only place that states a field's type and its choices. Help, validation, YAML and JSON read it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rwkv_peft.errors import ConfigError


@dataclass(frozen=True)
class TypedConfig:
    """A frozen dataclass that checks each field against its annotation, also when it is built in Python.

    A float field also takes an integer, a tuple field also a list. A tuple field with the metadata `paths` also takes
    a single path.
    """

    def __post_init__(self) -> None:
        kinds = field_types(type(self))
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.metadata.get("paths") and isinstance(value, str):
                value = (value,) if value else ()
            try:
                value = as_type(value, kinds[spec.name])
            except TypeError:
                raise self.error(spec.name, found=repr(value), expected=describe(kinds[spec.name])) from None
            object.__setattr__(self, spec.name, value)

    def error(self, key: str, **details: Any) -> ConfigError:
        """Return the error for an invalid value of field `key`; the details are those of ConfigError."""
        return ConfigError(key, **details)

    def require(self, key: str, good: bool, expected: str) -> None:
        """Raise ConfigError unless the field's value is good."""
        if not good:
            raise self.error(key, found=getattr(self, key), expected=expected)


@functools.cache
def field_types(owner: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields, by field name."""
    hints = typing.get_type_hints(owner)
    return {spec.name: hints[spec.name] for spec in fields(owner)}


def as_type(value: Any, kind: Any) -> Any:
    """Return the value as an annotation's type.

    Raises:
        TypeError: the value is of another type, or not one of the choices.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(as_type(item, arguments[0]) for item in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise TypeError
        return {as_type(key, arguments[0]): as_type(item, arguments[1]) for key, item in value.items()}
    if kind is bool and value in (0, 1):
        return bool(value)
    accepted = int | float if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return float(value) if kind is float else value


def describe(kind: Any) -> str:
    """Return what an annotation allows, for an error message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return "a list of names"
    if origin is Mapping:
        return "a JSON object with integer values" if arguments[1] is int else "a JSON object"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind) or f"a {kind.__name__}"


def type_name(kind: Any) -> str:
    """Return the placeholder of a field's value in help texts."""
    if typing.get_origin(kind) is tuple:
        return "NAME"
    return {int: "N", float: "X", str: "TEXT", bool: "0|1"}.get(kind, "JSON")


def text_converter(kind: Any) -> Callable[[str], Any]:
    """Return the function that turns a field's text into its value.

    The function raises ValueError or ArgumentTypeError if the text does not fit.
    """
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])
    return _parse_bool if kind is bool else kind


def _parse_bool(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 1 or 0")
    return values[text.lower()]


@functools.cache
def field_docs(owner: type) -> dict[str, str]:
    """Return the string literal below each field of a dataclass, by field name; inherited fields are left out."""
    tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    docs = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[node.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs
