"""Fleet keys, certificates and a device's own keys change, and every honest device comes along.

A whole server and whole devices over a broker that forgets, repeats and lies when a test says so.
"""

import random
import time
from dataclasses import replace

import msgspec
import pytest

from broker_bridge.link.base import Message
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import SignKey, random_bytes
from broker_bridge.wire.messages import Refused, Renew, Renewal, Welcome
from broker_bridge.wire.renewal import NONCE_BYTES, offer_keys
from device_client import identity as identities
from device_client.agent import Agent
from device_client.journal import Journal
from server.fleet.authority import CLIENT_DAYS
from server.fleet.certificates import read_certificate
from tests.fleets import FEDERATION, TOPICS, World
from tests.fuzz.hearing import AtOnce
from tests.simulation.disk import Crash, SimulatedDisk
from tests.simulation.work import SimulatedTrainer, Trainings

DAY_S = 86_400.0


class Pipe(MemoryBroker):
    """A broker that remembers all that was said, and loses what `lose` says."""

    def __init__(self, **trouble):
        super().__init__(**trouble)
        self.said = []
        self.lose = lambda _: False

    def route(self, message):
        self.said.append(message)
        if not self.lose(message):
            super().route(message)

    def on(self, topic):
        return [m for m in self.said if m.topic == topic]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, make_broker=Pipe)
    yield made
    made.close()


def device(world, name="ann", **parts):
    """A device that trains by dice; a relinked one is simply connected again."""
    parts.setdefault("background", AtOnce())
    parts.setdefault("relink", lambda _old, who: world.broker.connect(who.device))
    made = world.agent(name, load=lambda _: SimulatedTrainer(name, Trainings()), **parts)
    world.pass_time(0.6)
    return made


def row(world, name="ann"):
    with world.ledger.db.reading() as tx:
        return tx.device(name)


def change(world, name="ann", **values):
    """What a command of the operator writes down."""
    with world.ledger.db.transaction() as tx:
        tx.add_device(replace(tx.device(name), **values))
    world.service._members.forget()


def pass_some_time(world, seconds=30.0):
    for _ in range(int(min(seconds, 100.0))):
        world.pass_time(1.0)
    for _ in range(int(seconds - 100.0) // 30):
        world.pass_time(30.0)


def trains_a_round(world, count=1):
    assert world.tell(cmd="start", target=count)["ok"]
    number = world.announcement().round
    pass_some_time(world, 10)
    found = world.metrics()
    assert (found["round"], found["state"], found["accepted"]) == (number, "closed", count)


# ── A new fleet key ─────────────────────────────────────────────────────────────────────


def test_a_device_that_missed_any_number_of_fleet_keys_comes_back(world):
    ann, ben = device(world), device(world, "ben")
    trains_a_round(world, 2)
    ann._link.drop(away_s=100.0)
    for _ in range(3):
        world.home.next_epoch()
        pass_some_time(world, 5)
    pass_some_time(world, 100)
    trains_a_round(world, 2)
    for each in (ann, ben):
        assert each.identity.fleet_epoch == 4
        assert each.identity.fleet_key == world.home.keys().fleet_key
        assert identities.load(each._journal.folder) == each.identity


def test_the_fleet_asks_for_a_new_key_before_the_next_round_and_spread(world):
    device(world)
    trains_a_round(world)
    asked = len(world.broker.on(TOPICS.up(0, "ann", "renew")))
    world.home.next_epoch()
    pass_some_time(world, 10)
    assert len(world.broker.on(TOPICS.up(0, "ann", "renew"))) == asked + 1
    assert world.agents[0].identity.fleet_epoch == 2


def test_the_larger_the_fleet_the_longer_it_takes_to_ask(world):
    device(world)
    trains_a_round(world)
    world.ledger.announcer._online = 1000
    world.home.next_epoch()
    world.pass_time(1.0)
    assert world.announcement().jitter_s == 5.0
    assert world.announcement().fleet_epoch == 2


def test_an_open_round_goes_on_under_the_key_it_began_with(world):
    ann = device(world)
    late = world.hand("ben")
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 5)
    assert world.status()["round"]["accepted"] == 1
    world.home.next_epoch()
    pass_some_time(world, 5)
    sealed = {m.payload for m in world.broker.on(TOPICS.model(0))}
    assert len(sealed) == 1, "the model of the open round is as it was"
    assert late.upload(late.delta()).status == "accepted"
    pass_some_time(world, 10)
    assert world.metrics()["accepted"] == 2
    assert world.announcement().fleet_epoch == 2
    assert ann.identity.fleet_epoch == 2
    trains_a_round_of_both(world, late)


