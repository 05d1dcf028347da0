"""The architecture's one law: imports point down only (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "RWKV-PEFT" / "rwkv_peft"

LEVELS = [
    {"errors", "console"},
    {"files", "metrics_history"},
    {"config"},
    {"ops", "base_model", "devices"},
    {"model", "peft", "data"},
    {"adapted_model", "run_config"},
    {"export", "inference", "evaluation", "memory", "report"},
    {"training"},
    {"commands"},
    {"__main__"},
]
"""Lowest first. Parts of one level do not import each other."""
HEAVY_ONLY_IN = {"pytorch_lightning": {"training", "data/datamodule.py"}, "deepspeed": {"training"}}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: wildcard import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE) != Path("__init__.py"))


def test_the_package_was_found():
    assert len(FILES) > 20
    levels = set().union(*LEVELS)
    assert {part_of(path) for path in FILES} == levels


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    own = part_of(path)
    for module in imports(path):
        if not module.startswith("rwkv_peft."):
            continue
        other = module.split(".")[1]
        if other != own and other in level:
            assert level[other] < level[own], f"{path.relative_to(PACKAGE)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lightning_and_deepspeed_stay_where_they_belong(path):
    relative = str(path.relative_to(PACKAGE))
    for module in imports(path):
        allowed = HEAVY_ONLY_IN.get(module.split(".")[0])
        if allowed is not None:
            assert part_of(path) in allowed or relative in allowed, f"{relative} imports {module}"
