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
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from rwkv_peft import config as config_module
from rwkv_peft.config import SECTIONS, DataConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from rwkv_peft.config_file import converter, read_yaml, type_name
from rwkv_peft.errors import ConfigError, UserError, nearest

METHOD_FLAGS = {"bone_config": "bone", "lora_config": "lora"}
"""RWKV-PEFT's spelling of --peft_config, one flag a method."""

ONE_VALUE_FLAGS = {"my_testing": "x060", "rwkv_version": "x060", "train_type": "none"}
"""Flags of RWKV-PEFT of which only this value exists here."""

IGNORED_FLAGS = (
    "avg_loss compile data_shuffle dropout ds_bucket_mb fla head_qk head_size_divisor l2warp_sparse load_partial "
    "magic_prime my_att_shift my_exit my_exit_tokens my_ffn_shift my_pile_edecay my_pile_shift my_pile_stage "
    "my_pile_version my_pos_emb my_qa_mask my_random_steps my_sample_len op optim pre_ffn state_tune tiny_att_dim "
    "tiny_att_layer weight_decay_final"
).split()
"""Flags of RWKV-LM and RWKV-PEFT that mean nothing here; accepted with one warning."""

EPILOG = """With no --load_model, no --data_file and no shape flag, the demo's small base model and data serve
(they are made on first use). Shape flags without --load_model mean training from scratch."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("command line", message.removeprefix("argument "), hint="See python train.py --help.")


def parse_args(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given on the command line and in `--config`, by field name; defaults are left out.

    Raises:
        UserError: unknown flag (names the nearest), bad value, bad JSON or YAML.
    """
    namespace, unknown = build_parser().parse_known_args(argv)
    _refuse_unknown(unknown)
    flags = vars(namespace)
    _warn_ignored([name for name in IGNORED_FLAGS if flags.pop(f"ignored_{name}", None) is not None])
    for name, only in ONE_VALUE_FLAGS.items():
        value = flags.pop(name, only)
        if value != only:
            raise ConfigError(name, found=value, expected=f"{only}, the only one there is so far")
    settings = read_yaml(Path(flags.pop("config"))) if "config" in flags else {}
    return _choose_method_options(settings | flags)


def is_bare(settings: Mapping[str, Any]) -> bool:
    """True where neither a model, nor data, nor a shape was named: the demo's then serve."""
    shape = any(settings.get(spec.name) for spec in fields(ModelConfig))
    return not (settings.get("load_model") or settings.get("data_file") or shape)


def resolve(settings: Mapping[str, Any]) -> RunConfig:
    """Fill in shapes from the checkpoint, check the method's options, and freeze everything."""
    from rwkv_peft.peft.registry import method_config

    def section(cls: type) -> Any:
        return cls(**{spec.name: settings[spec.name] for spec in fields(cls) if spec.name in settings})

    train, peft, data = section(TrainConfig), section(PeftConfig), section(DataConfig)
    if not data.data_file and not train.dry_run:
        raise ConfigError("data_file", what="no data to train on", expected="the prefix of a binidx pair")
    options = method_config(peft.peft, peft.peft_config)
    return RunConfig(
        model=_resolve_shape(section(ModelConfig), train.load_model, data.data_file),
        peft=PeftConfig(**vars(peft) | {"peft_config": asdict(options)}),
        data=data,
        optim=section(OptimConfig),
        train=train,
    )


def _resolve_shape(asked: ModelConfig, load_model: str, data_file: str) -> ModelConfig:
    """The checkpoint's shape, where no flag contradicts it; else the flags' shape, completed."""
    if not load_model:
        vocab_size = asked.vocab_size or _vocab_size_of_data(data_file)
        return ModelConfig(**vars(asked) | {"vocab_size": vocab_size}).resolved()
    from rwkv_peft.checkpoint import load_base, shape_of

    shape = shape_of(load_base(load_model), load_model)
    for spec in fields(ModelConfig):
        wanted, there = getattr(asked, spec.name), getattr(shape, spec.name)
        if wanted and wanted != there:
            raise ConfigError(
                spec.name, what=f"contradicts {load_model}", found=wanted, expected=there, hint="Leave the flag away."
            )
    return shape


