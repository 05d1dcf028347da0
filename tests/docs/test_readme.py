"""The flags in the README and in docs/flags.md exist, and the table is complete."""

from __future__ import annotations

import re
from pathlib import Path

from rwkv_peft.config.flags import build_parser, documented_flags
from rwkv_peft.config.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
OTHER_PROGRAMS = set("help input output_prefix base_model adapter output local-dir".split())


def test_the_flag_table_is_that_of_the_program():
    rows = [line for line in FLAGS.splitlines() if line.startswith("| `--")]
    wanted = []
    for owner in SECTIONS.values():
        for name, default, text in documented_flags(owner):
            wanted.append(f"| `--{name}` | {default} | {text} |".replace("|  |", "| |"))
    assert rows == wanted


def test_every_flag_it_names_exists():
    known = {option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--([\w-]*\w)", README + FLAGS))
    assert named - known <= OTHER_PROGRAMS
