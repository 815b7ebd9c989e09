"""The server's loop: a whole round, and everything a stranger may send it in the middle of one."""

import sqlite3
from collections import Counter
from contextlib import closing, contextmanager

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.wire import batch, messages, weights
from broker_bridge.wire.envelope import SignKey, random_bytes
from broker_bridge.wire.messages import Busy, Enrol, Go, Init, Join, Need, NeedBlob, Report
from server.fleet.enrolment import add_device
from tests.fleets import TOPICS, World

ROUND = "round"


@pytest.fixture
def arena(worlds):
    """A round that waits for two updates; packets may be larger than any honest one."""
    world = worlds(limits=LinkLimits(262_144, 20))
    world.a, world.b, world.evil = (world.hand(n) for n in ("a", "b", "evil"))
    assert world.tell(cmd="start", target=2)["ok"]
    return world


def everything(world):
    """All that a message could change: the sum, every row of the database, where the run is."""
    with closing(sqlite3.connect(world.home.database)) as db:
        rows = "\n".join(line for line in db.iterdump() if 'INTO "requests"' not in line)
    this = world.ledger._open
    return this and this.sum.digest(), rows, world.coordinator.phase, world.announcement()


@contextmanager
def dropped(world, *reasons):
    """What is sent inside is dropped, counted and changes nothing; then the round completes."""
    before, counted = everything(world), Counter(world.rejected())
    yield
    world.settle()
    assert Counter(world.rejected()) - counted == Counter(reasons)
    assert everything(world) == before
    completes(world)


def completes(world):
    number = world.announcement().round
    for device in (world.a, world.b):
        assert device.upload(device.delta()).status == "accepted"
    assert world.metrics()["round"] == number
    assert world.metrics()["accepted"] == 2
    assert world.ledger.model_version == 2


# ── Rounds ──────────────────────────────────────────────────────────────────────────────


def test_a_round_makes_the_weighted_mean_of_its_updates(arena):
    before = {name: array.copy() for name, array in arena.ledger.model.items()}
    arena.a.upload(arena.a.delta(0.01), examples=10)
    arena.b.upload(arena.b.delta(0.03), examples=30)
    for name, array in arena.ledger.model.items():
        np.testing.assert_allclose(array, before[name] + 0.025, rtol=0, atol=1e-6)
    summary = arena.metrics()
    assert (summary["state"], summary["accepted"], summary["examples"]) == ("closed", 2, 40)


def test_the_closed_round_names_the_new_model(arena):
    completes(arena)
    closed = arena.announcement()
    assert (closed.state, closed.round, closed.model_version) == ("closed", 1, 2)


def test_a_repeated_request_is_answered_again_and_not_carried_out_again(arena):
    first = arena.tell(cmd="stop", id="request-1")
    assert first["ok"]
    assert arena.tell(cmd="start", target=2)["ok"]
    assert arena.tell(cmd="stop", id="request-1") == first
    assert arena.status()["phase"] == "open"


def test_a_start_that_is_refused_is_in_the_log_too(world, caplog):
    reply = world.tell(cmd="start", task="wearable")
    assert f"start: {reply['error']}" in caplog.text


def test_a_roster_that_cannot_be_read_ends_no_server(arena, caplog):
    path = arena.home.folder / "keys" / "roster.json"
    path.write_bytes(b"not a roster")
    with arena.ledger.db.transaction() as tx:
        tx.count_fleet_change()
    arena.pass_time(2)
    assert "roster.json" in caplog.text
    assert arena.status()["phase"] == "open"


@pytest.mark.parametrize("name", ["roster.json", "server.json"])
def test_keys_that_cannot_be_read_end_no_server_when_a_device_asks_for_something(
    arena, caplog, name
):
    """Not even a signature was looked at: anybody in the fleet could have ended it."""
    identity = arena.enrol("new")
    with arena.ledger.db.transaction() as tx:
        tx.set_device_wanted("b", "rotate")
    (arena.home.folder / "keys" / name).write_bytes(b"neither keys nor a roster")
    arena.a.say("renew", b"anything")
    stranger = arena.broker.connect("new")
    forged = Enrol(device="new", kem_public=b"k" * 32, enc=b"e" * 32, sealed=b"s" * 99)
    stranger.publish(TOPICS.up(0, identity.device, "enrol"), messages.encode(forged))
    arena.b.show("idle")
    arena.settle()
    assert name in caplog.text
    assert arena.status()["phase"] == "open"


