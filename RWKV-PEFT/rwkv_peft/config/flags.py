"""Flags -> RunConfig.

One flag per field of the config dataclasses, plus RWKV-PEFT's spellings, so that its users' scripts carry over.
Precedence: flag > `--config` YAML > checkpoint (shapes) > default.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from rwkv_peft.config import sections as config_module
from rwkv_peft.config.sections import SECTIONS, DataConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from rwkv_peft.config.yaml_file import converter, read_yaml, type_name
from rwkv_peft.errors import ConfigError, UserError, nearest

METHOD_FLAGS = {
    f"{method}_config": method for method in "bone miss disha lora dora pissa olora lora_ga adapter prompt lisa".split()
}
"""RWKV-PEFT's spelling of --peft_config, one flag a method."""

OPTION_FLAGS = {
    "bone_impl": ("bone", "impl", str, "With --peft bone: fused, or materialized as in the paper's code. [fused]"),
    "bone_cp": ("bone", "cp", int, "With --bone_impl materialized: 1 builds W + dW again in the backward pass. [0]"),
}
"""Flags that set one option of a method: method, option, kind, help."""

ONE_VALUE_FLAGS = {"my_testing": "x060", "rwkv_version": "x060", "sft_split": "train"}
"""Flags of RWKV-PEFT of which only this value exists here."""

IGNORED_FLAGS = (
    "avg_loss compile data_shuffle dropout ds_bucket_mb fla head_qk head_size_divisor l2warp_sparse load_partial "
    "my_att_shift my_exit my_ffn_shift my_pile_edecay my_pile_shift my_pile_stage "
    "my_pile_version my_pos_emb my_qa_mask my_random_steps my_sample_len op pre_ffn state_tune tiny_att_dim "
    "tiny_att_layer weight_decay_final"
).split()
"""Flags of RWKV-LM and RWKV-PEFT that mean nothing here; accepted with one warning."""

NEUTRAL_VALUES = {"0", "0.0", "-1", "-1.0", "none", "false", ""}
ONLY_NEUTRAL = ("dropout head_qk load_partial my_qa_mask pre_ffn state_tune tiny_att_dim weight_decay_final").split()
"""Ignored flags that would change what is trained; any value but a neutral one is an error."""

EPILOG = """With no --load_model, no --data_file and no shape flag, the demo's small base model and data serve
(they are made on first use). Shape flags without --load_model mean training from scratch."""


class Parser(argparse.ArgumentParser):
    """Argparse, with a UserError for each mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", message.removeprefix("argument "), hint=f"See python {self.prog} --help.")


def parse_args(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given on the command line and in `--config`, by field name; defaults are left out.

    Raises:
        UserError: unknown flag (names the nearest), bad value, bad JSON or YAML.
    """
    namespace, unknown = build_parser().parse_known_args(argv)
    _refuse_unknown(unknown)
    flags = vars(namespace)
    _set_aside_ignored(flags)
    for name, only in ONE_VALUE_FLAGS.items():
        value = flags.pop(name, only)
        if value != only:
            raise ConfigError(name, found=value, expected=f"{only}, the only one there is so far")
    if "mask_id" in flags:
        flags["mask_id"] = parse_options("mask_id", flags["mask_id"], example='{"mask0":"Q:","mask1":"A:"}')
    flags = _choose_method_options(flags)
    settings = read_yaml(Path(flags.pop("config"))) if "config" in flags else {}
    if flags.get("peft", settings.get("peft")) != settings.get("peft"):
        settings.pop("peft_config", None)  # the options of another method
    settings = _recognise_json(_set_single_options(settings | flags), flags)
    _announce_idle(flags, settings)
    return settings


def is_bare(settings: Mapping[str, Any]) -> bool:
    """True where neither a model, nor data, nor a shape was named: the demo's then serve."""
    shape = any(settings.get(spec.name) for spec in fields(ModelConfig))
    return not (settings.get("load_model") or settings.get("data_file") or shape)


def check(settings: Mapping[str, Any]) -> RunConfig:
    """Everything that can be said without opening a file: the sections, and the method's options in full.

    Raises:
        ConfigError: a value out of range, an unknown method, a bad option.
    """
    from rwkv_peft.peft.registry import canonical, method_config

    def section(cls: type) -> Any:
        return cls(**{spec.name: settings[spec.name] for spec in fields(cls) if spec.name in settings})

    peft = section(PeftConfig)
    method, options = canonical(peft.peft, peft.peft_config)
    options = method_config(method, options)
    return RunConfig(
        model=section(ModelConfig),
        peft=replace(peft, peft=method, peft_config=asdict(options)),
        data=section(DataConfig),
        optim=section(OptimConfig),
        train=section(TrainConfig),
    )


def resolve(settings: Mapping[str, Any]) -> RunConfig:
    """`check`, with the shape filled in from the checkpoint or the data."""
    config = check(settings)
    if not config.data.data_file and not config.train.dry_run:
        raise ConfigError("data_file", what="no data to train on", expected="a binidx pair, or JSON")
    return replace(config, model=_resolve_shape(config.model, config.train.load_model, config.data))