def _vocab_size_of_data(data_file: str) -> int:
    if not data_file:
        return 0
    from rwkv_peft.data.binidx import BinidxReader

    meta = BinidxReader(data_file).meta
    return meta.vocab_size if meta else 0


# --------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Fine-tune RWKV-6 with Bone or another method. Every flag has a default.",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="YAML", help="Settings of an earlier run (its config.yaml); flags win.")
    for owner in SECTIONS.values():
        group = parser.add_argument_group(inspect.getdoc(owner).splitlines()[0].rstrip("."))
        helps, kinds = field_docs(owner), typing.get_type_hints(owner)
        for spec in fields(owner):
            _add_flag(group, spec, kinds[spec.name], helps[spec.name])
    for flag in METHOD_FLAGS:
        parser.add_argument(f"--{flag}", nargs="+", help=argparse.SUPPRESS)
    for flag in ONE_VALUE_FLAGS:
        parser.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    for flag in IGNORED_FLAGS:
        parser.add_argument(f"--{flag}", nargs="*", dest=f"ignored_{flag}", help=argparse.SUPPRESS)
    return parser


def _add_flag(group: argparse._ArgumentGroup, spec: Field, kind: Any, text: str) -> None:
    names = [f"--{spec.name}", *(f"--{alias}" for alias in spec.metadata.get("aliases", ()))]
    shown = spec.default if isinstance(spec.default, str | int | float) else None
    text = text.replace("%", "%%") + (f" [{shown}]" if shown else "")
    options: dict[str, Any] = {"dest": spec.name, "help": text, "metavar": type_name(kind)}
    if typing.get_origin(kind) is tuple:
        options |= {"nargs": "*", "action": _WordsAction}
    elif spec.name == "peft_config":
        options |= {"nargs": "+"}
    elif kind is bool:
        options |= {"nargs": "?", "const": True, "type": converter(bool)}
    else:
        options |= {"type": converter(kind)}
        if typing.get_origin(kind) is Literal:
            options |= {"choices": typing.get_args(kind), "metavar": None}
    group.add_argument(*names, **options)


class _WordsAction(argparse.Action):
    """`time ln`, or RWKV-PEFT's `["time","ln"]`, as a tuple of words."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values)
        words = json.loads(text) if text.startswith("[") else text.replace(",", " ").split()
        setattr(namespace, self.dest, tuple(words))


def field_docs(owner: type) -> dict[str, str]:
    """The string literal below each field of a dataclass of config.py, by field name."""
    tree = ast.parse(inspect.getsource(config_module))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    docs = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)
    return docs


# ------------------------------------------------------------------------------------ method options


def parse_options(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """A method's options: JSON, also with angle brackets for braces, also split at spaces by a shell.

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
        raise ConfigError(
            flag, what="not a JSON object", found=text, expected="""'{"r":64}', the single quotes included"""
        )
    return options


def _choose_method_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Keep the options of the chosen method, whichever flag spelled them; warn of the others."""
    if isinstance(settings.get("peft_config"), list):
        settings["peft_config"] = parse_options("peft_config", settings["peft_config"])
    for flag, method in METHOD_FLAGS.items():
        if flag not in settings:
            continue
        options = parse_options(flag, settings.pop(flag))
        if settings.get("peft") == method:
            settings["peft_config"] = options
        else:
            sys.stderr.write(f"note: --{flag} has no effect with --peft {settings.get('peft', 'none')}\n")
    return settings


def _refuse_unknown(words: Sequence[str]) -> None:
    if not words:
        return
    unknown = next((word for word in words if word.startswith("--")), None)
    if unknown is None:
        raise UserError("command line", f"{words[0]!r} belongs to no flag", hint="Values with spaces need quotes.")
    name = unknown[2:].split("=")[0]
    known = [spec.name for owner in SECTIONS.values() for spec in fields(owner)] + list(METHOD_FLAGS) + ["config"]
    raise UserError(f"--{name}", "unknown flag", hint=nearest(name, known, "--") or "See python train.py --help.")


def _warn_ignored(names: Sequence[str]) -> None:
    if names:
        sys.stderr.write(f"note: no effect here, ignored: {' '.join('--' + name for name in names)}\n")
