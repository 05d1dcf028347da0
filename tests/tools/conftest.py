"""Imports the programs of tools/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def load_tool(monkeypatch):
    """Return a function that imports a program: `load_tool("bench_ops")`."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the programs change it

    def load(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses need it there
        spec.loader.exec_module(module)
        return module

    return load
