import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled(lightly_compiled):
    """These tests run their programs once or twice."""
