"""Show what is in a binidx pair or a JSON file: counts, lengths, documents with their loss mask, and the batches of a
run; check a pair for damage."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from rwkv_peft.config.flags import Parser, add_section
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.console import note, program_name
from rwkv_peft.errors import ConfigError

EPILOG = """Tokens in the loss are highlighted on a terminal, and enclosed in double brackets elsewhere. The data flags
are those of training: with the data flags of a run, --batches shows the first batches of that run."""

USED_WITHOUT_BATCHES = ("data_type", "tokenizer", "text_key", "fields", "template")
"""Data flags that say how to read a JSON file."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser(prog=program_name("inspect"), description=__doc__, epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="A binidx pair (PREFIX.bin and PREFIX.idx), or a JSON file.")
    add("--documents", nargs="+", default=[], metavar="N", help="Show these documents, for example: 0 5-7.")
    add("--batches", type=int, default=0, metavar="N", help="Show the first N batches of a run. [0]")
    add("--check", action="store_true", help="Read the whole pair and check it for damage.")
    add("--vocab_size", type=int, metavar="N", help="Check that every token id is below N. [the tokenizer's size]")
    add("--tokenizer", metavar="SPEC", help="world, bytes or a tokenizer.json. [the tokenizer of the pair]")
    add("--full", action="store_true", help="Do not shorten long documents and rows.")
    add("--boundaries", action="store_true", help="Mark the boundaries between tokens.")
    add("--color", choices=["auto", "always", "never"], default="auto", help="auto: only on a terminal. [auto]")
    add("--debug", action="store_true", help="Show Python tracebacks for user errors too.")
    add_section(parser, DataConfig, leave_out=("data_file", "tokenizer", "val_data_file"))
    return parser


def main(argv: Sequence[str]) -> int:
    """Print what the flags ask for."""
    args = build_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without Unicode
    try:
        for text in report(args):
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(args: argparse.Namespace) -> Iterator[str]:
    """Yield the requested parts one after the other. A wrong flag raises before the first part."""
    from rwkv_peft.data.binidx.reader import BinidxReader
    from rwkv_peft.data.convert.json_pairs import pairs_of
    from rwkv_peft.data.inspect import summary as inspection
    from rwkv_peft.data.inspect.token_view import TokenView
    from rwkv_peft.data.rows.sampling import Samples
    from rwkv_peft.data.rows.validation_split import training_documents

    config = data_config(args)
    if not args.batches:
        _note_unused(args)
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
        trains = training_documents(reader, config.val_fraction) if config.val_fraction else reader
        samples = Samples(trains, config, vocab_size or inspection.ANY_ID)
        for batch, row, sample in inspection.batches(samples, config, args.batches):
            yield "\n" + inspection.show_row(batch, row, sample, view)
        if args.batches > config.epoch_steps > 0:
            epoch = config.epoch_begin
            yield f"\nepoch {epoch} ends here; to see the next epoch, use --epoch_begin {epoch + 1}"


def _note_unused(args: argparse.Namespace) -> None:
    """Print a note for each given flag that only --batches uses."""
    for spec in fields(DataConfig):
        if spec.name not in USED_WITHOUT_BATCHES and hasattr(args, spec.name):
            note(f"--{spec.name} has no effect without --batches")


def data_config(args: argparse.Namespace) -> DataConfig:
    """Return the data flags as a config, checked as in training.

    Raises:
        ConfigError: a flag has a wrong value.
    """
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
        hint = "A run saves its seed in its config.yaml."
        raise ConfigError("random_seed", found=config.random_seed, expected="the seed of the run", hint=hint)
    return config


def colored(choice: str) -> bool:
    """Return whether to use color; `auto` follows the terminal and https://no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return choice == "always" or (choice == "auto" and sys.stdout.isatty() and not plain)
