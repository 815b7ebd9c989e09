"""What a server has after it died: the same run, the same round, the same bits."""

import shutil

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import decode_task, encode_plan, encode_task
from broker_bridge.wire import weights
from broker_bridge.wire.messages import Need, Until
from server.ledger import Ledger
from tests.fleets import TASK, TOPICS


def restart(world):
    world.kill_server()
    world.start_server()


def three(world):
    return [world.hand(name) for name in ("a", "b", "c")]


def model_after(world, order, *, crash_after=()):
    """The model that three updates make, with the server killed on the way."""
    hands = dict(zip("abc", three(world), strict=True))
    world.tell(cmd="start", target=3)
    for count, name in enumerate(order, start=1):
        fill = {"a": 0.1, "b": -0.07, "c": 0.003}[name]
        assert hands[name].upload(hands[name].delta(fill)).status == "accepted"
        if count in crash_after:
            restart(world)
    assert world.metrics()["accepted"] == 3
    return world.ledger.model_bytes


@pytest.mark.parametrize(
    ("order", "crash_after"), [("cba", ()), ("abc", (1,)), ("bca", (1, 2)), ("acb", (2,))]
)
def test_the_same_updates_make_the_same_bits_in_any_order_and_after_any_crash(
    worlds, order, crash_after
):
    undisturbed = model_after(worlds(), "abc")
    assert model_after(worlds(), order, crash_after=crash_after) == undisturbed


def test_the_round_goes_on_under_its_number_key_and_announcement(world):
    three(world)
    world.tell(cmd="start", target=3, rounds=4, until={"accuracy": 0.9}, deadline_s=77.0)
    before = world.announcement()
    restart(world)
    assert world.announcement() == before
    assert world.status()["round"]["number"] == 1
    run = world.coordinator.run
    assert (run.rounds, run.until, run.deadline_s) == (4, Until(accuracy=0.9), 77.0)


def test_abandoned_rounds_are_counted_over_a_restart(world):
    three(world)
    world.tell(cmd="start", target=3, rounds=9, deadline_s=60)
    for left in (2, 1):
        world.pass_time(61)
        restart(world)
        assert world.coordinator.run.abandoned_in_a_row == 3 - left
        world.pass_time(1)
    world.pass_time(61)
    assert world.coordinator.run is None
    assert "3 rounds in a row were abandoned" in world.status()["detail"]


def test_what_was_dropped_is_counted_over_a_restart(world):
    a, *_ = three(world)
    world.tell(cmd="start", target=3)
    a.link.publish(TOPICS.up(0, "a", "data"), b"nonsense")
    world.settle()
    world.pass_time(61)
    before = world.rejected()
    assert sum(before.values()) == 1
    restart(world)
    assert world.rejected() == before
    world.pass_time(61)
    restart(world)
    assert world.rejected() == before


def test_an_upload_in_mid_way_sends_only_what_is_missing(world):
    a, *_ = three(world)
    world.tell(cmd="start", target=3)
    init, sealed = a.seal(a.go(), a.delta())
    a.commit(init)
    a.send(sealed, range(5))
    restart(world)
    (need,) = a.commit(init)
    assert isinstance(need, Need)
    assert need.bitmap == b"\xe0\x0f"
    assert a.send(sealed, range(5, 12))[-1].status == "accepted"


def test_chunks_before_the_commit_is_repeated_are_dropped(world):
    a, *_ = three(world)
    world.tell(cmd="start", target=3)
    init, sealed = a.seal(a.go(), a.delta())
    a.commit(init)
    restart(world)
    assert a.send(sealed, [0]) == []
    assert world.rejected() == {"unasked_upload": 1}


