"""Merge an adapter into its base model: one .pth for any RWKV-6 program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The package, not this folder: names like tools/inspect.py would hide the standard library's.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.errors import exit_with_message


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model", required=True, help="The .pth the adapter was trained on.")
    parser.add_argument("--adapter", required=True, help="The .safetensors a run wrote (rwkv-N.safetensors).")
    parser.add_argument("--output", required=True, help="The .pth to write.")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="Store in this dtype [the base's].")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    import torch

    from rwkv_peft.inference.merge import merge

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    print(merge(args.base_model, args.adapter, args.output, dtype))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    exit_with_message(main)
