"""Topics: what is built can be taken apart, and nothing else can."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.topics import (
    DOWN_KINDS,
    OPERATOR,
    RESERVED,
    SERVER,
    UP_KINDS,
    DeviceState,
    DownTopic,
    Topics,
    UpTopic,
    is_name,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "topics-v1.json").read_text())

DEMO = Topics("demo")
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True)
SHARDS = st.integers(0, 99_999)
INDICES = st.integers(0, 65_535)

EVERY = {
    "ctl": DEMO.ctl,
    "ctl_reply": DEMO.ctl_reply,
    "srv": DEMO.srv,
    "round": DEMO.round,
    "metrics": DEMO.metrics,
    "identity": DEMO.identity,
    "task": DEMO.task(0),
    "model": DEMO.model(65_535),
    "state": DEMO.state("anna-7"),
    **{f"up {kind}": DEMO.up(3, "anna-7", kind) for kind in sorted(UP_KINDS)},
    **{f"down {kind}": DEMO.down("anna-7", kind) for kind in sorted(DOWN_KINDS)},
    "all_tasks": DEMO.all_tasks,
    "all_models": DEMO.all_models,
    "all_states": DEMO.all_states,
    "all_up": DEMO.all_up(3),
    "all_down": DEMO.all_down("anna-7"),
}
FILTERS = {name for name in EVERY if name.startswith("all_")}


def refused(topics: Topics, topic: str) -> bool:
    with pytest.raises(PeerError) as caught:
        topics.parse(topic)
    return caught.value.reason == "bad_topic"


@settings(deadline=None)
@given(NAMES, SHARDS, NAMES, st.sampled_from(sorted(UP_KINDS)))
def test_a_topic_from_a_device_comes_apart_as_it_was_built(
    federation: str, shard: int, device: str, kind: str
) -> None:
    topics = Topics(federation)
    assert topics.parse(topics.up(shard, device, kind)) == UpTopic(shard, device, kind)


@settings(deadline=None)
@given(NAMES, NAMES, st.sampled_from(sorted(DOWN_KINDS)))
def test_a_topic_to_a_device_comes_apart_as_it_was_built(
    federation: str, device: str, kind: str
) -> None:
    topics = Topics(federation)
    assert topics.parse(topics.down(device, kind)) == DownTopic(device, kind)
    assert topics.parse(topics.state(device)) == DeviceState(device)


@settings(deadline=None)
@given(NAMES, INDICES)
def test_a_topic_without_a_device_comes_apart_as_its_name(federation: str, index: int) -> None:
    topics = Topics(federation)
    assert topics.parse(topics.task(index)) == "task"
    assert topics.parse(topics.model(index)) == "model"
    for plain in ("ctl", "srv", "round", "metrics", "identity"):
        assert topics.parse(getattr(topics, plain)) == plain
    assert topics.parse(topics.ctl_reply) == "ctl/reply"


@pytest.mark.parametrize("name", [n for n in EVERY if n not in FILTERS])
def test_a_topic_cut_short_is_never_taken_for_the_whole(name: str) -> None:
    numbered = {DEMO.model(index) for index in (6, 65, 655, 6553)}
    for n in range(len(EVERY[name])):
        cut = EVERY[name][:n]
        if cut not in {DEMO.ctl, *numbered}:  # these are topics in their own right
            assert refused(DEMO, cut)


def test_the_frozen_topics_of_version_1_are_still_spoken() -> None:
    assert EVERY == VECTORS


def test_no_topic_has_more_slashes_than_the_pickiest_broker_takes() -> None:
    assert max(topic.count("/") for topic in EVERY.values()) <= 7


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_a_filter_is_not_a_topic(name: str) -> None:
    assert refused(DEMO, EVERY[name])


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/",
        "midge/v1/demo",
        "midge/v1/demo/",
        "midge/v2/demo/ctl",
        "midge/v1/demo2/ctl",  # another federation that begins like ours
        "midge/v1/dem/ctl",
        "midge/v1/other/up/0/anna/join",
        "midge/v1/demo/ctl/",
        "midge/v1/demo/ctl/reply/more",
        "midge/v1/demo/up/0/anna/ack",  # what only the server says
        "midge/v1/demo/down/anna/data",  # what only a device says
        "midge/v1/demo/up/0/anna",
        "midge/v1/demo/up/0/anna/join/again",
        "midge/v1/demo/up//anna/join",
        "midge/v1/demo/up/-1/anna/join",
        "midge/v1/demo/up/1e3/anna/join",
        "midge/v1/demo/up/100000/anna/join",
        "midge/v1/demo/up/٣/anna/join",  # a digit, but not one of ours
        "midge/v1/demo/up/0/Anna/join",
        "midge/v1/demo/up/0/-anna/join",
        "midge/v1/demo/up/0/anna-/join",
        "midge/v1/demo/up/0/an na/join",
        "midge/v1/demo/up/0/anna\n/join",
        "midge/v1/demo/up/0/../join",
        "midge/v1/demo/up/0//join",
        "midge/v1/demo/up/0/ä/join",
        f"midge/v1/demo/up/0/{'a' * 41}/join",
        "midge/v1/demo/dev//state",
        "midge/v1/demo/dev/anna/status",
        "midge/v1/demo/task/",
        "midge/v1/demo/model/latest",
        "$SYS/broker/clients/total",
    ],
)
def test_a_forged_topic_is_refused(topic: str) -> None:
    assert refused(DEMO, topic)


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_other_text_is_refused_whole_or_as_a_name(text: str) -> None:
    assert refused(DEMO, text)
    if not is_name(text):
        assert refused(DEMO, f"midge/v1/demo/up/0/{text}/join")


@pytest.mark.parametrize("federation", ["", "+", "#", "a/b", "Demo", "-a", "a" * 41, "a\n"])
def test_a_federation_has_a_name_that_fits_one_level(federation: str) -> None:
    with pytest.raises(ValueError, match="federation"):
        Topics(federation)


def test_the_servers_own_names_are_reserved_and_could_be_a_devices() -> None:
    assert {SERVER, OPERATOR} <= RESERVED
    assert all(is_name(name) for name in RESERVED)
