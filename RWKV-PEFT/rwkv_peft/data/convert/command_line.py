"""The command line of rwkv-peft convert (tools/json2binidx.py)."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rwkv_peft.config.flags import Parser
from rwkv_peft.console import note, program_name, say
from rwkv_peft.errors import ConfigError

DESCRIPTION = """\
Tokenize text, instructions and chats into a binidx pair for training.

input     JSON lines, a JSON array, text (one document per file) or Parquet; plain, .gz or .zst
records   {"text": "..."}
          {"instruction": "...", "input": "...", "output": "..."}; the question and answer keys of MetaMathQA, GSM8K,
          MATH, CodeFeedback, WizardLM-Evol-Instruct and similar sets; or any two keys given by --fields
          {"messages": [{"role": "user", "content": "..."}, ...]}
          {"conversations": [{"from": "human", "value": "..."}, ...]}
output    PREFIX.bin, PREFIX.idx, PREFIX.meta.json, and PREFIX.mask.bin if the records have answers

Instructions and chats become "User: ...\\n\\nAssistant: ...\\n\\n", and only the answers are in the loss.
A --template changes the form.
"""

EPILOG = """\
A template is a Jinja2 file with the variables `record` and, for chats and instructions, `messages` (each with `role`:
User, Assistant or System, and `content`). The text between {{ answer_begin }} and {{ answer_end }} is in the loss,
and so is the end-of-document token if an answer comes last. Without these marks, the whole document is in the loss:

  Q: {{ record.problem }}
  A:{{ answer_begin }} {{ record.solution }}{{ answer_end }}
"""

CLEAN_UP_SECONDS = 5.0
"""Time for cleaning up after a signal, before it is raised again."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program_name("convert"),
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, or - for standard input")
    add("--output_prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json, .mask.bin")
    add("--tokenizer", default="world", help="world (default), bytes or the path of a tokenizer.json")
    add("--text_key", metavar="KEY", help="key of the text; reads each record as plain text, ignoring its other keys")
    add("--fields", nargs=2, metavar=("QUESTION", "ANSWER"), help="keys of the question and the answer")
    add("--template", metavar="FILE", help="Jinja2 template of a document, see below")
    add(
        "--val_fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="fraction of the documents for a validation pair, PREFIX_val; a hash of the text chooses them (default 0)",
    )
    add("--workers", type=int, default=0, metavar="N", help="processes (default 0: one per core if the input is large)")
    add(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="invalid records: stop and write nothing (default), or skip them and list them in PREFIX.rejects.jsonl",
    )
    add("--ctx_len", type=int, default=1024, metavar="T", help="the summary counts longer documents (default 1024)")
    add("--debug", action="store_true", help="show Python tracebacks for user errors too")
    return parser


def main(argv: Sequence[str]) -> None:
    """Convert as the flags in `argv` say and print the summary."""
    args = build_parser().parse_args(argv)
    _check(args)
    # Imported late, so that --help is fast.
    from rwkv_peft.data.convert.conversion import Options, convert
    from rwkv_peft.data.convert.jinja_template import read_template
    from rwkv_peft.data.convert.record_text import RecordFormat
    from rwkv_peft.data.tokenizer import load_tokenizer

    template = read_template(args.template) if args.template else None
    record_format = RecordFormat(args.text_key, tuple(args.fields) if args.fields else None, template)
    options = Options(val_fraction=args.val_fraction, workers=args.workers, on_error=args.on_error)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        summary = convert(args.input, args.output_prefix, load_tokenizer(args.tokenizer), record_format, options)
    except SystemExit as stop:
        _leave(stop.code)
    say(summary.report(args.ctx_len))


def _check(args: argparse.Namespace) -> None:
    prefix = args.output_prefix
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise ConfigError(
            "output_prefix", what="is a folder", found=prefix, expected="a path without suffix, such as folder/name"
        )
    if not 0 <= args.val_fraction < 1:
        raise ConfigError("val_fraction", found=args.val_fraction, expected="0 or more, and below 1")
    if args.workers < 0:
        raise ConfigError("workers", found=args.workers, expected="0 or more")
    if args.ctx_len < 1:
        raise ConfigError("ctx_len", found=args.ctx_len, expected="1 or more")


def _leave(code: int) -> NoReturn:
    """Exit at once, after the clean-up. The workers end with this process.

    A normal exit would wait for the pool's threads, which may hang because a signal interrupted them.
    """
    note("interrupted; nothing was written")
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Clean up and exit. Python ignores exceptions in some of its callbacks, so a timer raises this one again."""
    signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, CLEAN_UP_SECONDS)
    raise SystemExit(128 + number)