def _resolve_shape(asked: ModelConfig, load_model: str, data: DataConfig) -> ModelConfig:
    """The checkpoint's shape, where no flag contradicts it; else the flags' shape, completed."""
    if not load_model:
        vocab_size = asked.vocab_size or _vocab_size_of_data(data)
        return replace(asked, vocab_size=vocab_size).resolved()
    from rwkv_peft.base_model import load_base, shape_of

    shape = shape_of(load_base(load_model), load_model)
    for spec in fields(ModelConfig):
        wanted, there = getattr(asked, spec.name), getattr(shape, spec.name)
        if wanted and wanted != there:
            raise ConfigError(
                spec.name, what=f"contradicts {load_model}", found=wanted, expected=there, hint="Leave the flag away."
            )
    return shape


def _vocab_size_of_data(data: DataConfig) -> int:
    """The largest that a pair's sidecar names; 0 where none does."""
    from rwkv_peft.data.binidx.reader import BinidxReader
    from rwkv_peft.data.convert.json_pairs import pairs_of

    metas = [BinidxReader(path).meta for path, _ in pairs_of(data)]
    return max((meta.vocab_size for meta in metas if meta), default=0)


# --------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Fine-tune RWKV-6 with Bone or another method. Every flag has a default.",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="YAML", help="Settings of an earlier run (its config.yaml); flags win.")
    for owner in SECTIONS.values():
        add_section(parser, owner)
    for flag in METHOD_FLAGS:
        parser.add_argument(f"--{flag}", nargs="+", help=argparse.SUPPRESS)
    for flag, (_, _, kind, text) in OPTION_FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, metavar=type_name(kind), help=text)
    for flag in ONE_VALUE_FLAGS:
        parser.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    for flag in IGNORED_FLAGS:
        parser.add_argument(f"--{flag}", nargs="*", dest=f"ignored_{flag}", help=argparse.SUPPRESS)
    return parser


def add_section(parser: argparse.ArgumentParser, owner: type, leave_out: Sequence[str] = ()) -> None:
    """One flag for each field of a config dataclass but those of `leave_out`; a flag that is not given sets nothing."""
    group = parser.add_argument_group(inspect.getdoc(owner).splitlines()[0].rstrip("."))
    helps, kinds = field_docs(owner), typing.get_type_hints(owner)
    for spec in fields(owner):
        if spec.name not in leave_out:
            _add_flag(group, spec, kinds[spec.name], helps[spec.name])


def _add_flag(group: argparse._ArgumentGroup, spec: Field, kind: Any, text: str) -> None:
    names = [f"--{spec.name}", *(f"--{alias}" for alias in spec.metadata.get("aliases", ()))]
    shown = spec.default if isinstance(spec.default, str | int | float) else None
    text = text.replace("%", "%%") + (f" [{shown}]" if shown else "")
    options: dict[str, Any] = {"dest": spec.name, "help": text, "metavar": type_name(kind)}
    options["default"] = argparse.SUPPRESS
    if typing.get_origin(kind) is tuple:
        options |= {"nargs": "*", "action": _WordsAction}
        if spec.metadata.get("paths"):  # a path may hold a comma or a space
            options |= {"nargs": "+", "action": _PathsAction, "metavar": "PREFIX"}
    elif typing.get_origin(kind) is Mapping:
        options |= {"nargs": "+"}
    elif kind is bool:
        options |= {"nargs": "?", "const": True, "type": converter(bool)}
    else:
        options |= {"type": _respelled(converter(kind), spec.metadata.get("spellings", {}))}
        if typing.get_origin(kind) is Literal:
            options |= {"choices": typing.get_args(kind), "metavar": None}
    group.add_argument(*names, **options)


def _respelled(convert: Callable[[str], Any], spellings: Mapping[str, str]) -> Callable[[str], Any]:
    """A converter that knows RWKV-PEFT's words for some values, too."""

    def respelled(text: str) -> Any:
        return convert(spellings.get(text, text))

    respelled.__name__ = getattr(convert, "__name__", "value")  # argparse shows it
    return respelled


