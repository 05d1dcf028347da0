"""One thread for each pytest worker, and fixtures that several parts of the suite need."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that share cores with another worker's mostly wait for each other: small runs take up to 20 times as long.
    # Set before torch is imported, and inherited by the programs that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def one_thread():
    """Use one thread: it is faster for small operators on busy cores, and sums have a fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
