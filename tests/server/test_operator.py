"""The operator's side of the control topics, against a real server."""

import threading

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.wire.messages import Command
from broker_bridge.wire.topics import DeviceState
from server.operator import Operator
from tests.fleets import FEDERATION, TOPICS, Fleet


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("served"))
    try:
        yield fleet.start()
    finally:
        fleet.stop()


@pytest.fixture
def operators(served):
    made = []

    def connect():
        made.append(Operator(served.home.access("operator"), federation=FEDERATION))
        return made[-1]

    yield connect
    for each in made:
        each.close()


def test_a_question_gets_its_own_answer(operators):
    operator = operators()
    reply = operator.ask(Command(cmd="status", id="mine"))
    assert (reply.ok, reply.id, reply.status["phase"]) == (True, "mine", "idle")


def test_two_operators_at_once_hear_each_their_own(operators):
    found = {}

    def ask(name):
        operator = operators()
        for i in range(5):
            reply = operator.ask(Command(cmd="status", id=f"{name}-{i}"))
            found[f"{name}-{i}"] = reply.id

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 10
    assert all(name == answered for name, answered in found.items())


def test_replies_to_others_and_garbage_are_passed_over(served, operators):
    operator = operators()
    listener = served.listen(TOPICS.ctl_reply)
    served.publish(TOPICS.ctl, "garbage")
    listener.wait_for_json(TOPICS.ctl_reply, ok=False)
    assert operator.ask(Command(cmd="status", id="mine")).id == "mine"


def test_a_refusal_says_why(operators):
    reply = operators().ask(Command(cmd="stop", id="nothing-to-stop"))
    assert not reply.ok
    assert "no run is open" in reply.error


def test_watching_shows_devices_and_the_server(served, operators):
    served.enrol("ann")
    served.device("ann")
    seen = {}
    for topic, payload in operators().watch(lambda: len(seen) >= 2):
        if isinstance(TOPICS.parse(topic), DeviceState) and b"ready" in payload:
            seen["ann"] = payload
        elif topic == TOPICS.srv:
            seen["server"] = payload
    assert b"online" in seen["server"]


def test_a_server_that_does_not_answer_is_named(served, operators):
    operator = operators()
    served.server.freeze()
    try:
        with pytest.raises(LinkError, match="midge server"):
            operator.ask(Command(cmd="status", id="later"), wait_s=0.5)
        with pytest.raises(LinkError, match="may carry out this pause then"):
            operator.ask(Command(cmd="pause", id="late, too"), wait_s=0.5)
    finally:
        served.server.thaw()


def test_an_operator_leaves_nothing_behind(served, operators):
    operators().ask(Command(cmd="status", id="x"))
    listener = served.listen("midge/v1/demo/#", who="server")
    listener.wait_for_json(TOPICS.srv, state="online")
    assert TOPICS.ctl not in {m.topic for m in listener.hear() if m.retained}
    assert TOPICS.ctl_reply not in {m.topic for m in listener.hear() if m.retained}