def test_a_start_of_an_unknown_task_says_which_there_are(world):
    reply = world.tell(cmd="start", task="nonsense")
    assert not reply["ok"]
    assert "'nonsense'" in reply["error"]
    assert "wearables" in reply["error"]
    assert world.status()["phase"] == "idle"


def test_a_blob_that_the_broker_forgot_is_retained_again_when_asked_for(arena):
    lost = arena.broker.retained.pop(TOPICS.model(0))
    need = NeedBlob(kind="model", digest=arena.announcement().model.digest)
    arena.pass_time(10)
    arena.a.say("need", arena.a.sign("need", need))
    assert arena.broker.retained[TOPICS.model(0)].payload == lost.payload


def test_a_blob_that_many_miss_is_retained_again_once(arena):
    need = NeedBlob(kind="model", digest=arena.announcement().model.digest)
    arena.pass_time(10)
    sent = arena.link.bytes_sent
    for device in (arena.a, arena.b, arena.evil):
        device.say("need", device.sign("need", need))
    assert 0 < arena.link.bytes_sent - sent < 2 * arena.announcement().model.total_bytes


def test_a_device_whose_update_is_here_gets_its_receipt_however_often_it_asks(arena):
    init, sealed = arena.a.seal(arena.a.go(), arena.a.delta())
    arena.a.commit(init)
    (receipt,) = arena.a.send(sealed)
    assert arena.a.commit(init) == [receipt]
    assert arena.a.send(sealed) == []
    assert arena.status()["round"]["accepted"] == 1


def at_once(world, names, *, target):
    """Updates of several devices come in together; return what was said to all, in order."""
    devices = [world.hand(name) for name in names]
    assert world.tell(cmd="start", target=target)["ok"]
    ready = [device.seal(device.go(), device.delta()) for device in devices]
    for device, (init, _) in zip(devices, ready, strict=True):
        device.commit(init)
    ear = world.broker.connect("ear")
    ear.subscribe([TOPICS.round, *(TOPICS.down(name, "ack") for name in names)])
    for device, (_, sealed) in zip(devices, ready, strict=True):
        for chunk in sealed.chunks:
            device.link.publish(TOPICS.up(0, device.name, "data"), chunk)
    world.settle()
    for device in devices:
        assert [ack.status for ack in device.listen()] == ["accepted"]
    heard = iter(lambda: ear.receive(0), None)
    return [m for m in heard if isinstance(m, Message) and not m.retained]


def test_receipts_of_one_commit_share_a_signature(worlds):
    world = worlds(limits=LinkLimits(262_144, 200))
    heard = at_once(world, [f"d-{n}" for n in range(7)], target=8)
    parts = [batch.split(m.payload) for m in heard]
    assert [(p.entry, p.last) for p in parts] == [(n, 6) for n in range(7)]
    assert len({p.signature for p in parts}) == 1


def test_the_receipts_are_said_before_the_round_is_that_they_close(worlds):
    world = worlds(limits=LinkLimits(262_144, 200))
    names = ["a", "b", "c"]
    heard = at_once(world, names, target=3)
    assert [m.topic for m in heard] == [*(TOPICS.down(n, "ack") for n in names), TOPICS.round]
    assert world.metrics()["accepted"] == 3


def test_a_refusal_and_a_receipt_of_one_commit_reach_their_devices(worlds):
    world = worlds(limits=LinkLimits(262_144, 200))
    a, b, c = (world.hand(name) for name in "abc")
    assert world.tell(cmd="start", target=3)["ok"]
    for device, fill in ((a, 0.01), (b, float("nan")), (c, 0.01)):
        init, sealed = device.seal(device.go(), device.delta(fill))
        device.commit(init)
        for chunk in sealed.chunks:
            device.link.publish(TOPICS.up(0, device.name, "data"), chunk)
    world.settle()
    said = [[ack.status for ack in device.listen()] for device in (a, b, c)]
    assert said == [["accepted"], ["rejected"], ["accepted"]]


