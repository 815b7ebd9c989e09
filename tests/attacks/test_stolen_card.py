"""What a device's memory card yields to who steals it, and what it does not.

How revoking ends it at a real broker is in tests/flow/test_revocation.py, and what becomes
of its update in tests/server/test_revocation.py.
"""

import base64
import shutil

import pytest

from broker_bridge.errors import PeerError
from broker_bridge.wire import blobs, messages
from broker_bridge.wire.chunks import open_chunk
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import Binding, update_key
from device_client import identity as identities
from tests.attacks.mallory import Mallory
from tests.fleets import FEDERATION
from tests.server.test_revocation import revoke


@pytest.fixture
def stolen(worlds):
    """A fleet after a round, everything that its broker carried, and a copy of eve's card."""
    world = worlds(rounds={"deadline_s": 60.0, "quorum": 1}, make_broker=Mallory)
    world.ann, world.eve = world.hand("ann"), world.hand("eve")
    assert world.tell(cmd="start", task="wearables", rounds=2, target=2)["ok"]
    for device in (world.ann, world.eve):
        assert device.upload(device.delta()).status == "accepted"
    world.card = world.folder / "stolen"
    shutil.copytree(world.folder / "eve", world.card)
    world.thief = identities.load(world.card)
    return world


def opened_model(world, fleet_key):
    """What the present model's chunks are to who has this fleet key."""
    announced = world.announcement()
    chunks = [m.payload for t, m in world.broker.retained.items() if "/model/" in t]
    pieces = blobs.collector(announced.model, fleet_key=fleet_key)
    for chunk in chunks:
        pieces.add(chunk)
    return blobs.finish(announced.model, pieces)


def test_a_stolen_card_yields_its_keys_and_the_model_of_the_day(stolen):
    assert opened_model(stolen, stolen.thief.fleet_key) == stolen.ledger.model_bytes
    assert stolen.thief.keys.sign.public == stolen.eve.identity.keys.sign.public


def test_a_stolen_card_opens_no_model_after_it_was_revoked(stolen):
    revoke(stolen, "eve")
    stolen.pass_time(61.0)  # the open round ends under its own key
    stolen.tell(cmd="stop")
    assert stolen.tell(cmd="start", task="wearables", rounds=1, target=1)["ok"]
    stolen.pass_time(1.0)
    assert stolen.announcement().fleet_epoch == 2
    for key in stolen.thief.fleet_keys.values():
        with pytest.raises(PeerError, match="sealed"):
            opened_model(stolen, key)
    assert opened_model(stolen, stolen.home.keys().fleet_key) == stolen.ledger.model_bytes


def test_a_stolen_card_holds_no_secret_of_the_server_or_of_another_device(stolen):
    held = b"".join(p.read_bytes() for p in sorted(stolen.card.rglob("*")) if p.is_file())
    keys, ann = stolen.home.keys(), stolen.ann.identity
    secrets = [keys.sign_seed, keys.kem_seed, ann.psk, ann.keys.sign_seed, ann.keys.kem_seed,
               ann.keys.tls_seed]  # fmt: skip
    for secret in secrets:
        for spelt in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert spelt not in held


@pytest.mark.parametrize("name", ["ann", "eve"])
def test_a_stolen_card_opens_no_recorded_update_not_even_its_own(stolen, name):
    """The round's key is needed, and that never left the server and is gone by now."""
    (signed,) = [m.payload for m in stolen.broker.by_kind["up init"] if f"/{name}/" in m.topic]
    init: Init = messages.decode(signed[64:], Init)
    (chunk, *_) = [m.payload for m in stolen.broker.by_kind["up data"] if f"/{name}/" in m.topic]
    binding = Binding(FEDERATION, name, init.announcement, init.upload)
    sender = getattr(stolen, name).identity.keys.kem.public
    key = update_key(
        init.enc, binding, round_key=stolen.thief.keys.kem, sender=sender, psk=stolen.thief.psk
    )
    with pytest.raises(PeerError, match="sealed"):
        open_chunk(chunk, key)


def test_a_stolen_card_counts_for_nothing_once_revoked(stolen):
    revoke(stolen, "eve")
    stolen.pass_time(2.0)
    total = stolen.ledger._open.sum.digest()
    answers = stolen.eve.join()
    assert all(a.retry_after_s < 0 for a in answers if hasattr(a, "retry_after_s"))
    stolen.pass_time(2.0)
    assert stolen.ledger._open.sum.digest() == total
    assert stolen.rejected()["revoked_device"] >= 1
