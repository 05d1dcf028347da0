"""Options of the suite, and what several of its parts need."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-kills", action="store_true", help="all 50 kills of tests/training/checkpoint/test_kills.py")


@pytest.fixture
def one_thread():
    """Small operators on threads that share their cores wait far longer than they compute (20x, measured with a second
    busy process on two cores); and one thread has one order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