def trains_a_round_of_both(world, late):
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 10)
    assert late.upload(late.delta()).status == "accepted"
    pass_some_time(world, 2)
    assert world.metrics()["accepted"] == 2


def test_a_server_killed_in_a_round_goes_on_under_its_key_though_another_came(world):
    device(world)
    late = world.hand("ben")
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 5)
    world.home.next_epoch()
    world.kill_server()
    world.start_server()
    pass_some_time(world, 2)
    assert world.ledger.fleet_key != world.ledger.keys.fleet_key
    assert late.upload(late.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2
    with world.ledger.db.reading() as tx:
        assert tx.round(1).fleet_key is None
    assert world.ledger.fleet_key == world.ledger.keys.fleet_key


def test_a_device_that_came_after_the_key_changed_takes_part_in_the_open_round(world):
    assert world.hand("ben")
    assert world.tell(cmd="start", target=2, quorum=1, deadline_s=1e4)["ok"]
    world.home.next_epoch()
    pass_some_time(world, 3)
    ann = device(world)
    pass_some_time(world, 5)
    assert ann.identity.fleet_keys.keys() == {1, 2}
    assert world.status()["round"]["accepted"] == 1


def test_two_new_keys_while_the_fleet_asks_for_the_first_cost_no_round(world):
    device(world)
    world.home.next_epoch()
    pass_some_time(world, 2)
    assert world.tell(cmd="start", target=1)["ok"]
    world.home.next_epoch()
    pass_some_time(world, 10)
    assert (world.metrics()["round"], world.metrics()["accepted"]) == (1, 1)


def test_the_fleet_key_is_never_said_but_sealed(world):
    keys = [world.home.keys().fleet_key]
    device(world)
    trains_a_round(world)
    keys.append(world.home.next_epoch().fleet_key)
    pass_some_time(world, 5)
    trains_a_round(world)
    assert all(key not in message.payload for key in keys for message in world.broker.said)


# ── A new certificate ───────────────────────────────────────────────────────────────────


def test_a_certificate_near_its_end_is_renewed_and_used(world):
    ann = device(world)
    old = ann.identity.certificate_pem
    assert world.broker.on(TOPICS.up(0, "ann", "renew")) == []
    office = replace(
        world.service._renewals.registrar, clock=lambda: time.time() + (CLIENT_DAYS - 50) * DAY_S
    )
    world.service._renewals.registrar = office
    ann._link.drop()
    pass_some_time(world, 10)
    assert ann.identity.certificate_pem != old
    facts = read_certificate(ann.identity.certificate_pem.encode())
    assert facts.expires.timestamp() == ann.identity.certified_until == row(world).certified_until
    assert len(world.broker.on(TOPICS.up(0, "ann", "renew"))) == 1
    assert world.broker._sessions["ann"].link is ann.link, "it is connected anew"
    trains_a_round(world)


def test_a_lost_certificate_is_sent_again_and_is_the_same(world):
    ann = device(world)
    office = replace(
        world.service._renewals.registrar, clock=lambda: time.time() + (CLIENT_DAYS - 50) * DAY_S
    )
    world.service._renewals.registrar = office
    world.broker.lose = lambda m: m.topic == TOPICS.down("ann", "cfg") and answers(world) in (2, 3)
    ann._link.drop()
    pass_some_time(world, 100)
    assert answers(world) == 4  # a request, two answers that were lost, and one that was not
    with world.ledger.db.reading() as tx:
        made = [c for c in tx.certificates("ann") if c.tls_public]
    assert len(made) == 2, "the first, and one more"
    assert ann.identity.certificate_pem == made[-1].pem


def answers(world, name="ann"):
    return len(world.broker.on(TOPICS.down(name, "cfg")))


# ── New keys ────────────────────────────────────────────────────────────────────────────


def rotated(world, ann, before, seconds=60.0):
    """Time passes until the device has new keys, and both sides agree."""
    pass_some_time(world, seconds)
    keys, known = ann.identity.keys, row(world)
    assert keys != before
    assert (known.sign_public, known.kem_public) == (keys.sign.public, keys.kem.public)
    assert known.tls_public == keys.tls_public
    assert known.wanted == ""
    assert not (ann._journal.folder / "renewing.json").exists()
    assert identities.load(ann._journal.folder) == ann.identity


def test_a_device_that_is_asked_to_makes_new_keys_and_goes_on_with_them(world):
    ann = device(world)
    before = ann.identity.keys
    change(world, wanted="rotate")
    ann._link.drop()
    rotated(world, ann, before)
    trains_a_round(world)
    facts = read_certificate(ann.identity.certificate_pem.encode())
    assert facts.name == "ann"
    need = messages.NeedBlob(kind="model", digest=bytes(32))
    old = messages.signed(before.sign, "need", "demo/ann", need)
    world.broker.route(Message(TOPICS.up(0, "ann", "need"), old))
    world.settle()
    assert world.rejected()["bad_signature"] == 1


@pytest.mark.parametrize("lost", range(1, 6))
def test_a_question_or_answer_lost_on_the_way_costs_nothing(world, lost):
    ann = device(world)
    before = ann.identity.keys
    change(world, wanted="rotate")
    topics = TOPICS.up(0, "ann", "renew"), TOPICS.down("ann", "cfg")
    count = [0]

    def lose(message):
        count[0] += message.topic in topics
        return message.topic in topics and count[0] == lost

    world.broker.lose = lose
    ann._link.drop()
    rotated(world, ann, before, 700.0 if lost == 1 else 100.0)
    trains_a_round(world)


def test_new_keys_wait_until_the_round_with_an_update_is_over(world):
    ann, other = device(world), world.hand("ben")
    before = ann.identity.keys
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 3)
    change(world, wanted="rotate")
    ann._link.drop()
    pass_some_time(world, 40)
    assert row(world).sign_public == before.sign.public
    world.kill_server()
    world.start_server()  # opens the update again, with the keys in the database
    assert world.status()["round"]["accepted"] == 1
    assert other.upload(other.delta()).status == "accepted"
    rotated(world, ann, before, 700.0)


