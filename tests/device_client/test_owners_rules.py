"""What the owner's rules do to a round, to a whole device, and to the models that it keeps."""

import json

import pytest

from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import weights
from broker_bridge.wire.messages import Join
from device_client import model as models
from device_client.eligibility import Readings, Rules, judge
from device_client.events import (
    Eligible,
    Fetch,
    Fetched,
    LinkUp,
    Remember,
    Room,
    Send,
    SendChunks,
    Stop,
    Tick,
    Train,
)
from device_client.model import Model
from device_client.participant import State
from tests.device_client.rounds import (
    CHUNKS,
    MODEL,
    ROUND,
    TASK,
    UPLOAD,
    at,
    closing,
    commit_for,
    device,
    evaluator,
    go_for,
    kinds,
    need,
    opening,
)
from tests.fleets import DEVICE, TOPICS, run, wait_until, write_samples

HOT = Eligible("the temperature is 82 °C; the rule is: temperature at most 70 °C")
METERED = Eligible("the network is metered", "the network is metered")
FINE = Eligible()


# ── A round, seen from the device ───────────────────────────────────────────────────────


def test_a_device_that_may_not_work_does_not_join_and_says_why() -> None:
    made = device()
    made.step(HOT)
    assert kinds(made.step(ROUND)) == [Remember]
    assert made.state is State.WAITING
    assert made.detail == HOT.against
    assert made.step(Tick(100.0)) == []


def test_it_joins_the_round_that_is_still_open_when_it_may_again() -> None:
    made = device()
    made.step(HOT)
    made.step(ROUND)
    made.step(FINE)
    (join,) = made.step(Tick(200.0))
    assert isinstance(join, Send)
    assert isinstance(join.message, Join)
    assert made.detail == ""


@pytest.mark.parametrize("state", [State.FETCHING, State.TRAINING])
@pytest.mark.parametrize("why", [HOT, METERED])
def test_work_stops_at_once_and_begins_again_in_the_same_round(state, why) -> None:
    made = at(state)
    assert made.step(why) == [Stop(why.against)]
    assert (made.state, made.detail) == (State.WAITING, why.against)
    assert made.step(Tick(50.0)) == []
    made.step(FINE)
    assert isinstance(made.step(Tick(51.0))[0].message, Join)
    made.step(go_for(ROUND))
    made.step(Fetched("task", TASK.digest))
    assert kinds(made.step(Fetched("model", MODEL.digest))) == [Train]


def test_a_join_that_was_answered_too_late_starts_nothing() -> None:
    made = at(State.JOINING)
    made.step(HOT)
    assert made.step(go_for(ROUND)) == []
    assert made.state is State.WAITING


def test_a_round_that_ends_meanwhile_is_over_for_it() -> None:
    made = at(State.TRAINING)
    made.step(HOT)
    made.step(closing())
    assert made.step(FINE) == []
    assert made.step(Tick(1000.0)) == []
    assert made.memory.done


def test_many_that_may_work_again_at_one_hour_do_not_come_at_once() -> None:
    made = device(draw=lambda: 0.5)
    made.step(HOT)
    made.step(opening(jitter_s=40.0))
    made.step(Tick(100.0))
    made.step(FINE)
    assert made.step(Tick(119.0)) == []
    assert kinds(made.step(Tick(120.1))) == [Send]


def test_a_sealed_update_is_sent_though_the_device_is_hot() -> None:
    made = at(State.UPLOADING)
    assert made.step(HOT) == []
    made.step(need(*range(CHUNKS)))
    assert kinds(made.step(Room(100))) == [SendChunks]


def test_a_sealed_update_waits_for_a_network_that_the_owner_allows() -> None:
    made = at(State.UPLOADING)
    made.step(need(*range(CHUNKS)))
    made.step(METERED)
    assert made.step(Room(100)) == []
    assert made.step(Tick(100.0)) == []
    assert made.step(LinkUp(8192, 20)) == []
    assert made.step(FINE) == [Send(commit_for(ROUND))]
    made.step(need(*range(CHUNKS)))
    assert made.step(Room(100)) == [SendChunks(UPLOAD, tuple(range(CHUNKS)))]