def test_only_what_is_missing_is_asked_for(arena):
    init, sealed = arena.a.seal(arena.a.go(), arena.a.delta())
    (need,) = arena.a.commit(init)
    assert need.bitmap == b"\xff\x0f"
    arena.a.send(sealed, range(10))
    (need,) = arena.a.commit(init)
    assert need.bitmap == b"\x00\x0c"


# ── What a stranger may send, kind by kind ──────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("join", "bad_signature"), ("init", "bad_signature"), ("need", "bad_signature"),
     ("report", "bad_signature"), ("data", "bad_chunk"), ("enrol", "bad_message")],
)  # fmt: skip
def test_garbage_is_dropped(arena, kind, reason):
    with dropped(arena, reason, reason):
        arena.evil.say(kind, b"")
        arena.evil.say(kind, bytes(range(256)))


def test_garbage_with_a_true_signature_is_dropped(arena):
    with dropped(arena, "bad_message"):
        signed = arena.evil.identity.keys.sign.sign(f"join {arena.evil.identity.scope}", b"\xc1")
        arena.evil.say("join", signed)


def test_a_truncated_message_is_dropped(arena):
    join = arena.evil.sign("join", _join(arena))
    with dropped(arena, *["bad_signature"] * len(join)):
        for length in range(len(join)):
            arena.evil.say("join", join[:length])


def test_an_oversized_message_is_dropped(arena):
    with dropped(arena, "too_large", "bad_chunk", "too_large"):
        arena.evil.say("join", bytes(70_000))
        arena.evil.say("data", bytes(200_000))
        arena.evil.say("enrol", bytes(70_000))


def test_a_message_of_another_version_is_dropped(arena):
    later = msgspec.to_builtins(_join(arena), builtin_types=(bytes,)) | {"v": 2}
    payload = msgspec.msgpack.encode(later)
    with dropped(arena, "bad_version"):
        key, scope = arena.evil.identity.keys.sign, arena.evil.identity.scope
        arena.evil.say("join", key.sign(f"join {scope}", payload))


def test_an_unknown_device_is_dropped(arena):
    stranger = arena.broker.connect("stranger")
    key = SignKey.from_seed(random_bytes(32))
    with dropped(arena, "unknown_device", "unknown_device", "unasked_upload"):
        signed = messages.signed(key, "join", "demo/stranger", _join(arena))
        stranger.publish(TOPICS.up(0, "stranger", "join"), signed)
        stranger.publish(TOPICS.state("stranger"), b'{"v":1,"state":"ready","boot":1}')
        _, sealed = arena.a.seal(_go(arena), arena.a.delta())
        stranger.publish(TOPICS.up(0, "stranger", "data"), sealed.chunks[0])


def test_an_unknown_round_is_answered_and_changes_nothing(arena):
    with dropped(arena):
        (busy,) = arena.evil.join(round=99)
        assert isinstance(busy, Busy)
        assert busy.retry_after_s < 0
        init, _ = arena.evil.seal(_go(arena, round=99), arena.evil.delta())
        (ack,) = arena.evil.commit(init)
        assert ack.status == "late"


@pytest.mark.parametrize("scope", ["demo/a", "demo/evil", "other/evil"])
@pytest.mark.parametrize("kind", ["join", "init"])
def test_a_wrong_signature_is_dropped(arena, scope, kind):
    if scope == "demo/evil":
        key = SignKey.from_seed(random_bytes(32))  # another key than the one that enrolled
    else:
        key = arena.evil.identity.keys.sign  # its own, on what was said by or to another
    with dropped(arena, "bad_signature"):
        arena.evil.say(kind, messages.signed(key, kind, scope, _join(arena)))


def test_another_devices_message_under_ones_own_name_is_dropped(arena):
    with dropped(arena, "bad_signature"):
        arena.evil.say("join", arena.a.sign("join", _join(arena)))


def test_a_message_of_one_kind_is_not_taken_for_another(arena):
    with dropped(arena, "bad_signature"):
        arena.evil.say("init", arena.evil.sign("join", _join(arena)))