def test_a_server_that_is_killed_after_new_keys_are_written_down_answers_all_the_same(world):
    ann = device(world)
    before = ann.identity.keys
    change(world, wanted="rotate")
    world.broker.lose = lambda m: m.topic == TOPICS.down("ann", "cfg") and answers(world) > 1
    ann._link.drop()
    pass_some_time(world, 5)
    assert row(world).sign_public != before.sign.public
    world.kill_server()
    world.broker.lose = lambda _: False
    world.start_server()
    rotated(world, ann, before)


# ── What an attacker says ───────────────────────────────────────────────────────────────


def test_an_old_renewal_does_not_bring_old_keys_back(world):
    ann = device(world)
    for _ in range(2):
        before = ann.identity.keys
        change(world, wanted="rotate")
        ann._link.drop()
        pass_some_time(world, 700.0)
        rotated(world, ann, before)
    now = row(world)
    for old in world.broker.on(TOPICS.up(0, "ann", "renew")):
        world.broker.route(old)
        world.settle()
    assert replace(row(world), last_seen=None) == replace(now, last_seen=None)


def test_an_old_answer_or_request_changes_nothing(world):
    ann = device(world)
    for _ in range(2):
        before = ann.identity.keys
        change(world, wanted="rotate")
        world.home.next_epoch()
        ann._link.drop()
        pass_some_time(world, 700.0)
        rotated(world, ann, before)
    now, asked = ann.identity, len(world.broker.on(TOPICS.up(0, "ann", "renew")))
    for old in world.broker.on(TOPICS.down("ann", "cfg")):
        world.broker.route(old)
        pass_some_time(world, 3)
    assert ann.identity == now
    assert len(world.broker.on(TOPICS.up(0, "ann", "renew"))) == asked
    assert ann.rejects["stale_answer"] > 0


