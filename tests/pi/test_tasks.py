"""The ready task files train alike wherever a device may run them.

Here: Python 3.11 with tflite-runtime. Beside it, always, a Python of 3.12 or newer, where
LiteRT is the only runtime; and under `make pi-test` the Pythons of Raspberry Pi OS Bookworm and
Trixie, which are Debian's, on aarch64.

Two runtimes add the same products in another order, and on aarch64 with fused
multiply-adds: both are right to float32's 6e-8 of each sum. After four steps, measured against what
they changed, the largest difference seen in any tensor of any ready task was 6.5e-6; a wrong
kernel shows at 1e-2 and above. 3e-5 lies between.
"""

import platform
from functools import cache

import numpy as np
import pytest

from broker_bridge.task.taskfile import decode_task
from server.tasks.checks import Result
from tests.pi.comparing import Job, differences, job, train
from tests.pi.debian import CannotFetchError, may_not_skip
from tests.pi.machine import (
    BOOKWORM,
    ROOT,
    TRIXIE,
    TRIXIE_HERE,
    Kind,
    Machine,
    here,
    local_python,
    prepare,
)  # fmt: skip

TOLERANCE = 3e-5
STEPS = 4
READY = {path.stem: path for path in sorted((ROOT / "examples").glob("*/*.task"))}


@cache
def jobs() -> dict[str, Job]:
    return {name: job(*decode_task(path.read_bytes()), steps=STEPS) for name, path in READY.items()}


@pytest.fixture(scope="session")
def trained_here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What the runtime of this Python makes of every ready task."""
    return train(here(), jobs(), tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="session")
def newer() -> Machine:
    """A Python that has no tflite-runtime: this machine's own, or Debian's."""
    try:
        return local_python() or prepare(TRIXIE_HERE)
    except CannotFetchError as error:
        if may_not_skip():
            raise
        pytest.skip(f"no Python 3.12 or newer to try LiteRT with: {error}")


@pytest.fixture(scope="session")
def trained_by_newer(newer: Machine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return train(newer, jobs(), tmp_path_factory.mktemp("newer"))


@pytest.fixture(scope="module", params=[BOOKWORM, TRIXIE], ids=lambda kind: kind.suite)
def pi(request: pytest.FixtureRequest) -> Machine:
    kind: Kind = request.param
    return prepare(kind)


@pytest.fixture(scope="module")
def trained_by_pi(pi: Machine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return train(pi, jobs(), tmp_path_factory.mktemp("pi"))


def assert_alike(name: str, one: Result, other: Result) -> None:
    each = jobs()[name]
    found = differences(each.plan.task, each.start, one, other)
    worst = max(found, key=lambda tensor: found[tensor])
    assert found[worst] <= TOLERANCE, f"{worst} differs by {found[worst]:.1e} on {other.runtime}"


@pytest.mark.parametrize("name", READY)
def test_a_ready_task_trains_alike_on_a_newer_python(
    name: str, trained_here: dict[str, Result], trained_by_newer: dict[str, Result]
) -> None:
    assert trained_by_newer[name].runtime.startswith("ai-edge-litert ")
    assert_alike(name, trained_here[name], trained_by_newer[name])


def test_the_newer_python_has_no_other_runtime(newer: Machine) -> None:
    done = newer.run("-c", "import sys; print(sys.version_info >= (3, 12)); import tflite_runtime")
    assert done.stdout == "True\n"
    assert "No module named 'tflite_runtime'" in done.stderr


@pytest.mark.parametrize("name", READY)
def test_a_difference_is_found(name: str, trained_here: dict[str, Result]) -> None:
    altered = {key: array.copy() for key, array in trained_here[name].arrays.items()}
    start = jobs()[name].start[jobs()[name].plan.task.weights[0].name]
    altered["w0"] += np.float32(1e-3) * np.abs(altered["w0"] - start).max()
    result = Result(altered, "altered", 0.0, (), 0.0)
    with pytest.raises(AssertionError, match="differs by"):
        assert_alike(name, trained_here[name], result)


@pytest.mark.pi
@pytest.mark.parametrize("name", READY)
def test_a_ready_task_trains_alike_on_a_pi(
    name: str, trained_here: dict[str, Result], trained_by_pi: dict[str, Result]
) -> None:
    assert_alike(name, trained_here[name], trained_by_pi[name])


@pytest.mark.pi
def test_it_is_a_pi_that_trained(pi: Machine) -> None:
    assert platform.machine() != "aarch64" or pi.root is not None
    script = "import platform, numpy; print(platform.machine(), platform.python_version())"
    machine, python = pi.run("-c", script).stdout.split()
    assert machine == "aarch64"
    assert f"Python {python.rpartition('.')[0]}," in pi.name
