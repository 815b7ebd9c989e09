"""What several tests of the server start from."""

import pytest

from server.fleet.home import create


class Clock:
    """A clock that a test turns."""

    def __init__(self):
        self.s = 0.0

    def __call__(self):
        return self.s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def home(tmp_path):
    return create(tmp_path / "fleet", federation="demo", hosts=["localhost"], port=1)
