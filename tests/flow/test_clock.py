"""A device's clock is wrong by years: it is not locked out, and its clock decides nothing.

A certificate from the future is what a clock that stands at 1970 sees; one from the past is
what a clock sees that stands at 2099. The broker and its certificates are real.
"""

import contextlib
import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.messages import Configured
from device_client import identity as identities
from server.fleet.authority import Authority
from server.fleet.certificates import write_private, write_public
from server.store.database import Database
from tests.fleets import Fleet, enrol_by_hand

NOW = datetime.now(UTC)
YEAR = timedelta(days=365)
FUTURE, PAST = NOW + 12 * YEAR, NOW - 12 * YEAR


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("clock"))
    with contextlib.closing(Database(made.home.database)) as db:
        made.identity = enrol_by_hand(made.home, db, "ann", made.folder / "ann")
    yield made
    made.stop()


def certified(fleet, now, *, hosts=("localhost",), authority=None):
    """A broker whose certificate is from that time."""
    issued = (authority or fleet.home.authority()).issue_for_broker(list(hosts), now=now)
    write_public(fleet.home.broker / "broker.pem", issued.certificate)
    write_private(fleet.home.broker / "broker-key.pem", issued.key)
    fleet.broker.stop()
    fleet.broker.start()


def connects(fleet, tls):
    PahoLink.open("localhost", fleet.port, client_id="ann", tls=tls, wait_s=10.0).close()


def of_device(fleet, **changes):
    identity = msgspec.structs.replace(fleet.identity, **changes)
    return identities.tls_files(fleet.folder / "ann", identity)


@pytest.mark.parametrize("moment", [FUTURE, PAST], ids=["clock at 1970", "clock at 2099"])
def test_a_device_with_a_wrong_clock_gets_in(fleet, moment):
    certified(fleet, moment)
    connects(fleet, of_device(fleet, floor_s=0.0))
    files = of_device(fleet)
    believing = TlsFiles(files.ca, files.certificate, files.key)
    with pytest.raises(LinkError, match=r"not yet valid|expired"):
        connects(fleet, believing)  # what a machine does that believes its clock


def test_a_certificate_that_ended_before_what_the_server_said_is_refused(fleet):
    certified(fleet, PAST)
    assert fleet.identity.floor_s > time.time() - 3600
    with pytest.raises(LinkError, match="expired"):
        connects(fleet, of_device(fleet))


def test_a_device_that_does_not_look_at_dates_still_looks_at_all_the_rest(fleet, tmp_path):
    certified(fleet, NOW, hosts=("another.example",))
    with pytest.raises(LinkError, match=r"[Hh]ostname mismatch|not who it should be"):
        connects(fleet, of_device(fleet, floor_s=0.0))
    certified(fleet, NOW, authority=Authority.create("stranger", now=NOW))
    with pytest.raises(LinkError, match="not who it should be"):
        connects(fleet, of_device(fleet, floor_s=0.0))
    # A member of the fleet cannot pose as its broker.
    issued = fleet.home.authority().issue_with_new_key("localhost", now=NOW)
    write_public(fleet.home.broker / "broker.pem", issued.certificate)
    write_private(fleet.home.broker / "broker-key.pem", issued.key)
    fleet.broker.stop()
    fleet.broker.start()
    with pytest.raises(LinkError, match="not who it should be"):
        connects(fleet, of_device(fleet, floor_s=0.0))


def test_renewing_raises_the_floor_and_nothing_lowers_it(fleet):
    me = fleet.identity
    said = {"device": "ann", "certificate_pem": "", "fleet_epoch": 1, "fleet_key": me.fleet_key}
    for issued_at, floor_s in ((0.0, me.floor_s), (me.floor_s + 9, me.floor_s + 9)):
        configured = Configured(**said, issued_at=issued_at)
        assert identities.renewed(me, configured, me.keys).floor_s == floor_s
