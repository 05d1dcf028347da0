"""The flags of tools/json2binidx.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rwkv_peft.errors import ConfigError

DESCRIPTION = """\
Tokenise text, instructions and chats into a binidx pair for training.

input     JSON lines, a JSON array, text (one document a file) or Parquet, each plain, .gz or .zst
records   {"text": "..."}
          {"instruction": "...", "input": "...", "output": "..."}, and the question and answer of MetaMathQA, GSM8K,
          MATH, CodeFeedback, WizardLM-Evol-Instruct and their like, or any two keys by --fields
          {"messages": [{"role": "user", "content": "..."}, ...]}
          {"conversations": [{"from": "human", "value": "..."}, ...]}
output    PREFIX.bin, PREFIX.idx, PREFIX.meta.json, and PREFIX.mask.bin when the records say what is an answer

Instructions and chats become "User: ...\\n\\nAssistant: ...\\n\\n", where only answers train, or what --template says.
"""

EPILOG = """\
A template is a Jinja2 file. It sees `record`, and `messages` (role: User, Assistant or System; content) where the
record is a chat or an instruction. What stands between {{ answer_begin }} and {{ answer_end }} trains, and the end of
the document when an answer comes last; without these marks, everything does:

  Q: {{ record.problem }}
  A:{{ answer_begin }} {{ record.solution }}{{ answer_end }}
"""

RAISE_AGAIN = 5.0
"""Seconds for cleaning up after a signal."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="json2binidx.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, or - for standard input")
    add("--output_prefix", required=True, metavar="PREFIX", help="makes PREFIX.bin, .idx, .meta.json, .mask.bin")
    add("--tokenizer", default="world", help="world (default), bytes or the path of a tokenizer.json")
    add(
        "--text_key", metavar="KEY", help="key of the text; records are plain text then, whatever else they hold (text)"
    )
    add("--fields", nargs=2, metavar=("ASKED", "ANSWER"), help="keys of question and answer")
    add("--template", metavar="FILE", help="Jinja2 template of a document; see below")
    add("--val_fraction", type=float, default=0.0, metavar="X", help="share of documents for a second pair, PREFIX_val,"
        " chosen by a hash of their text (0: no second pair)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes (0: one a core when the input is large)")
    add("--on_error", choices=("stop", "skip"), default="stop", help="bad records: stop with nothing written (default),"
        " or skip them into PREFIX.rejects.jsonl")  # fmt: skip
    add("--ctx_len", type=int, default=1024, metavar="T", help="the summary counts documents over this (1024)")
    add("--debug", action="store_true", help="show Python tracebacks for mistakes in the input too")
    return parser


def main(argv: Sequence[str]) -> None:
    """Convert as the flags in `argv` say, and print the summary."""
    args = build_parser().parse_args(argv)
    _check(args)
    # Imported late: --help waits for nothing.
    from rwkv_peft.data.convert.conversion import Options, convert
    from rwkv_peft.data.convert.records import Layout
    from rwkv_peft.data.convert.templates import read_template
    from rwkv_peft.data.tokenizer import load_tokenizer

    template = read_template(args.template) if args.template else None
    layout = Layout(args.text_key, tuple(args.fields) if args.fields else None, template)
    options = Options(val_fraction=args.val_fraction, workers=args.workers, on_error=args.on_error)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        summary = convert(args.input, args.output_prefix, load_tokenizer(args.tokenizer), layout, options)
    except SystemExit as stop:
        _leave(stop.code)
    print(summary.report(args.ctx_len))


def _check(args: argparse.Namespace) -> None:
    prefix = args.output_prefix
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise ConfigError("output_prefix", what="is a folder", found=prefix, expected="folder/name, without suffix")
    if not 0 <= args.val_fraction < 1:
        raise ConfigError("val_fraction", found=args.val_fraction, expected="0 or more, and below 1")
    if args.workers < 0:
        raise ConfigError("workers", found=args.workers, expected="0 or more")
    if args.ctx_len < 1:
        raise ConfigError("ctx_len", found=args.ctx_len, expected="1 or more")


def _leave(code: int) -> NoReturn:
    """End at once, all being cleaned up: Python would first wait for the threads of a pool, which a signal may have hit
    in the middle of an answer. The workers end with this process."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Clean up and leave. Python drops what is raised within some callbacks of its own: it is raised again then."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
        signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN)
    raise SystemExit(128 + number)