def test_a_device_that_evaluates_puts_it_off() -> None:
    made = evaluator()
    made.step(HOT)
    assert Fetch not in kinds(made.step(closing(1, model_version=2)))
    assert Fetch in kinds(made.step(FINE))
    assert made.step(HOT) == [Stop(HOT.against)]
    assert Fetch in kinds(made.step(FINE))


# ── A whole device ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def ruled(world, tmp_path):
    """A device whose temperature a test sets."""
    world.temperature_c = 40.0

    def judged(samples):
        readings = Readings(clock=None, temperature_c=world.temperature_c, samples=samples)
        return judge(Rules(temperature_max_c=70.0), readings)

    data = write_samples(tmp_path / "ann.npz", seed=1, rows=2000)
    agent = world.agent("ann", data=data, judged=judged, keeps_model=True)
    world.other = world.hand("ben")
    world.settle()
    return agent


def state_of(world):

    return json.loads(world.broker.retained[TOPICS.state("ann")].payload)


def test_a_device_that_gets_hot_while_training_stops_and_finishes_the_round_later(world, ruled):
    assert world.tell(cmd="start", target=2)["ok"]
    world.until(lambda: ruled.state is State.TRAINING, "it trains")
    world.temperature_c = 90.0
    world.pass_time(1.1)
    assert ruled.state is State.WAITING
    assert not ruled._bench.background.stop(), "no work goes on"
    world.pass_time(1.1)
    assert "90 °C" in state_of(world)["detail"]
    world.temperature_c = 60.0
    world.pass_time(2.0)
    world.until(lambda: world.status()["round"]["accepted"] == 1, "its update")
    assert world.other.upload(world.other.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2


def test_the_newest_model_is_where_its_programs_look(world, ruled):
    assert world.tell(cmd="start", target=2)["ok"]
    folder = world.folder / "ann"
    world.until(lambda: world.status()["round"]["accepted"] == 1, "its update")
    assert models.kept(folder, "global") == 1
    assert world.other.upload(world.other.delta()).status == "accepted"
    world.until(lambda: models.kept(folder, "global") == 2, "the new model")
    model = Model.open(folder)
    assert weights.encode(model._weights) == world.ledger.model_bytes
    assert (model.version, model.task) == (2, "wearables")
    decode_task((folder / "model" / "global.task").read_bytes())


def test_status_shows_each_rule_its_reading_and_its_verdict(fleet, tmp_path):
    fleet.enrol("ann")
    folder = fleet.folder / "ann"
    busy = tmp_path / "in-use"
    (folder / "device.toml").write_text(
        f"[eligibility]\nunless_file = '{busy}'\nmemory_min_mb = 1\nbattery_min = 0.99\n"
    )
    said = json.loads(run(*DEVICE, "status", "--dir", str(folder), "--json").stdout)
    verdicts = {v["rule"]: v for v in said["eligibility"]}
    assert verdicts["free memory at least 1 MB"]["holds"]
    assert verdicts[f"not while {busy} is there"]["holds"]
    busy.touch()
    plain = run(*DEVICE, "status", "--dir", str(folder)).stdout
    assert f"NOT NOW      {busy} is there" in plain


def test_a_real_device_waits_while_a_file_says_that_the_machine_is_in_use(fleet, tmp_path):
    busy = tmp_path / "in-use"
    busy.touch()
    fleet.enrol("ann")
    (fleet.folder / "ann" / "device.toml").write_text(f"[eligibility]\nunless_file = '{busy}'\n")
    ann = fleet.device("ann")
    ann.wait_for("connected")
    fleet.start_run(task="wearables", rounds=1, target=1, quorum=1)
    wait_until(lambda: "in-use is there" in fleet.state_of("ann").get("detail", ""), "it says why")
    busy.unlink()
    ann.wait_for("accepted")
    wait_until(lambda: models.kept(fleet.folder / "ann", "global") == 2, "the model is kept")
