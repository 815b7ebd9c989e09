"""First contact over a real broker, with a server that is slow, silent, or not itself."""

import contextlib
import threading
import time

import pytest

from broker_bridge.errors import LinkError, LocalError
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import SignKey, random_bytes
from broker_bridge.wire.messages import Refused, Welcome
from device_client import identity as identities
from device_client.enrolment import enrol
from server.fleet.enrolment import Registrar, add_device
from server.fleet.home import create
from server.store.database import Database
from tests.fleets import FEDERATION, GIVE_UP_S, TOPICS, Fleet, wait_until


@pytest.fixture(scope="module")
def lobby(tmp_path_factory):
    """A broker, and nobody behind it: the tests themselves answer."""
    fleet = Fleet(tmp_path_factory.mktemp("lobby"))
    try:
        fleet.broker.start()
        fleet.db = Database(fleet.home.database)
        yield fleet
    finally:
        fleet.db.close()
        fleet.stop()


def bundle_for(lobby, name):
    path = add_device(
        lobby.home, lobby.db, name, broker=lobby.home.config().broker, now=time.time()
    )
    return identities.read_bundle(path)


@contextlib.contextmanager
def answering(lobby, name, answer):
    """A server whose answers are `answer(number, payload)`: a list of payloads for each request."""
    link = PahoLink.open("localhost", lobby.port, client_id=f"server-{name}",
                         tls=lobby.home.tls("server"), session_s=0)  # fmt: skip
    link.subscribe([TOPICS.up(0, name, "enrol")])
    wait_until(lambda: all(link._filters.values()), "it hears")
    done = threading.Event()
    asked = []

    def serve():
        while not done.is_set():
            event = link.receive(0.05)
            if isinstance(event, Message):
                link.ack(event)
                asked.append(event.payload)
                for payload in answer(len(asked), event.payload):
                    link.publish(TOPICS.down(name, "cfg"), payload)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()
        link.close()


def enrolled(lobby, bundle, folder, **options):
    return enrol(bundle, folder, software="test", **{"wait_s": GIVE_UP_S} | options)


def registrar(lobby):
    return Registrar(lobby.home, lobby.db, time.time)


def test_a_device_believes_the_server_that_its_bundle_pins_and_no_other(lobby, tmp_path):
    bundle = bundle_for(lobby, "doubter")
    office, scope = registrar(lobby), f"{FEDERATION}/doubter"
    stranger = SignKey.from_seed(random_bytes(32))
    server = lobby.home.keys().sign

    def answer(_number, payload):
        true = office.answer("doubter", payload)
        return [
            b"",
            b"garbage",
            true[:-1],
            messages.signed(stranger, "cfg", scope, Refused(reason="go away")),
            messages.signed(server, "cfg", "demo/another", Refused(reason="go away")),
            messages.signed(server, "cfg", scope, Welcome(enc=b"e" * 32, sealed=b"s" * 80)),
            true,
        ]

    with answering(lobby, "doubter", answer):
        identity = enrolled(lobby, bundle, tmp_path / "doubter")
    assert identity.fleet_key == lobby.home.keys().fleet_key
    assert identity.server_sign == server.public
    assert identities.load(tmp_path / "doubter") == identity


def test_a_device_that_gets_no_answer_asks_again_with_the_same_keys(lobby, tmp_path):
    bundle = bundle_for(lobby, "patient")
    office = registrar(lobby)

    def answer(number, payload):
        answered = office.answer("patient", payload)
        return [answered] if number == 2 else []  # the first answer is lost

    with answering(lobby, "patient", answer) as asked:
        identity = enrolled(lobby, bundle, tmp_path / "patient")
    requests = [messages.decode(payload, messages.Enrol) for payload in asked]
    assert len(requests) == 2
    assert {r.kem_public for r in requests} == {identity.keys.kem.public}
    assert len({r.enc for r in requests}) == 2, "sealed anew each time"


def test_keys_made_before_a_power_cut_are_used_after_it(lobby, tmp_path):
    bundle, folder = bundle_for(lobby, "cut-off"), tmp_path / "cut-off"
    with pytest.raises(LinkError, match="midge server"):
        enrolled(lobby, bundle, folder, wait_s=0.5)
    keys = identities.pending_keys(folder)
    office = registrar(lobby)
    with answering(lobby, "cut-off", lambda _, payload: [office.answer("cut-off", payload)]):
        assert enrolled(lobby, bundle, folder).keys == keys
    assert not (folder / "enrolling.json").exists()


def test_a_refusal_is_said_in_the_servers_words(lobby, tmp_path):
    bundle = bundle_for(lobby, "unwanted")
    refusal = messages.signed(
        lobby.home.keys().sign, "cfg", "demo/unwanted", Refused(reason="the token has expired")
    )
    with (
        answering(lobby, "unwanted", lambda *_: [refusal]),
        pytest.raises(LocalError, match="refused to enrol unwanted: the token has expired"),
    ):
        enrolled(lobby, bundle, tmp_path / "unwanted")


def test_a_device_that_is_asked_to_stop_waits_no_longer(lobby, tmp_path):
    with pytest.raises(LinkError):
        enrolled(lobby, bundle_for(lobby, "hasty"), tmp_path / "hasty", stopped=lambda: True)


def test_an_enrolled_device_needs_nobody(lobby, tmp_path):
    bundle, folder = bundle_for(lobby, "member"), tmp_path / "member"
    office = registrar(lobby)
    with answering(lobby, "member", lambda _, payload: [office.answer("member", payload)]):
        first = enrolled(lobby, bundle, folder)
    assert enrolled(lobby, bundle, folder, wait_s=0.0) == first


def test_a_folder_of_another_device_is_left_alone(lobby, tmp_path):
    folder = tmp_path / "taken"
    office = registrar(lobby)
    with answering(lobby, "taken", lambda _, payload: [office.answer("taken", payload)]):
        enrolled(lobby, bundle_for(lobby, "taken"), folder)
    before = (folder / "identity.json").read_bytes()
    with pytest.raises(LocalError, match="belongs to demo/taken"):
        enrolled(lobby, bundle_for(lobby, "taker"), folder)
    assert (folder / "identity.json").read_bytes() == before


def test_a_bundle_of_another_fleet_with_the_same_names_is_refused(lobby, tmp_path):
    folder = tmp_path / "same"
    office = registrar(lobby)
    with answering(lobby, "same", lambda _, payload: [office.answer("same", payload)]):
        enrolled(lobby, bundle_for(lobby, "same"), folder)
    other = create(tmp_path / "fleet", federation=FEDERATION, hosts=["localhost"], port=1)
    db = Database(other.database)
    path = add_device(other, db, "same", broker=other.config().broker, now=time.time())
    db.close()
    with pytest.raises(LocalError, match="another root of trust"):
        enrolled(lobby, identities.read_bundle(path), folder)
