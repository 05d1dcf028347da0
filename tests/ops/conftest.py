"""One thread unless a test asks for more: small operators on threads that share their cores wait far longer than they
compute (20x, measured with a second busy process on two cores)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
