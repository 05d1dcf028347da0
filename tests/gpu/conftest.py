"""Settings for checks that run on the CPU too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """See tests/conftest.py."""


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an element that no one writes shows."""
    torch.use_deterministic_algorithms(True)  # also switches on torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
