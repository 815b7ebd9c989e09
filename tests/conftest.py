"""Fixtures for whole fleets; `tests.fleets` says what they are made of."""

import pytest
from hypothesis import HealthCheck, settings

from tests.fleets import Fleet, World

# A busy machine is no fault of the code: nothing here is asserted about how long it took.
settings.register_profile("midge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("midge")


@pytest.fixture
def world(tmp_path):
    """A server over an in-memory broker, in this process."""
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def worlds(tmp_path):
    """Makes worlds with settings of a test's own: `worlds(rounds={"deadline_s": 5})`."""
    made = []

    def make(**options):
        made.append(World(tmp_path / str(len(made)), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def fleets(tmp_path):
    """Makes fleets of real processes, and ends every one of them after the test."""
    made = []

    def make(*, settings=""):
        made.append(Fleet(tmp_path / f"fleet-{len(made)}", settings=settings))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def fleet(fleets):
    """A broker and a server that run."""
    return fleets().start()
