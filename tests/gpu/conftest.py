"""Settings for checks that run on the CPU too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As in tests/ops: small operators on threads that share their cores wait far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an element that no one writes shows."""
    torch.use_deterministic_algorithms(True)  # also switches on torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