def forged(world, sign, scope="demo/ann", **changes):
    new = identities.new_keys()
    tls = SignKey.from_seed(new.tls_seed)
    offer = offer_keys(scope, sign=new.sign, kem_public=new.kem.public, tls=tls)
    said = Renew(
        nonce=random_bytes(NONCE_BYTES), fleet_epoch=1, certified_until=0, software="",
        keys=msgspec.structs.replace(offer, **changes),
    )  # fmt: skip
    return messages.signed(sign, "renew", scope, said)


def test_keys_that_the_device_did_not_ask_for_are_refused(world):
    ann, ben = device(world), world.hand("ben")
    before = row(world)
    own = ann.identity.keys.sign
    stranger = SignKey.from_seed(random_bytes(32))
    attempts = [
        forged(world, stranger),
        forged(world, ben.identity.keys.sign),
        forged(world, own, scope="demo/ben"),
        forged(world, own, sign_public=stranger.public),
        forged(world, own, tls_public=ben.identity.keys.tls_public),
        forged(world, own, kem_public=ben.identity.keys.kem.public),
        b"",
        b"\0" * 64,
    ]
    for each in attempts:
        world.broker.route(Message(TOPICS.up(0, "ann", "renew"), each))
        world.settle()
    assert replace(row(world), last_seen=None) == replace(before, last_seen=None)
    assert world.rejected()["bad_signature"] == len(attempts)


@pytest.mark.parametrize("status", ["suspended", "revoked"])
def test_who_is_shut_out_hears_so_and_gets_no_key(world, status):
    ann = device(world)
    trains_a_round(world)
    change(world, status=status)
    world.home.next_epoch()
    pass_some_time(world, 20)
    assert ann.identity.fleet_epoch == 1
    assert status in ann._participant.detail
    said = [
        messages.opened(ann.identity.server_sign, "cfg", "demo/ann", m.payload, Welcome | Refused)
        for m in world.broker.on(TOPICS.down("ann", "cfg"))
    ]
    assert [type(each) for each in said] == [Refused]


def test_a_forged_request_makes_no_device_renew(world):
    ann, ben = device(world), world.hand("ben")
    me = ann.identity
    request = Renewal(
        sign_public=me.keys.sign.public, certified_until=me.certified_until, keys=True
    )
    others = msgspec.structs.replace(request, sign_public=ben.identity.keys.sign.public)
    server = world.ledger.keys.sign
    for payload in (
        messages.signed(SignKey.from_seed(random_bytes(32)), "cfg", me.scope, request),
        messages.signed(server, "cfg", "demo/ben", request),
        messages.signed(server, "go", me.scope, request),
        messages.signed(server, "cfg", me.scope, others),
    ):
        world.broker.route(Message(TOPICS.down("ann", "cfg"), payload))
        pass_some_time(world, 3)
    assert world.broker.on(TOPICS.up(0, "ann", "renew")) == []


# ── A power cut at every write ──────────────────────────────────────────────────────────


class Fragile:
    """A device whose disk may lose power at one point of its way."""

    def __init__(self, world, point, power):
        self.world, self.point, self.power = world, point, power
        self.points, self.armed = 0, False
        self.disk = SimulatedDisk(random.Random(point), self.strike)
        self.folder = world.folder / "ann"
        self.disk.mkdir(self.folder)
        identity = identities.load(self.folder) or world.enrol("ann")
        identities.save(self.folder, identity, disk=self.disk)
        self.disk.sync_all()
        self.start()

    def strike(self, where, name):
        self.points += self.armed
        if self.armed and self.points == self.point:
            raise Crash(f"{where} {name}", power=self.power)

    def start(self):
        link = self.world.broker.connect("ann")
        self.agent = Agent(
            identities.load(self.folder, disk=self.disk), link,
            journal=Journal(self.folder, disk=self.disk), boot=1,
            load=lambda _: SimulatedTrainer("ann", Trainings()), background=AtOnce(),
            clock=lambda: self.world.broker.now_s, draw=lambda: 0.5,
            relink=lambda _old, who: self.world.broker.connect(who.device),
        )  # fmt: skip
        self.agent.begin()

    # What `World.settle` asks of an agent.

    @property
    def _link(self):
        return self.agent._link

    def turn(self, event):
        try:
            self.agent.turn(event)
        except Crash as crash:
            self.armed = False
            self.disk.power_cut() if crash.power else self.disk.kill()
            self.agent._link.drop(away_s=1e9)
            self.start()

    def _stop(self, reason):
        self.agent._stop(reason)


