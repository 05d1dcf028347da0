"""One thread unless a test asks for more."""

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """See tests/conftest.py."""