def test_messages_of_an_earlier_round_replayed_change_nothing(worlds):
    world = worlds()
    world.a, world.b, world.evil = (world.hand(n) for n in ("a", "b", "evil"))
    world.tell(cmd="start", target=2, rounds=2)
    join = world.evil.sign("join", _join(world))
    init, sealed = world.evil.seal(world.evil.go(), world.evil.delta(5.0))
    commit = world.evil.sign("init", init)
    for device in (world.a, world.b):
        device.upload(device.delta())
    assert world.announcement().round == 2
    before = everything(world)
    assert [m.retry_after_s for m in world.evil.say("join", join)] == [-1]
    assert [m.status for m in world.evil.say("init", commit)] == ["late"]
    assert world.evil.send(sealed) == []
    assert world.rejected() == {"unasked_upload": sealed.layout.count}
    assert everything(world) == before


def test_an_upload_that_nobody_asked_for_is_dropped(arena):
    with dropped(arena, "unasked_upload", *["unasked_upload"] * 12):
        go = _go(arena, upload=b"mine-own")
        init, sealed = arena.evil.seal(go, arena.evil.delta())
        assert arena.evil.commit(init) == []
        arena.evil.send(sealed)


def test_an_upload_that_was_given_to_another_is_dropped(arena):
    go = arena.a.go()
    with dropped(arena, "unasked_upload"):
        init, _ = arena.evil.seal(go, arena.evil.delta())
        assert arena.evil.commit(init) == []


def test_a_chunk_for_anothers_upload_is_dropped(arena):
    init, sealed = arena.a.seal(arena.a.go(), arena.a.delta())
    arena.a.commit(init)
    arena.evil.go()
    with dropped(arena, "unasked_upload"):
        assert arena.evil.send(sealed, [0]) == []
        assert arena.a.commit(init)[0].bitmap == b"\xff\x0f"


def test_an_altered_chunk_is_dropped(arena):
    init, sealed = arena.evil.seal(arena.evil.go(), arena.evil.delta())
    arena.evil.commit(init)
    chunk = sealed.chunks[3]
    with dropped(arena, "bad_seal", "bad_seal", "bad_chunk", "bad_chunk"):
        arena.evil.say("data", chunk[:-1] + bytes([chunk[-1] ^ 1]))
        moved = sealed.chunks[4][:24] + chunk[24:]
        arena.evil.say("data", moved)
        arena.evil.say("data", chunk[:-1])
        arena.evil.say("data", chunk + b"\0")


def test_a_changed_commit_is_dropped(arena):
    go = arena.evil.go()
    first, _ = arena.evil.seal(go, arena.evil.delta())
    second, _ = arena.evil.seal(go, arena.evil.delta(0.5))
    arena.evil.commit(first)
    with dropped(arena, "changed_commit"):
        assert arena.evil.commit(second) == []


def test_a_commit_under_a_key_that_must_not_be_used_is_rejected_and_frees_its_place(arena):
    init, _ = arena.evil.seal(arena.evil.go(), arena.evil.delta(), enc=bytes(32))
    with rejected(arena, "bad_key"):
        answers = arena.evil.commit(init)
        assert [a.status for a in answers] == ["rejected"]


def test_a_blob_that_is_not_the_present_one_is_not_sent_again(arena):
    need = NeedBlob(kind="model", digest=b"x" * 32)
    with dropped(arena, "other_round"):
        arena.evil.say("need", arena.evil.sign("need", need))


def test_a_report_that_nobody_waits_for_changes_nothing(arena):
    report = Report(round=1, model_version=1, examples=10**9, metrics={"accuracy": 1.0})
    with dropped(arena):
        arena.evil.say("report", arena.evil.sign("report", report))


def test_presence_that_is_not_presence_is_dropped(arena):
    with dropped(arena, "bad_message", "bad_message", "bad_version"):
        for payload in (b"\xff", b'{"v":1,"state":"here","boot":1}', b'{"v":7,"state":"ready"}'):
            arena.evil.link.publish(TOPICS.state("evil"), payload)
        arena.settle()


def test_a_topic_that_is_none_of_ours_is_dropped(arena):
    with dropped(arena, *["bad_topic"] * 2):
        arena.evil.link.publish("midge/v1/demo/up/0/evil/nonsense", b"x")
        arena.evil.link.publish("midge/v1/demo/up/0/Evil/join", b"x")
        arena.settle()


# ── Updates that are whole, signed, sealed, and nonsense ────────────────────────────────


