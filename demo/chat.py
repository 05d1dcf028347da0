"""Talk to a model in the terminal: the demo's by default, or any RWKV-6 .pth with `--model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / "RWKV-PEFT"), str(ROOT)]

from rwkv_peft.errors import ConfigError, exit_with_message


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo/chat.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "demo/out/merged.pth"), help="A base or merged .pth.")
    parser.add_argument("--adapter", help="An adapter of that base, used without merging.")
    parser.add_argument(
        "--tokenizer",
        default=str(ROOT / "demo/out/tokenizer.json"),
        help="world (public RWKV models), bytes, or a tokenizer.json.",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token.")
    parser.add_argument("--top_p", type=float, default=0.8)
    parser.add_argument("--max_tokens", type=int, default=300)
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    from rwkv_peft.adapted_model import load_plain, load_with_adapter
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.inference.generate import generate

    model = load_with_adapter(args.model, args.adapter).model if args.adapter else load_plain(args.model)
    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        found, expected = f"{tokenizer.vocab_size} ids", f"at most {model.config.vocab_size}, the model's"
        raise ConfigError("tokenizer", what=f"{args.tokenizer} does not fit the model", found=found, expected=expected)
    print("An empty line ends the chat.")
    for turn in range(sys.maxsize):
        try:
            question = input("\nUser: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        ids = generate(
            model,
            tokenizer.encode(f"User: {question}\n\nAssistant:"),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            stop=tokenizer.eod,
            seed=turn,
        )
        print("\nAssistant:", tokenizer.decode(ids).split("\n\nUser:")[0].strip())


if __name__ == "__main__":
    exit_with_message(main)
