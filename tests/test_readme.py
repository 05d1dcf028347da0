"""What the README and docs/ say of flags and files is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from rwkv_peft.config.flags import build_parser, field_docs
from rwkv_peft.config.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
CONVERTER = set("input output_prefix tokenizer text_key fields template val_fraction workers on_error".split())
INSPECTOR = set("check documents batches full boundaries".split())
OTHER_PROGRAMS = {*CONVERTER, *INSPECTOR, "help", "base_model", "adapter", "output", "dtype", "onto"}


def test_the_flag_table_is_that_of_the_program():
    rows = [line for line in FLAGS.splitlines() if line.startswith("| `--")]
    wanted = []
    for owner in SECTIONS.values():
        helps = field_docs(owner)
        for spec in fields(owner):
            default = spec.default if isinstance(spec.default, str | int | float) and spec.default else ""
            wanted.append(f"| `--{spec.name}` | {default} | {helps[spec.name]} |".replace("|  |", "| |"))
    assert rows == wanted


def test_every_flag_it_names_exists():
    known = {option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--(\w+)", README + FLAGS))
    assert named - known <= OTHER_PROGRAMS


def test_every_file_it_links_to_exists():
    for path in [*re.findall(r"\]\((?!http)([^)]+)\)", README), "docs/architecture.md", "CONTRIBUTING.md", "LICENSE"]:
        assert (ROOT / path).exists(), path
