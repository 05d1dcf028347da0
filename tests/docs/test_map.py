"""The documents agree with the code: the map of the package, commands, links, and the names of RWKV-PEFT's flags."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from rwkv_peft.config.flags import build_parser
from rwkv_peft.config.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "RWKV-PEFT" / "rwkv_peft"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def test_the_map_lists_every_folder_and_file_once():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    text = text[text.index("<!-- map: begin -->") : text.index("<!-- map: end -->")]
    listed = []
    for section in text.split("### `rwkv_peft/")[1:]:
        folder, rest = section.split("`", 1)
        listed += [folder, *(folder + name for name in re.findall(r"^- `(\w+\.py)`: \S", rest, re.MULTILINE))]
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    wanted = {path.as_posix() for path in paths if path.name != "__init__.py"}
    wanted |= {"" if path.parent == Path() else f"{path.parent.as_posix()}/" for path in paths}
    assert sorted(listed) == sorted(wanted)


def test_every_flag_of_rwkv_peft_is_in_its_page():
    """Flags that exist for compatibility are hidden in the help, or second names of a flag."""
    page = (DOCS / "coming-from-rwkv-peft.md").read_text(encoding="utf-8")
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    hidden = [option for action in actions if action.help == argparse.SUPPRESS for option in action.option_strings]
    aliases = [option for action in actions for option in action.option_strings[1:]]
    assert len(hidden) > 30
    assert [option for option in [*hidden, *aliases] if not re.search(rf"`[^`\n]*{option}\b", page)] == []


def test_the_defaults_that_differ_are_those_of_the_code():
    page = (DOCS / "coming-from-rwkv-peft.md").read_text(encoding="utf-8")
    defaults = {spec.name: spec.default for owner in SECTIONS.values() for spec in dataclasses.fields(owner)}
    table = page[page.index("## Defaults that differ") :]
    rows = re.findall(r"^\| (`--\w+`.*?) \| .*? \| (.*?) \|$", table[: table.index("```")], re.MULTILINE)
    assert len(rows) > 9
    for flags, shown in rows:
        values = re.sub(r"\(.*?\)|`", "", shown).split(",")
        for flag, value in zip(re.findall(r"`--(\w+)`", flags), values, strict=True):
            default = defaults[flag] if defaults[flag] != () else "none"
            assert value.strip() == str(default) or float(value) == default, flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def commands(page: Path) -> list[list[str]]:
    """The words of each command in a page's code blocks."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?(srun |torchrun |deepspeed |python |\.venv/bin/python )", line):
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_train_commands_have_valid_flags(page):
    for words in commands(page):
        if "train.py" in words:
            flags = words[words.index("train.py") + 1 :]
            known, unknown = build_parser().parse_known_args([word for word in flags if word != "..."])
            assert not unknown, words
            if "configs" in str(getattr(known, "config", "")):
                assert (ROOT / known.config).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_programs_that_exist(page):
    for words in commands(page):
        scripts = [word for word in words if re.fullmatch(r"(tools|demo)/\w+\.py", word)]
        if page.name != "coming-from-rwkv-peft.md":  # also has commands of RWKV-PEFT
            assert all((ROOT / script).exists() for script in scripts), words


def test_the_citation_is_complete():
    """The fields that the Citation File Format 1.2.0 requires, and the version of the package."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("2409.15371v1")