class _WordsAction(argparse.Action):
    """`time ln`, or RWKV-PEFT's `["time","ln"]`, as a tuple of words."""

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
    """Words as they are, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(value for value in values if value))


def field_docs(owner: type) -> dict[str, str]:
    """The string literal below each field of a dataclass of config/sections.py, by field name."""
    tree = ast.parse(inspect.getsource(config_module))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    docs = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)
    return docs


# ------------------------------------------------------------------------------------ method options


def parse_options(flag: str, words: Sequence[str], example: str = '{"r":64}') -> dict[str, Any]:
    """A flag's options: JSON, also with angle brackets for braces, also split at spaces by a shell.

    Raises:
        ConfigError: not a JSON object.
    """
    text = " ".join(words).strip()
    if text.startswith("<") and text.endswith(">"):
        text = "{" + text[1:-1] + "}"
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        expected = f"'{example}', the single quotes included"
        raise ConfigError(flag, what="not a JSON object", found=text, expected=expected)
    return options


def _choose_method_options(flags: dict[str, Any]) -> dict[str, Any]:
    """The options of the chosen method, whichever flag spelled them; warns of other methods'."""
    if "peft_config" in flags:
        flags["peft_config"] = parse_options("peft_config", flags["peft_config"])
    for flag, method in METHOD_FLAGS.items():
        if flag not in flags:
            continue
        options = parse_options(flag, flags.pop(flag))
        chosen = flags.get("peft", method if "config" in flags else None)
        if chosen != method:
            sys.stderr.write(f"note: --{flag} has no effect with --peft {flags.get('peft', 'none')}\n")
        elif "peft_config" in flags:
            raise ConfigError(flag, what="given beside --peft_config", expected="one of the two")
        else:
            flags["peft_config"] = options
    return flags


def _set_single_options(settings: dict[str, Any]) -> dict[str, Any]:
    """`--bone_cp 1` as the option "cp" of the method's options, where it wins over a file's."""
    for flag, (method, option, _, _) in OPTION_FLAGS.items():
        if flag not in settings:
            continue
        value, chosen = settings.pop(flag), settings.get("peft", "none")
        if chosen != method:
            raise ConfigError(flag, what=f"belongs to --peft {method}", found=f"--peft {chosen}")
        settings["peft_config"] = {**settings.get("peft_config", {}), option: value}
    if settings.get("peft") == "bone":
        options = settings.get("peft_config", {})
        if options.get("cp") and options.get("impl") != "materialized":
            sys.stderr.write("note: --bone_cp has no effect: only --bone_impl materialized keeps what it would drop\n")
    return settings


def _recognise_json(settings: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`--data_file chat.jsonl` without --data_type can only be meant one way."""
    from rwkv_peft.data.convert.sources import is_text_data

    if "data_type" in flags or settings.get("data_type", "binidx") != "binidx":
        return settings
    paths = [path for path, _ in DataConfig(data_file=flags.get("data_file", ())).sources]
    if not paths or not all(map(is_text_data, paths)):
        return settings
    sys.stderr.write(f"note: --data_file {' '.join(flags['data_file'])} is read as --data_type jsonl\n")
    return settings | {"data_type": "jsonl"}


def _announce_idle(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Warn of flags that the chosen --dataload, --loss_mask, --train_type or --lr_schedule does not read."""
    dataload, loss_mask = settings.get("dataload", "get"), settings.get("loss_mask", "auto")
    train_type = settings.get("train_type", "none")
    windows = dataload in ("get", "walk")
    tokens = settings.get("data_type", "binidx") == "binidx"
    for name, idle, chosen in (
        ("long", windows, f"--dataload {dataload}"),
        ("magic_prime", not windows, f"--dataload {dataload}"),
        ("my_exit_tokens", not windows, f"--dataload {dataload}"),
        ("mask_id", loss_mask != "se", f"--loss_mask {loss_mask}"),
        *((name, tokens, "--data_type binidx") for name in ("tokenizer", "text_key", "fields", "template")),
        ("chunk_ctx", train_type != "infctx", f"--train_type {train_type}"),
        ("infctx_bptt", train_type != "infctx", f"--train_type {train_type}"),
        ("lr_final", settings.get("lr_schedule") == "constant", "--lr_schedule constant"),
    ):
        if flags.get(name) and idle:
            sys.stderr.write(f"note: --{name} has no effect with {chosen}\n")


def _refuse_unknown(words: Sequence[str]) -> None:
    if not words:
        return
    unknown = next((word for word in words if word.startswith("--")), None)
    if unknown is None:
        raise UserError("command line", f"{words[0]!r} belongs to no flag", hint="Values with spaces need quotes.")
    name = unknown[2:].split("=")[0]
    known = [spec.name for owner in SECTIONS.values() for spec in fields(owner)]
    known += [*METHOD_FLAGS, *OPTION_FLAGS, "config"]
    raise UserError(f"--{name}", "unknown flag", hint=nearest(name, known, "--") or "See python train.py --help.")


def _set_aside_ignored(flags: dict[str, Any]) -> None:
    """Drop the ignored flags with one note; raise ConfigError where one asks for what is not here."""
    names = [name for name in IGNORED_FLAGS if f"ignored_{name}" in flags]
    for name in names:
        value = " ".join(flags.pop(f"ignored_{name}"))
        if name in ONLY_NEUTRAL and (value.lower() not in NEUTRAL_VALUES or (name == "state_tune" and not value)):
            raise ConfigError(name, what="is not here", found=value or "the flag", expected="0, or no such flag")
    if names:
        sys.stderr.write(f"note: no effect here, ignored: {' '.join('--' + name for name in names)}\n")
