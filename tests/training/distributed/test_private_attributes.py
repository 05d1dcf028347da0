"""Only training/distributed/ uses what DeepSpeed and Lightning do not document.

versions.py checks that their versions are the tested ones, because such attributes may change with every release.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rwkv_peft.training

TRAINING = Path(rwkv_peft.training.__file__).parent
DEEPSPEED = {
    "bit16_groups",
    "check_grad_overflow",
    "check_overflow",
    "combine_grad_norm_groups",
    "deepspeed_engine",
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_tensor",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_position",
    "lp_fragment_address",
    "hp_fragment_address",
    "scaled_global_norm",
    "set_gradient_accumulation_boundary",
    "single_partition_of_fp32_groups",
    "sub_group_to_group_id",
}
"""Attributes of DeepSpeed's engine, optimizers and parameters whose names do not start with an underscore."""


def private_uses(source: str) -> Iterator[str]:
    """Yield the private attributes that code uses on other objects than its own, and every mention of DeepSpeed's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            if node.attr in DEEPSPEED or (is_private(node.attr) and not is_own(node.value)):
                yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Constant) and node.value in DEEPSPEED:  # hasattr, getattr
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.partition(".")[0] == "deepspeed" for name in modules):
                yield f"line {node.lineno}: import of deepspeed"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(value: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        value = value.func
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


@pytest.mark.parametrize(
    "source",
    [
        "parameter.ds_id",
        "hasattr(optimizer, 'grad_position')",
        "parameter._hp_mapping",
        "self.trainer._checkpoint_connector",
        "import deepspeed",
        "from deepspeed.runtime import utils",
    ],
)
def test_private_uses_are_found(source):
    assert list(private_uses(source))


@pytest.mark.parametrize("source", ["self._own", "cls._own", "super()._own()", "x.__class__", "_local", "a.public"])
def test_own_attributes_are_allowed(source):
    assert not list(private_uses(source))


def test_only_distributed_uses_private_attributes():
    files = [path for path in TRAINING.rglob("*.py") if "distributed" not in path.relative_to(TRAINING).parts]
    assert len(files) > 20
    found = [f"{path.relative_to(TRAINING)}, {use}" for path in files for use in private_uses(path.read_text())]
    assert not found
