"""What the tests of all Python clients share. It runs in their environments, not in the project's."""

import os

import pytest


@pytest.fixture(scope="session")
def model() -> str:
    """The served model's name."""
    return os.environ["PENSTOCK_MODEL"]
