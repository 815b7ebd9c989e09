"""A device is stolen: real processes over a real mosquitto, from the theft to the next round."""

import json
import shlex
import shutil

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.base import Disconnected, Message
from broker_bridge.link.local_broker import LocalBroker
from broker_bridge.link.paho_link import PahoLink
from device_client import identity as identities
from tests.fleets import MIDGE, TOPICS, Fleet, run, wait_until


@pytest.fixture
def fleet(fleets):
    """A fleet whose broker is `midge broker`, and with it a server and three devices."""
    made = fleets(settings="[rounds]\nquorum = 1\n")
    made.log = made.folder / "midge-broker.log"
    made.mosquitto = made._run(made.log, *MIDGE, "broker", "--dir", str(made.home.folder))
    made.mosquitto.wait_for("mosquitto listens on")
    made.start_server()
    made.enrol("ann", "ben", "eve")
    return made


def asked(fleet: Fleet, *arguments: str):
    done = fleet.midge("device", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def thief(fleet: Fleet, name: str, **options) -> PahoLink:
    """A connection with all that is on a device's card."""
    folder = fleet.folder / f"{name}-card"
    if not folder.exists():
        shutil.copytree(fleet.folder / name, folder)
    found = identities.load(folder)
    link = PahoLink.open(
        "localhost", fleet.port, client_id=f"{name}-thief", tls=identities.tls_files(folder, found),
        session_s=0, **{"backoff_first_s": 0.05, "backoff_max_s": 0.2, "wait_s": 20.0} | options,
    )  # fmt: skip
    fleet.links.append(link)
    return link


def hear(link: PahoLink, kind: type) -> object:
    def heard():
        event = link.receive(0.1)
        if isinstance(event, Message):
            link.ack(event)
        return event if isinstance(event, kind) else None

    return wait_until(heard, f"a {kind.__name__}")


def test_a_stolen_card_is_worth_nothing_once_its_device_was_revoked(fleet):
    stolen = thief(fleet, "eve")
    stolen.subscribe([TOPICS.round])
    metrics = fleet.listen(TOPICS.metrics, who="server")
    for name in ("ann", "ben"):
        fleet.device(name)
    fleet.start_run(task="wearables", rounds=1, target=2)
    assert hear(stolen, Message).topic == TOPICS.round
    metrics.wait_for_json(TOPICS.metrics, round=1, state="closed")
    while b"closed" not in hear(stolen, Message).payload:
        pass

    found = asked(fleet, "revoke", "eve")
    assert (found["status"], found["broker_told"], found["broker_run"]) == ("revoked", True, "")
    fleet.server.wait_for("eve is revoked")
    stolen.publish(TOPICS.state("eve"), b'{"v":1,"state":"ready","boot":1}', retain=True)
    with pytest.raises(LinkError, match="refused our client certificate"):
        thief(fleet, "eve", wait_s=5.0)

    while stolen.receive(0.5) is not None:
        pass  # what was said before the broker heard of it
    # The others noticed nothing: they train under the next fleet key.
    fleet.start_run(task="wearables", rounds=1, target=2)
    metrics.wait_for_json(TOPICS.metrics, round=2, state="closed", accepted=2)
    assert fleet.home.keys().fleet_epoch == 2
    assert not isinstance(stolen.receive(0.5), Message)
    rows = {each["device"]: each for each in asked(fleet, "list")}
    assert rows["eve"]["status"] == "revoked"
    assert "presence" not in rows["eve"]
    assert rows["ann"]["presence"]["state"] in ("ready", "training", "uploading")
    assert rows["ann"]["rounds"] == 2


def test_a_new_board_takes_the_place_of_a_stolen_one_that_is_still_connected(fleet):
    stolen = thief(fleet, "eve")
    hear(stolen, object)
    found = asked(fleet, "replace", "eve")
    assert found["broker_told"]
    hear(stolen, Disconnected)
    with pytest.raises(LinkError, match="refused our client certificate"):
        thief(fleet, "eve", wait_s=5.0)
    shutil.rmtree(fleet.folder / "eve")
    fleet.device("eve", "--bundle", found["bundle"])
    wait_until(lambda: fleet.state_of("eve").get("state") == "ready", "the new board")
    assert asked(fleet, "show", "eve")["status"] == "enrolled"


def test_a_board_that_waits_is_let_in_while_everything_runs(fleet):
    asked(fleet, "add", "zoe", "--by-hand")
    board = fleet.device("zoe", "--bundle", str(fleet.home.bundle("zoe")))
    shown = wait_until(
        lambda: next((d for d in asked(fleet, "list") if d["device"] == "zoe"
                      and d["status"] == "waiting"), None), "a device that waits",
    )  # fmt: skip
    asked(fleet, "accept", "zoe", "--fingerprint", shown["fingerprint"])

    def ready():
        nonlocal board
        if not board.is_running:  # told to wait, it ended: a supervisor starts it again
            board = fleet.device("zoe", "--bundle", str(fleet.home.bundle("zoe")))
        return fleet.state_of("zoe").get("state") == "ready"

    wait_until(ready, "the accepted board")


def test_a_broker_goes_on_though_the_roster_cannot_be_read(fleet):
    path = fleet.home.folder / "keys" / "roster.json"
    path.write_bytes(b"nonsense")
    fleet.mosquitto.wait_for("roster.json is damaged")
    path.unlink()
    assert asked(fleet, "revoke", "eve")["broker_told"]
    assert fleet.mosquitto.log.count("roster.json is damaged") == 1


def test_the_line_for_a_mosquitto_of_ones_own_does_what_it_says(fleets, tmp_path):
    """As printed, but for sudo, the folder, and systemctl, which sends SIGHUP or starts anew."""
    fleet = fleets()
    etc = tmp_path / "etc"
    shutil.copytree(fleet.home.broker, etc)
    own = LocalBroker(etc, port=fleet.port, engine="mosquitto", shipped_acl=False)
    fleet.enrol("ann", "eve")
    with own:
        stolen, other = thief(fleet, "eve"), thief(fleet, "ann")
        assert carry_out(asked(fleet, "revoke", "eve")["broker_run"], own) == "reload"
        with pytest.raises(LinkError, match="refused our client certificate"):
            thief(fleet, "eve", wait_s=5.0)
        assert (stolen.connections, other.connections) == (1, 1)
        assert carry_out(asked(fleet, "replace", "eve")["broker_run"], own) == "restart"
        hear(stolen, Disconnected)
        with pytest.raises(LinkError, match="refused our client certificate"):
            thief(fleet, "eve", wait_s=5.0)


def carry_out(line: str, broker: LocalBroker) -> str:
    """Do what the line says; return how mosquitto was told."""
    install, _, tell = line.partition(" && ")
    words = shlex.split(install)
    assert (words[:2], words[-1]) == (["sudo", "install"], "/etc/mosquitto/midge/")
    assert run(*words[1:-1], str(broker.folder)).returncode == 0
    how = tell.removeprefix("sudo systemctl ").removesuffix(" mosquitto")
    {"reload": broker.reload, "restart": broker.restart}[how]()
    return how