@contextmanager
def rejected(world, reason):
    """What is sent inside is written down as rejected, and counts nowhere."""
    total, model = world.ledger._open.sum.digest(), world.ledger.model_bytes
    yield
    assert world.rejected() == {reason: 1}
    assert world.ledger._open.sum.digest() == total
    assert world.ledger.model_bytes == model
    assert world.status()["round"]["accepted"] == 0
    with world.ledger.db.reading() as tx:
        assert tx.receipt_counts(1).get("accepted", 0) == 0
    completes(world)


def spoilt(device, how):
    delta = device.delta()
    name = next(iter(delta))
    if how == "wrong_shape":  # as many bytes, and another shape
        delta[name] = delta[name].reshape(delta[name].shape[::-1])
    elif how == "renamed":
        data = weights.encode(delta)
        return data.replace(name.encode(), name.upper().encode(), 1)
    elif how == "garbage":
        return random_bytes(len(weights.encode(delta)))
    else:
        delta[name][0, 0, 0] = how
    return delta


@pytest.mark.parametrize(
    ("how", "reason"),
    [("wrong_shape", "wrong_shape"), ("renamed", "wrong_shape"), ("garbage", "bad_weights"),
     (np.nan, "not_finite"), (np.inf, "not_finite"), (-np.inf, "not_finite"),
     (1e6, "out_of_bounds")],
)  # fmt: skip
def test_an_update_that_is_nonsense_is_rejected(arena, how, reason):
    with rejected(arena, reason):
        assert arena.evil.upload(spoilt(arena.evil, how)).status == "rejected"


@pytest.mark.parametrize(
    ("examples", "reason"),
    [(0, "no_examples"), (100_001, "absurd_examples"), (2**53, "absurd_examples")],
)
def test_zero_or_absurdly_many_examples_are_rejected(arena, examples, reason):
    with rejected(arena, reason):
        assert arena.evil.upload(arena.evil.delta(), examples=examples).status == "rejected"


def test_an_update_of_another_length_is_rejected(arena):
    with rejected(arena, "wrong_size"):
        assert arena.evil.upload(b"short").status == "rejected"


def test_chunks_that_are_not_those_of_the_commit_are_rejected(arena):
    with rejected(arena, "bad_seal"):
        assert arena.evil.upload(arena.evil.delta(), tags=b"x" * 32).status == "rejected"


def test_an_update_sealed_for_another_round_does_not_open(arena):
    go = arena.evil.go()
    init, sealed = arena.evil.seal(
        msgspec.structs.replace(go, announcement=b"x" * 32), arena.evil.delta(),
        announcement=go.announcement,
    )  # fmt: skip
    arena.evil.commit(init)
    with dropped(arena, *["bad_seal"] * sealed.layout.count):
        arena.evil.send(sealed)


# ── Commands that are none ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "payload",
    [b"start", b"", b"\xff\xfe", b"[]", b"null", b'{"cmd":"begin"}', b"{}",
     b'{"cmd":"start","round":5}', b'{"cmd":"start","rounds":0}', b'{"cmd":"start","rounds":"5"}',
     b'{"cmd":"start","until":{"accuracy":2}}', b'{"cmd":"stop","id":7}', b"[" * 60_000],
    ids=lambda p: p[:40].decode("latin1"),
)  # fmt: skip
def test_a_command_that_is_none_is_dropped_and_told_what_to_send(arena, payload):
    with dropped(arena, "bad_message"):
        reply = arena.tell_raw(payload)
        assert not reply["ok"]
        assert '{"cmd":"start"' in reply["error"]


def test_an_oversized_command_is_dropped(arena):
    with dropped(arena, "too_large"):
        assert not arena.tell_raw(b'{"cmd":"stop","id":"' + b"x" * 70_000 + b'"}')["ok"]


def test_a_retained_command_is_dropped(arena):
    """It would be carried out again at each start of the server."""
    arena.tell(cmd="stop")
    arena.operator.publish(TOPICS.ctl, b'{"cmd":"start","target":2}', retain=True)
    arena.settle()  # live, it is carried out
    arena.tell(cmd="stop")
    arena.kill_server()
    arena.start_server()
    assert arena.rejected() == {"retained_command": 1}
    assert arena.status()["phase"] == "idle"


