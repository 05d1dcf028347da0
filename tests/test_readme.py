"""What the README says of flags and files is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from rwkv_peft.cli import build_parser
from rwkv_peft.config import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERTER = set("input output_prefix tokenizer text_key fields template val_fraction workers on_error".split())
INSPECTOR = set("check documents batches full boundaries".split())
OTHER_PROGRAMS = {*CONVERTER, *INSPECTOR, "help", "base_model", "adapter", "output", "dtype", "onto"}


def test_the_flag_table_has_every_flag_and_no_other():
    table = set(re.findall(r"^\| `--(\w+)`", README, re.MULTILINE))
    assert table == {spec.name for owner in SECTIONS.values() for spec in fields(owner)}


def test_every_flag_it_names_exists():
    known = {option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--(\w+)", README))
    assert named - known <= OTHER_PROGRAMS


def test_every_file_it_links_to_exists():
    for path in [*re.findall(r"\]\((?!http)([^)]+)\)", README), "docs/architecture.md", "CONTRIBUTING.md", "LICENSE"]:
        assert (ROOT / path).exists(), path
