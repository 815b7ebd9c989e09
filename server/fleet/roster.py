"""Who was shut out of the fleet, for good: one signed file beside the server's keys.

    keys/roster.json    names, public keys and certificates that were revoked; whole each time

The database says who is in; this says who is out, and has the last word. A database that is
restored from a backup knows nothing of a device that was revoked since, and would let it in
again: the server therefore asks here as well, by public key, so that neither another name nor
another database brings a key back. The file is signed by the server's identity, and its epoch
only grows. It promises nothing against who can write the server's own keys.

Everything that follows from it (the database's status, the fleet key, the broker's files) can
be made again from it at any time: see expulsion.py.
"""

from collections.abc import Collection
from pathlib import Path

import msgspec

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.enrolment import server_identity
from broker_bridge.wire.envelope import SignKey, verify

__all__ = ["Expelled", "Roster", "read_roster", "write_roster"]

_KIND = "roster"


class Expelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device that was revoked: its keys at that time, and its certificates' serial numbers."""

    device: str
    keys: tuple[bytes, ...]  # public: signing, sealing, TLS
    serials: tuple[str, ...]  # hexadecimal
    at: float  # seconds since 1970, for people


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of them. `closed`: names that nobody may use at the broker."""

    federation: str
    epoch: int = 0  # how often it was changed
    fleet_epoch: int = 0  # the fleet key that the others have is at least this one
    cuts: int = 0  # how often a name was opened again: see `opening`
    expelled: tuple[Expelled, ...] = ()
    closed: tuple[str, ...] = ()

    def has_revoked(self, keys: Collection[bytes]) -> bool:
        """Whether any of these public keys was revoked, under whatever name."""
        return any(key in each.keys for each in self.expelled for key in keys)

    def shuts_out(self, name: str, keys: Collection[bytes]) -> bool:
        """Whether a device must stay out: by its name, which is closed, or by one of its keys.

        By name as well, for a database from before a rotation holds keys that nobody revoked.
        """
        return name in self.closed or self.has_revoked(keys)

    @property
    def revoked_keys(self) -> frozenset[bytes]:
        """Every public key that was revoked."""
        return frozenset(key for each in self.expelled for key in each.keys)

    @property
    def serials(self) -> tuple[str, ...]:
        """Every certificate that the broker must turn away."""
        return tuple(sorted({serial for each in self.expelled for serial in each.serials}))

    def expelling(self, who: Expelled, *, fleet_epoch: int) -> "Roster":
        """This roster with one more, and his name closed; the same one if it says that already.

        `fleet_epoch`: of the key that the others will have, if he had the present one.
        """
        keys, serials = set(who.keys) <= self.revoked_keys, set(who.serials) <= {*self.serials}
        if keys and serials and who.device in self.closed:
            return self
        return msgspec.structs.replace(
            self,
            epoch=self.epoch + 1,
            fleet_epoch=self.fleet_epoch if keys else max(self.fleet_epoch, fleet_epoch),
            expelled=self.expelled if keys and serials else (*self.expelled, who),
            closed=tuple(sorted({*self.closed, who.device})),
        )

    def turning_away(self, name: str, serial: str, *, at: float) -> "Roster":
        """This roster with one more certificate, of a name that goes on with another one."""
        if serial in self.serials:
            return self
        who = Expelled(device=name, keys=(), serials=(serial,), at=at)
        return msgspec.structs.replace(
            self, epoch=self.epoch + 1, cuts=self.cuts + 1, expelled=(*self.expelled, who)
        )

    def opening(self, name: str) -> "Roster":
        """This roster with the name free for another device.

        A connection that its former holder still has would be heard again, as the broker looks
        at a certificate only when a client connects: `cuts` tells it to end them all.
        """
        if name not in self.closed:
            return self
        closed = tuple(each for each in self.closed if each != name)
        return msgspec.structs.replace(
            self, epoch=self.epoch + 1, cuts=self.cuts + 1, closed=closed
        )


class _Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file. `identity`: who signed it, signed by the root, so that old rosters stay good."""

    midge_roster: int = 1
    identity: bytes
    roster: bytes  # signature, then JSON


def read_roster(
    path: Path, *, federation: str, root_public: bytes, disk: Disk = REAL_DISK
) -> Roster:
    """The roster in a file; an empty one where there is none. Raises LocalError."""
    if not disk.exists(path):
        return Roster(federation=federation)
    with disk_errors(path):
        data = disk.read(path)
    try:
        file = msgspec.json.decode(data, type=_Signed)
        signer = server_identity(root_public, federation, file.identity)
        payload = verify(signer.sign_public, f"{_KIND} {federation}", file.roster)
        roster = msgspec.json.decode(payload, type=Roster)
        if roster.federation != federation:
            raise PeerError("bad_signature", "it is of another federation")
    except (msgspec.MsgspecError, ValueError, RecursionError, PeerError) as error:
        raise LocalError(
            f"{path} is damaged ({error}); restore it from a backup: it says which devices were "
            "revoked, so without it midge lets nobody in"
        ) from None
    return roster


def write_roster(
    path: Path, roster: Roster, *, sign: SignKey, identity: bytes, disk: Disk = REAL_DISK
) -> None:
    """Write it down, signed, whole or not at all. Raises LocalError."""
    payload = msgspec.json.encode(roster)
    signed = sign.sign(f"{_KIND} {roster.federation}", payload)
    write_atomic(path, msgspec.json.encode(_Signed(identity=identity, roster=signed)), disk=disk)
