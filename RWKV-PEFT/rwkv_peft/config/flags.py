"""The command line: one flag for each field of the sections, `--peft` and its options, and RWKV-PEFT's spellings.

`parse_flags` reads flags and the `--config` file into plain settings. `run_config.py` makes a RunConfig of them.
Precedence: flag > `--config` YAML > checkpoint (shapes) > default.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from rwkv_peft.config.field_types import field_docs, field_types, text_converter, type_name
from rwkv_peft.config.method import METHODS
from rwkv_peft.config.sections import SECTIONS
from rwkv_peft.config.spellings import (
    IGNORED_FLAGS,
    METHOD_FLAGS,
    NEUTRAL_VALUES,
    ONE_VALUE_FLAGS,
    ONLY_NEUTRAL,
    OPTION_FLAGS,
    SUPPORTED_INSTEAD,
)
from rwkv_peft.config.yaml_file import read_yaml
from rwkv_peft.console import note, program_name
from rwkv_peft.errors import ConfigError, UserError, nearest

PEFT_HELP = {
    "peft": f"Method: {', '.join(METHODS[1:])}, none (full fine-tuning), or your own module: my_package.my_method.",
    "peft_config": """Options of the method as JSON, in single quotes: '{"r":64,"mode":"row"}'. Also --bone_config.""",
}
"""Help of the two flags that make `PeftConfig.method`."""

EPILOG = """Without --load_model, --data_file and shape flags, training uses a small starter model and arithmetic
questions. It makes both on first use, in the folder starter/ (about a minute). Shape flags without --load_model train a
new model from scratch."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError for bad input."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
            message = f"unexpected argument {match[1]!r}"
        elif match := re.fullmatch(r"(.*): invalid (int|float) value: (.*)", message):
            kind = {"int": "an integer", "float": "a number"}[match[2]]
            message = f"{match[1]}: expected {kind}; found {match[3]}"
        raise UserError("command line", message, hint=f"See {self.prog} --help.")


