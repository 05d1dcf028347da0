"""Fixtures of the tests that run on the CPU and on a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """See tests/conftest.py."""


@pytest.fixture
def poisoned_memory():
    """Make torch.empty return NaN, so that an element that is never written is noticed."""
    torch.use_deterministic_algorithms(True)  # also switches on torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