def test_a_replaced_attempt_does_not_hide_the_update_that_was_accepted(world):
    a, b, _ = three(world)
    world.tell(cmd="start", target=2)
    for _ in range(3):  # lost its outbox three times
        init, _ = a.seal(a.go(), a.delta())
        a.commit(init)
    assert a.upload(a.delta()).status == "accepted"
    restart(world)
    assert world.status()["round"]["accepted"] == 1
    assert b.upload(b.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2


def test_a_rejected_update_stays_rejected_over_a_restart(world):
    a, *_ = three(world)
    world.tell(cmd="start", target=3)
    assert a.upload(a.delta(1e6)).status == "rejected"
    restart(world)
    assert a.join()[0].status == "rejected"
    assert world.status()["round"]["accepted"] == 0


def test_no_round_is_opened_when_the_last_one_was_done_before_the_crash(world):
    a, b, _ = three(world)
    world.hand("e", role="evaluate")
    world.tell(cmd="start", target=2, rounds=1)
    for device in (a, b):
        device.upload(device.delta())
    assert world.status()["phase"] == "evaluating"
    restart(world)
    world.pass_time(120)
    assert world.status()["phase"] == "idle"
    assert world.ledger.model_version == 2
    with world.ledger.db.reading() as tx:
        assert tx.highest_round() == 1
        assert tx.latest_run().status == "done"


def test_a_paused_run_is_paused_after_a_restart(world):
    three(world)
    world.tell(cmd="start", target=3, rounds=2)
    world.tell(cmd="pause")
    restart(world)
    assert world.status()["phase"] == "paused"


def test_a_run_that_ended_is_not_taken_up(world):
    three(world)
    world.tell(cmd="start", target=3)
    world.tell(cmd="stop")
    restart(world)
    assert world.status()["phase"] == "idle"
    assert not list((world.home.state / "spool").iterdir())


def test_a_chunk_torn_on_our_disk_is_asked_for_again(world):
    a, *_ = three(world)
    world.tell(cmd="start", target=3)
    init, sealed = a.seal(a.go(), a.delta())
    a.commit(init)
    a.send(sealed, range(11))
    (path,) = (world.home.state / "spool").iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(sealed.chunks[3]) + 500] ^= 1
    path.write_bytes(data)
    restart(world)
    (need,) = a.commit(init)
    assert need.bitmap == b"\x00\x08"
    (ack,) = a.send(sealed, [11])
    assert ack.status == "resend"
    (need,) = a.commit(init)
    assert need.bitmap == b"\x08\x00"
    assert a.send(sealed, [3])[-1].status == "accepted"


def test_upload_ids_are_the_same_after_a_restart_and_differ_for_each_device_and_round(worlds):
    world, other = worlds(), worlds()
    for each in (world, other):
        each.hand("a")
        each.tell(cmd="start", target=1)
    ids = world.ledger.upload_ids("a")
    assert len({*ids, *world.ledger.upload_ids("b"), *other.ledger.upload_ids("a")}) == 3 * len(ids)
    restart(world)
    assert world.ledger.upload_ids("a") == ids


def test_the_rounds_key_is_gone_when_the_round_is(world):
    hands = three(world)
    world.tell(cmd="start", target=3)
    key = world.ledger._open.key.seed
    for device in hands:
        device.upload(device.delta())
    with world.ledger.db.reading() as tx:
        assert tx.round(1).round_key is None
    world.kill_server()
    for path in world.home.state.rglob("*"):
        assert not path.is_file() or key not in path.read_bytes(), path
    world.start_server()


def test_a_task_file_that_was_changed_under_a_run_is_a_clear_error(world):
    three(world)
    world.tell(cmd="start", target=3)
    plan, initial = decode_task(TASK.read_bytes())
    other = type(plan.task)(**{f: getattr(plan.task, f) for f in plan.task.__struct_fields__}
                            | {"description": "another"})  # fmt: skip
    path = world.home.folder / "tasks" / "wearables.task"
    path.write_bytes(encode_task(other, plan.tflite, weights.encode(initial)))
    world.kill_server()
    with pytest.raises(LocalError, match="was changed while run 1 was open"):
        world.start_server()
    shutil.copy(TASK, path)
    world.start_server()
    assert world.status()["phase"] == "open"
    assert encode_plan(plan.task, plan.tflite) == world.ledger.task.plan_bytes


def test_a_model_that_a_broker_with_tiny_packets_cannot_carry_is_one_sentence(world):
    world.ledger.announcer.packet_bytes = 297  # one byte of the model in each
    reply = world.tell(cmd="start", target=1)
    assert not reply["ok"]
    assert "max_packet_size" in reply["error"]
    assert world.status()["phase"] == "idle"


def test_a_task_is_found_again_by_the_name_of_its_file(world):
    three(world)
    (world.home.folder / "tasks" / "wearables.task").rename(
        world.home.folder / "tasks" / "my-own-name.task"
    )
    assert world.tell(cmd="start", task="my-own-name", target=3)["ok"]
    restart(world)
    assert world.status()["run"]["task"] == "my-own-name"


def test_a_second_run_goes_on_from_the_last_model(world):
    hands = three(world)
    for expected in (2, 3):
        world.tell(cmd="start", target=3)
        for device in hands:
            device.upload(device.delta())
        assert world.ledger.model_version == expected
    world.kill_server()
    ledger = Ledger(world.home, world.config, clock=world.now)
    with ledger.db.reading() as tx:
        assert [m.version for m in tx.models()] == [3, 2, 1]
    ledger.close()
    world.start_server()
