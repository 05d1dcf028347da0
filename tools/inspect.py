"""Look into a binidx pair, or JSON as a run reads it: counts and lengths, documents with their loss mask, damage, and
the batches of a run."""

from __future__ import annotations

import sys
from pathlib import Path

# The package, not this folder: this very file would hide the standard library's inspect, which dataclasses import.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields

from rwkv_peft.config.flags import Parser, add_section
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.errors import ConfigError, exit_with_message

EPILOG = """What trains is highlighted on a terminal, and stands in double brackets elsewhere. The data flags are those
of train.py; with them, --batches shows what that run sees first."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tools/inspect.py", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("prefix", metavar="PREFIX", help="The pair: PREFIX.bin, PREFIX.idx; or JSON.")
    parser.add_argument("--documents", nargs="+", default=[], metavar="N", help="Show these, such as: 0 5-7.")
    parser.add_argument("--batches", type=int, default=0, metavar="N", help="Show the first batches of a run.")
    parser.add_argument("--check", action="store_true", help="Read everything and check it for damage.")
    parser.add_argument("--vocab_size", type=int, metavar="N", help="Check that every id is below [the tokenizer's].")
    parser.add_argument("--tokenizer", metavar="SPEC", help="world, bytes or a tokenizer.json [the pair's own].")
    parser.add_argument("--full", action="store_true", help="Show long documents and rows to their end.")
    parser.add_argument("--boundaries", action="store_true", help="Show where tokens begin and end.")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="[auto]")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    add_section(parser, DataConfig, leave_out=("data_file", "tokenizer", "val_data_file"))
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode
    try:
        for text in report(args):
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(args: argparse.Namespace) -> Iterator[str]:
    """What the flags ask for, a part at a time; a mistake in them comes before the first part."""
    from rwkv_peft.data.binidx.reader import BinidxReader
    from rwkv_peft.data.convert.json_pairs import pairs_of
    from rwkv_peft.data.inspect import summary as inspection
    from rwkv_peft.data.inspect.token_view import TokenView
    from rwkv_peft.data.rows.held_out import training_part
    from rwkv_peft.data.rows.sampling import Samples

    config = data_config(args)
    reader = BinidxReader(pairs_of(config)[0][0])
    documents = inspection.parse_documents(args.documents, len(reader))
    tokenizer = args.tokenizer if config.data_type == "binidx" else config.tokenizer
    vocabulary = inspection.find_vocabulary(reader, tokenizer)
    vocab_size = args.vocab_size or vocabulary.size
    view = TokenView(vocabulary.tokenizer, color=colored(args.color), boundaries=args.boundaries)
    if args.full:
        view = TokenView(view.tokenizer, view.color, view.boundaries, limit=None)
    yield inspection.summary(reader, vocabulary)
    if args.check or args.vocab_size:
        yield inspection.check(reader, vocab_size, vocabulary.eod)
    for number in documents:
        yield "\n" + inspection.show_document(reader, number, view)
    if args.batches:
        trains = training_part(reader, config.val_fraction) if config.val_fraction else reader
        samples = Samples(trains, config, vocab_size or inspection.ANY_ID)
        for batch, row, sample in inspection.batches(samples, config, args.batches):
            yield "\n" + inspection.show_row(batch, row, sample, view)
        if args.batches > config.epoch_steps > 0:
            yield f"\nepoch {config.epoch_begin} ends here; see the next with --epoch_begin {config.epoch_begin + 1}"


def data_config(args: argparse.Namespace) -> DataConfig:
    """The data flags, checked as training checks them."""
    for name, least in (("batches", 0), ("vocab_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(name, found=value, expected=f"an integer of at least {least}")
    from rwkv_peft.data.convert.sources import is_text_data

    given = {spec.name: getattr(args, spec.name) for spec in fields(DataConfig) if hasattr(args, spec.name)}
    if given["tokenizer"] is None:
        del given["tokenizer"]
    if is_text_data(args.prefix):
        given.setdefault("data_type", "jsonl")
    config = DataConfig(data_file=args.prefix, **given)
    if args.batches and config.random_seed < 0:
        hint = "A run writes the one it drew into its config.yaml."
        raise ConfigError("random_seed", found=config.random_seed, expected="the seed of the run to look at", hint=hint)
    return config


def colored(choice: str) -> bool:
    """Whether to use colour; `auto` follows the terminal and https://no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return choice == "always" or (choice == "auto" and sys.stdout.isatty() and not plain)


if __name__ == "__main__":
    exit_with_message(main)
