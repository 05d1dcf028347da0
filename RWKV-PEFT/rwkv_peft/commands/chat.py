"""Chat with a model in the terminal: a base model, a merged model, or a base model with an adapter."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from rwkv_peft.config.flags import Parser
from rwkv_peft.console import program_name, say

TURN_END = "\n\nUser:"
"""Where a model starts to write the user's next question; the answer ends there."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser(prog=program_name("chat"), description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="PTH", help="A base model or a merged model.")
    add("--adapter", metavar="FILE", help="An adapter that was trained on this model; it is used without merging.")
    add("--peft", metavar="MODULE", help="Module of the adapter's method, if it is your own: my_package.my_method.")
    add("--tokenizer", default="world", metavar="SPEC", help="world, bytes or the path of a tokenizer.json. [world]")
    add(
        "--temperature",
        type=float,
        default=0.7,
        metavar="X",
        help="Sampling temperature; 0 always takes the most likely token. [0.7]",
    )
    add(
        "--top_p",
        type=float,
        default=0.8,
        metavar="X",
        help="Sample from the most likely tokens whose probabilities sum to this value. [0.8]",
    )
    add("--max_tokens", type=int, default=300, metavar="N", help="Maximum number of tokens in an answer. [300]")
    add("--debug", action="store_true", help="Show Python tracebacks for user errors too.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Read questions from the terminal and print the model's answers. Each question starts a new conversation."""
    args = build_parser().parse_args(argv)
    # Imported late: --help does not wait for torch.
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.inference.text import check_tokenizer, generate, load
    from rwkv_peft.peft.registry import import_method

    if args.peft:
        import_method(args.peft)
    model, tokenizer = load(args.model, args.adapter), load_tokenizer(args.tokenizer)
    check_tokenizer(tokenizer, model)
    say("Enter an empty line to end the chat.")
    for turn in itertools.count():
        try:
            question = input("\nUser: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        answer = generate(
            model,
            f"User: {question}\n\nAssistant:",
            tokenizer=tokenizer,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=turn,
        )
        say(f"\nAssistant: {answer.split(TURN_END)[0].strip()}")