# ── Enrolment ───────────────────────────────────────────────────────────────────────────


def test_enrolments_that_are_none_are_dropped(arena):
    added = add_device(
        arena.home, arena.ledger.db, "new", broker=arena.config.broker, now=arena.now()
    )
    assert added.exists()
    stranger = arena.broker.connect("new")
    forged = Enrol(device="new", kem_public=b"k" * 32, enc=b"e" * 32, sealed=b"s" * 99)
    low = Enrol(device="new", kem_public=bytes(32), enc=bytes(32), sealed=b"s" * 99)
    other = Enrol(device="a", kem_public=b"k" * 32, enc=b"e" * 32, sealed=b"s" * 99)
    with dropped(arena, "bad_seal", "bad_key", "other_device", "unknown_device"):
        for message in (forged, low, other):
            stranger.publish(TOPICS.up(0, "new", "enrol"), messages.encode(message))
        nobody = messages.encode(msgspec.structs.replace(forged, device="nobody"))
        stranger.publish(TOPICS.up(0, "nobody", "enrol"), nobody)


# ── Anything at all ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def besieged(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("siege"), limits=LinkLimits(262_144, 20))
    world.a, world.b, world.evil = (world.hand(n) for n in ("a", "b", "evil"))
    world.tell(cmd="start", target=2)
    yield world
    completes(world)
    world.close()


kinds = st.sampled_from(["join", "init", "need", "report", "data", "enrol", "what"])
numbers = st.one_of(st.integers(-1, 3), st.sampled_from([2**31, 2**53, 2**63]))
blobs = st.sampled_from([b"", b"x" * 8, b"x" * 32, bytes(32)])
fields = st.dictionaries(
    st.sampled_from(
        ["v", "type", *Join.__struct_fields__, *Init.__struct_fields__, *Report.__struct_fields__]
    ),
    st.one_of(numbers, blobs, st.text(max_size=5), st.floats(), st.none()),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=kinds, said=st.one_of(st.binary(max_size=300), fields), signed=st.booleans())
def test_nothing_that_a_device_can_say_stops_the_server(besieged, kind, said, signed):
    before = everything(besieged)
    payload = said if isinstance(said, bytes) else msgspec.msgpack.encode(said)
    if signed:
        identity = besieged.evil.identity
        payload = identity.keys.sign.sign(f"{kind} {identity.scope}", payload)
    besieged.evil.link.publish(f"midge/v1/demo/up/0/evil/{kind}", payload)
    besieged.settle()
    assert everything(besieged) == before


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_nothing_that_is_no_command_stops_the_server(besieged, payload):
    before = everything(besieged)
    assert not besieged.tell_raw(payload)["ok"]
    assert everything(besieged) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_one_bit_changed_in_a_true_message_makes_it_a_false_one(besieged, data):
    join = besieged.evil.sign("join", _join(besieged))
    index = data.draw(st.integers(0, 8 * len(join) - 1))
    altered = bytearray(join)
    altered[index // 8] ^= 1 << index % 8
    before = besieged.rejected().get("bad_signature", 0)
    assert besieged.evil.say("join", bytes(altered)) == []
    assert besieged.rejected()["bad_signature"] == before + 1


def _join(world):
    return Join(
        round=world.announcement().round, announcement=world.a.digest, samples=1,
        packet_bytes_max=8192, inflight_max=20,
    )  # fmt: skip


def _go(world, **changes):
    """A place that was never given."""
    return Go(
        **{
            "round": world.announcement().round, "announcement": world.a.digest,
            "upload": b"invented", "shard": 0, "packet_bytes": 8192, "window": 20,
        } | changes
    )  # fmt: skip


def test_what_is_dropped_is_logged_without_what_was_said(arena, caplog):
    caplog.set_level("DEBUG")
    arena.evil.say("join", b"a secret that is no message" * 3)
    arena.tell_raw(b'{"cmd":"password-123"}')
    assert "dropped a message" in caplog.text
    assert "a secret that is no message" not in caplog.text


def test_a_need_is_answered_only_to_its_device(arena):
    arena.a.go()
    arena.b.go()
    init, _ = arena.a.seal(arena.a.heard[-1], arena.a.delta())
    assert isinstance(arena.a.commit(init)[0], Need)
    assert arena.b.listen() == []