def parse_flags(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the command line and its `--config` file.

    Returns:
        The flags of the command line, and all settings (those of the file included), both by flag name. Settings that
        were not given are absent. `peft_config` has the options of the method, from any of its flags.
    Raises:
        UserError: an unknown flag, an invalid value, bad JSON or bad YAML.
    """
    flags, unknown = _parse(argv)
    _refuse_unknown(unknown)
    file = _read_config_file(Path(flags.pop("config"))) if "config" in flags else {}
    flags = _gather_method_options(flags, flags.get("peft", file.get("peft", "none")))
    if flags.get("peft", file.get("peft")) != file.get("peft"):
        file.pop("peft_config", None)  # the options of another method
    return flags, _apply_option_flags(file | flags)


def _parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags that have an effect, by name, and the words that are not flags."""
    namespace, unknown = build_parser().parse_known_args(words)
    flags = vars(namespace)
    _drop_ignored(flags)
    for name, only in ONE_VALUE_FLAGS.items():
        value = flags.pop(name, only)
        if value != only:
            raise ConfigError(name, found=value, expected=f"{only}, the only supported value")
    if "mask_id" in flags:
        flags["mask_id"] = parse_options("mask_id", flags["mask_id"], example='{"mask0":"Q:","mask1":"A:"}')
    return flags, unknown


def _read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file with sections, or with flag names as its keys."""
    settings, flat = read_yaml(path)
    if not flat:
        return settings
    known = [name for name in _known_flags() if name not in ("config", "help")]
    for name in flat:
        if name not in known:
            hint = nearest(name, known) or f"See {program_name('train')} --help."
            raise UserError(str(path), f"unknown key {name}", hint=hint)
    try:
        flags, rest = _parse([word for name, value in flat.items() for word in _as_words(name, value)])
        _refuse_unknown(rest)
    except UserError as error:
        error.args = (f"{path}: {str(error).removeprefix('command line: ')}",)
        raise
    settings |= flags
    return _apply_option_flags(_gather_method_options(settings, settings.get("peft", "none")))


def _as_words(name: str, value: Any) -> list[str]:
    """Return a key and a value of a flat YAML file as words of a command line."""
    if value is None:
        raise UserError(f"--{name}", "has no value")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{name}={int(value) if isinstance(value, bool) else value}"]


# --------------------------------------------------------------------------------------------- parser


def build_parser() -> argparse.ArgumentParser:
    """Return train.py's parser; flags that are not given are absent from its namespace."""
    parser = Parser(
        prog=program_name("train"),
        description="Fine-tune RWKV-6 with Bone or another method. Every flag has a default.",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="YAML file with settings: the config.yaml of an earlier run, or flag names as keys. Flags override it.",
    )
    for owner in SECTIONS.values():
        add_section(parser, owner)
    for flag in METHOD_FLAGS:
        parser.add_argument(f"--{flag}", nargs="+", help=argparse.SUPPRESS)
    for flag, (method, option) in OPTION_FLAGS.items():
        text = f"With --peft {method}: the same as the option {option} in --{method}_config."
        parser.add_argument(f"--{flag}", type=_json_or_text, metavar="VALUE", help=text)
    for flag in ONE_VALUE_FLAGS:
        parser.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    for flag in IGNORED_FLAGS:
        parser.add_argument(f"--{flag}", nargs="*", dest=f"ignored_{flag}", help=argparse.SUPPRESS)
    return parser


def add_section(parser: argparse.ArgumentParser, owner: type, leave_out: Sequence[str] = ()) -> None:
    """Add one flag for each field of a section, except those in `leave_out`, to a parser."""
    group = parser.add_argument_group(inspect.getdoc(owner).splitlines()[0].rstrip("."))
    helps = {name: text for name, _, text in documented_flags(owner)}
    for spec in fields(owner):
        if "flags" in spec.metadata:  # the method
            group.add_argument("--peft", metavar="NAME", help=f"{helps['peft']} [none]")
            group.add_argument("--peft_config", metavar="JSON", nargs="+", help=helps["peft_config"])
        elif spec.name not in leave_out:
            _add_flag(group, spec, field_types(owner)[spec.name], helps[spec.name])


def documented_flags(owner: type) -> Iterator[tuple[str, Any, str]]:
    """Yield name, default ("" if there is none to show) and help text of each flag of a section."""
    helps = field_docs(owner)
    for spec in fields(owner):
        if "flags" in spec.metadata:
            yield "peft", "none", PEFT_HELP["peft"]
            yield "peft_config", "", PEFT_HELP["peft_config"]
        else:
            shown = isinstance(spec.default, str | int | float) and spec.default
            yield spec.name, spec.default if shown else "", helps[spec.name]


def _add_flag(group: argparse._ArgumentGroup, spec: Field, kind: Any, text: str) -> None:
    names = [f"--{spec.name}", *(f"--{alias}" for alias in spec.metadata.get("aliases", ()))]
    shown = spec.default if isinstance(spec.default, str | int | float) else None
    text = text.replace("%", "%%") + (f" [{shown}]" if shown else "")
    options: dict[str, Any] = {"dest": spec.name, "help": text, "metavar": type_name(kind)}
    options["default"] = argparse.SUPPRESS
    if typing.get_origin(kind) is tuple:
        options |= {"nargs": "*", "action": _WordsAction}
        if spec.metadata.get("paths"):  # a path may contain a comma or a space
            options |= {"nargs": "+", "action": _PathsAction, "metavar": "PREFIX"}
    elif typing.get_origin(kind) is Mapping:
        options |= {"nargs": "+"}
    elif kind is bool:
        options |= {"nargs": "?", "const": True, "type": text_converter(bool)}
    else:
        options |= {"type": _respelled(text_converter(kind), spec.metadata.get("spellings", {}))}
        if typing.get_origin(kind) is Literal:
            options |= {"choices": typing.get_args(kind), "metavar": None}
    group.add_argument(*names, **options)


def _respelled(convert: Callable[[str], Any], spellings: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a converter that also accepts RWKV-PEFT's words for some values."""

    def respelled(text: str) -> Any:
        return convert(spellings.get(text, text))

    respelled.__name__ = getattr(convert, "__name__", "value")  # argparse shows it
    return respelled


class _WordsAction(argparse.Action):
    """Stores `time ln`, or RWKV-PEFT's `["time","ln"]`, as a tuple of words."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values)
        try:
            words = json.loads(text) if text.startswith("[") else text.replace(",", " ").split()
        except json.JSONDecodeError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise argparse.ArgumentError(self, f"found {text}, expected names such as: time ln")
        setattr(namespace, self.dest, tuple(words))


class _PathsAction(argparse.Action):
    """Stores words unchanged, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(value for value in values if value))


# ------------------------------------------------------------------------------------ method options


def parse_options(flag: str, words: Sequence[str], example: str = '{"r":64}') -> dict[str, Any]:
    """Return the JSON object that a flag was given, also with angle brackets for braces or split at spaces by a shell.

    Raises:
        ConfigError: not a JSON object.
    """
    text = " ".join(words).strip()
    if text.startswith("<") and text.endswith(">"):
        text = "{" + text[1:-1] + "}"
    options = _json_or_text(text)
    if not isinstance(options, dict):
        expected = f"'{example}', the single quotes included"
        raise ConfigError(flag, what="not a JSON object", found=text, expected=expected)
    return options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _gather_method_options(flags: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    """Parse the options of the chosen method into `peft_config`; the flags of other methods get a note."""
    flags = dict(flags)
    if "peft_config" in flags and not isinstance(flags["peft_config"], dict):
        flags["peft_config"] = parse_options("peft_config", flags["peft_config"])
    for flag, method in METHOD_FLAGS.items():
        if flag not in flags:
            continue
        options = parse_options(flag, flags.pop(flag))
        if chosen != method:
            note(f"--{flag} has no effect with --peft {chosen}")
        elif "peft_config" in flags:
            raise ConfigError(flag, what="cannot be combined with --peft_config", hint="Use only one of them.")
        else:
            flags["peft_config"] = options
    return flags


def _apply_option_flags(settings: dict[str, Any]) -> dict[str, Any]:
    """Write `--bone_cp 1` and the like into the options of the method, where they win over a file's."""
    for flag, (method, option) in OPTION_FLAGS.items():
        if flag not in settings:
            continue
        value, chosen = settings.pop(flag), settings.get("peft", "none")
        if chosen != method:
            raise ConfigError(flag, what=f"needs --peft {method}", found=f"--peft {chosen}")
        settings["peft_config"] = {**settings.get("peft_config", {}), option: value}
    return settings


# ------------------------------------------------------------------------------ unknown, ignored, unused


def _known_flags() -> list[str]:
    return [option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings]


def _refuse_unknown(words: Sequence[str]) -> None:
    if not words:
        return
    unknown = next((word for word in words if word.startswith("--")), None)
    if unknown is None:
        what = f"unexpected argument {words[0]!r}"
        raise UserError("command line", what, hint="Put values with spaces in quotes.")
    name = unknown[2:].split("=")[0]
    known = [name for name in _known_flags() if name not in IGNORED_FLAGS]
    hint = nearest(name, known, "--") or f"See {program_name('train')} --help."
    raise UserError(f"--{name}", "unknown flag", hint=hint)


def _drop_ignored(flags: dict[str, Any]) -> None:
    """Drop the ignored flags with one note; raise ConfigError if one asks for something unsupported."""
    names = [name for name in IGNORED_FLAGS if f"ignored_{name}" in flags]
    for name in names:
        value = " ".join(flags.pop(f"ignored_{name}"))
        if name in ONLY_NEUTRAL and (value.lower() not in NEUTRAL_VALUES or (name == "state_tune" and not value)):
            hint = SUPPORTED_INSTEAD.get(name, "Omit the flag.")
            raise ConfigError(name, what="not supported", found=value or "the flag", hint=hint)
    if names:
        note(f"ignored, these flags have no effect here: {' '.join('--' + name for name in names)}")


def note_unused(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Print a note for each given flag that the other settings make useless."""
    dataload, loss_mask = settings.get("dataload", "get"), settings.get("loss_mask", "auto")
    train_type = settings.get("train_type", "none")
    windows = dataload in ("get", "walk")
    tokens = settings.get("data_type", "binidx") == "binidx"
    impl = settings.get("peft_config", {}).get("impl", "fused")
    for name, unused, chosen in (
        ("long", windows, f"--dataload {dataload}"),
        ("magic_prime", not windows, f"--dataload {dataload}"),
        ("my_exit_tokens", not windows, f"--dataload {dataload}"),
        ("mask_id", loss_mask != "se", f"--loss_mask {loss_mask}"),
        *((name, tokens, "--data_type binidx") for name in ("tokenizer", "text_key", "fields", "template")),
        ("chunk_ctx", train_type != "infctx", f"--train_type {train_type}"),
        ("infctx_bptt", train_type != "infctx", f"--train_type {train_type}"),
        ("lr_final", settings.get("lr_schedule") == "constant", "--lr_schedule constant"),
        ("bone_cp", impl == "fused", f"--bone_impl {impl}"),
    ):
        if flags.get(name) and unused:
            note(f"--{name} has no effect with {chosen}")
