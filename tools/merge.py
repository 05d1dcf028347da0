"""Merge an adapter into its base model: one .pth for any RWKV-6 program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The package, not this folder: names like tools/inspect.py would hide the standard library's.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.errors import UserError, exit_with_message


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model", required=True, help="The .pth the adapter was trained on.")
    parser.add_argument(
        "--adapter",
        required=True,
        help="rwkv-N.safetensors of a run, rwkv-N.pth of a tuned state, or a .pth of RWKV-PEFT.",
    )
    parser.add_argument("--output", required=True, help="The .pth to write.")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="Store in this dtype [the base's].")
    parser.add_argument(
        "--onto",
        choices=["original", "quantised"],
        default="original",
        help="After training with --quant: add to the base's own weights, or to the quantised ones [original].",
    )
    parser.add_argument("--peft", help="Method of a .pth adapter, which does not say it: bone, miss, lora, ...")
    parser.add_argument("--peft_config", nargs="+", default=["{}"], metavar="JSON", help="Its options, as in training.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    import torch

    from rwkv_peft.config.flags import parse_options
    from rwkv_peft.config.sections import PeftConfig
    from rwkv_peft.export.merge import is_tuned_state, merge, merge_state

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    is_pth = args.adapter.endswith(".pth")
    if is_pth and is_tuned_state(args.adapter):
        print(merge_state(args.base_model, args.adapter, args.output, dtype))
        print(f"wrote {args.output}")
        return
    if is_pth != (args.peft is not None):
        raise UserError("--peft", "belongs to a .pth adapter, and only to one", hint="A .safetensors says what it is.")
    options = parse_options("peft_config", args.peft_config)
    says = PeftConfig(peft=args.peft, peft_config=options) if args.peft else None
    print(merge(args.base_model, args.adapter, args.output, dtype, onto=args.onto, says=says))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    exit_with_message(main)
