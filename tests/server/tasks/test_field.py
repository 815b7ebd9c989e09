"""What a task cost the devices in the field: measured there, told by them, read by `inspect`."""

import json
import platform
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from broker_bridge.link.base import Message
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire.messages import Measured, Presence
from server.cli import main as midge_main
from server.tasks import field
from tests.fleets import ROOT, TASK, TOPICS, Fleet, is_refusal, typed

DIGITS = str(ROOT / "examples" / "digits" / "digits.task")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet in which ann and ben have trained the wearables, and eve evaluates."""
    fleet = Fleet(tmp_path_factory.mktemp("trained"))
    try:
        fleet.start()
        fleet.enrol("ann", "ben", "eve")
        listener = fleet.listen(TOPICS.all_states)
        fleet.device("ann")
        fleet.device("ben")
        fleet.device("eve", role="evaluate")
        fleet.start_run(rounds=1, target=2, quorum=2)
        for name in ("ann", "ben"):
            listener.wait(said(name, b"measured"), f"{name} has trained")
        listener.wait(said("eve", b"ready"), "eve is there")
        yield fleet
    finally:
        fleet.stop()


def said(name: str, word: bytes) -> Callable[[Message], bool]:
    return lambda m: m.topic == TOPICS.state(name) and word in m.payload


def inspected(fleet: Fleet, task: object, *options: str) -> Any:
    return fleet.midge("task", "inspect", str(task), "--no-measure", *options)


def test_inspect_says_what_the_task_cost_each_device_that_trained_it(trained: Fleet) -> None:
    done = inspected(trained, TASK, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measured on devices"]
    assert set(found) == {"ann", "ben"}
    for figures in found.values():
        assert figures["machine"] == platform.machine()
        assert figures["runtime"].startswith(("tflite-runtime ", "ai-edge-litert "))
        assert figures["step_ms"] > 0
        assert 20 < figures["peak_mb"] < 2000


def test_inspect_prints_a_row_for_each_device_or_for_one(trained: Fleet) -> None:
    assert "\n    ann  " in inspected(trained, TASK).stdout
    one = inspected(trained, TASK, "--device", "ben").stdout
    assert "\n    ben  " in one
    assert "\n    ann  " not in one


def test_inspect_says_that_no_device_trained_this_task(trained: Fleet) -> None:
    done = inspected(trained, DIGITS)
    assert done.returncode == 0, done.stderr
    assert "none of the 3 connected devices has trained 'digits'" in done.stdout
    assert "the last training was of 'wearables'" in done.stdout
    assert json.loads(inspected(trained, DIGITS, "--json").stdout)["measured on devices"] == {}


def test_a_device_that_is_not_connected_is_named(trained: Fleet) -> None:
    done = inspected(trained, TASK, "--device", "zoe")
    is_refusal(done)
    assert "'zoe' is not connected" in done.stderr


def test_a_device_without_its_fleet_is_refused() -> None:
    done = typed(midge_main, "task", "inspect", str(TASK), "--no-measure", "--device", "ann")
    is_refusal(done)
    assert "--dir" in done.stderr


PLAN, _ = decode_task(TASK.read_bytes())


MEASURED = Measured(
    task="wearables", digest=PLAN.digest.hex()[:16], step_s=0.002, memory_bytes=70_000_000,
    runtime="tflite-runtime 2.14.0", machine="aarch64",
)  # fmt: skip


def presence(**changes: object) -> Presence:
    measured = msgspec.structs.replace(MEASURED, **changes)
    return Presence(state="ready", boot=1, measured=measured)


def test_another_version_of_the_task_is_not_taken_for_this_one() -> None:
    others = {"ann": presence(digest="0" * 16)}
    assert field.figures(others, PLAN) == {}
    assert "another version of 'wearables'" in field.why_none(others, PLAN)
    assert field.why_none({}, PLAN) == "no device is connected"


def test_what_a_device_says_cannot_move_the_cursor() -> None:
    hostile = {"ann": presence(runtime="\x1b[2J", machine="\r\n")}
    assert field.figures(hostile, PLAN)["ann"]["runtime"] == " [2J"
    assert field.figures(hostile, PLAN)["ann"]["machine"] == "  "
