"""Merge an adapter into its base model: one .pth file for any RWKV-6 program."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rwkv_peft.config.flags import Parser
from rwkv_peft.config.method import METHODS
from rwkv_peft.console import program_name, say
from rwkv_peft.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser(prog=program_name("merge"), description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--base_model", required=True, metavar="PTH", help="The .pth model that the adapter was trained on.")
    add(
        "--adapter",
        required=True,
        metavar="FILE",
        help="An adapter of a run (rwkv-N.safetensors), a tuned state (rwkv-N.pth), or a .pth adapter of RWKV-PEFT.",
    )
    add("--output", required=True, metavar="PTH", help="The .pth file to write.")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="Dtype of the stored tensors. [that of the base model]")
    add(
        "--onto",
        type=lambda text: "quantized" if text == "quantised" else text,
        choices=["original", "quantized"],
        default="original",
        help="For adapters trained with --quant. original: add the update to the original weights of the base model. "
        "quantized: add it to the quantized weights that training used. [original]",
    )
    add(
        "--peft",
        metavar="METHOD",
        help="Method of a .pth adapter of RWKV-PEFT: bone, miss, lora, ...; or the module of your own method, which "
        "is then imported: my_package.my_method.",
    )
    add("--peft_config", nargs="+", default=["{}"], metavar="JSON", help="Options of that method, as in training.")
    add("--debug", action="store_true", help="Show Python tracebacks for user errors too.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Merge as the flags say, and print what was merged."""
    args = build_parser().parse_args(argv)
    # Imported late: --help does not wait for torch.
    import torch

    from rwkv_peft.config.flags import parse_options
    from rwkv_peft.export.merge import is_tuned_state, merge, merge_state
    from rwkv_peft.peft.registry import import_method, method_config

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    is_pth = args.adapter.endswith(".pth")
    if is_pth and is_tuned_state(args.adapter):
        report = merge_state(args.base_model, args.adapter, args.output, dtype)
    else:
        _check_peft_flag(is_pth, args.peft)
        if args.peft:
            import_method(args.peft)
        method = method_config(args.peft, parse_options("peft_config", args.peft_config)) if is_pth else None
        report = merge(args.base_model, args.adapter, args.output, dtype, onto=args.onto, method=method)
    say(f"{report}\nwrote {args.output}")


def _check_peft_flag(is_pth: bool, method: str | None) -> None:
    """Raise UserError if a .pth adapter has no --peft, or a .safetensors adapter has one of this package's methods."""
    if is_pth and method is None:
        hint = "Add --peft, for example: --peft bone."
        raise UserError("--peft", "missing; a .pth adapter does not contain the name of its method", hint=hint)
    if method in METHODS and not is_pth:
        what = "cannot be used with a .safetensors adapter, which contains the name of its method"
        raise UserError("--peft", what, found=method, hint="Omit --peft.")