def rotates_with_a_crash(world, point, power):
    """The device after a rotation in which the power went at that point."""
    ann = Fragile(world, point, power)
    before = row(world)
    world.agents = [ann]
    world.pass_time(1.0)
    change(world, wanted="rotate")
    world.service._renewals.forget_asked()
    began_s, ann.armed = world.broker.now_s, True
    ann._link.drop()
    for _ in range(60):
        world.pass_time(1.0)
        if ann.agent.identity.keys.sign.public == row(world).sign_public != before.sign_public:
            break
    while row(world).wanted:  # it died before it had written down that it was asked
        assert world.broker.now_s < began_s + 700.0
        world.pass_time(30.0)
    ann.armed = False
    found = identities.load(ann.folder, disk=ann.disk)
    assert found.keys == ann.agent.identity.keys
    known = row(world)
    assert (known.sign_public, known.kem_public, known.tls_public) == (
        found.keys.sign.public, found.keys.kem.public, found.keys.tls_public,
    ), f"point {point}: the two disagree"  # fmt: skip
    assert known.sign_public != before.sign_public
    assert identities.offered_keys(ann.folder, found, disk=ann.disk) is None
    identities.save(world.folder / "ann", found)
    return ann


def test_a_power_cut_at_any_write_of_a_rotation_loses_no_device(world):
    points = rotates_with_a_crash(world, 0, True).points
    assert points > 15
    for point in range(1, points + 1):
        rotates_with_a_crash(world, point, power=point % 4 != 0)
    trains_a_round(world)


# ── The server's identity ───────────────────────────────────────────────────────────────


def rotate_server(world):
    from server.fleet.keys import read_root

    root = read_root(world.home.folder / "offline" / "root.json")
    return world.home.change_keys(
        lambda keys: keys.with_next_identity(root, random_bytes, now=time.time())
    )


def test_a_server_with_new_keys_is_followed_in_the_middle_of_a_round(world):
    ann, late = device(world), world.hand("ben")
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 3)
    digest = late.digest
    new = rotate_server(world)
    pass_some_time(world, 3)
    assert ann.identity.server_sign == new.sign.public
    assert ann.identity.server_sequence == 2
    assert late.digest == digest, "the same round, under a new signature"
    late.identity = identities.with_server(late.identity, new.identity)
    assert late.upload(late.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2
    assert identities.load(world.folder / "ann").server_sequence == 2


def test_a_server_killed_before_it_saw_its_new_keys_takes_up_its_round_with_them(world):
    ann, late = device(world), world.hand("ben")
    assert world.tell(cmd="start", target=2)["ok"]
    pass_some_time(world, 3)
    world.kill_server()
    new = rotate_server(world)
    world.start_server()
    pass_some_time(world, 3)
    assert ann.identity.server_sign == new.sign.public
    late.identity = identities.with_server(late.identity, new.identity)
    assert late.upload(late.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2


def test_a_device_that_was_away_follows_when_it_is_back(world):
    ann = device(world)
    ann._link.drop(away_s=50.0)
    rotate_server(world)
    pass_some_time(world, 5)
    new = rotate_server(world)
    pass_some_time(world, 60)
    assert ann.identity.server_sign == new.sign.public
    trains_a_round(world)


def test_an_identity_that_the_root_did_not_sign_or_that_is_older_is_ignored(world):
    ann = device(world)
    old = world.broker.on(TOPICS.identity)[-1]
    rotate_server(world)
    pass_some_time(world, 3)
    now = ann.identity
    stranger = SignKey.from_seed(random_bytes(32))
    said = world.ledger.keys.said
    more = msgspec.structs.replace(said, sequence=99, sign_public=stranger.public)
    for payload in (
        old.payload,
        messages.signed(stranger, "server-identity", FEDERATION, more),
        messages.signed(world.ledger.keys.sign, "server-identity", FEDERATION, more),
        b"garbage",
    ):
        world.broker.route(Message(TOPICS.identity, payload, True))
        world.settle()
    assert ann.identity == now
    assert ann.rejects["bad_signature"] == 3
