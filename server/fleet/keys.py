"""The secrets of a fleet: the root's, the server's, and the key that its members share.

    root key        off line; signs the server's identity, and nothing else
    server's keys   signing and sealing; replaced under the root, one `sequence` after another
    fleet key       opens task and model; a new epoch whenever somebody is shut out

Plain values: who reads and writes the files is `home.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.wire.enrolment import server_identity, sign_server_identity
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, SignKey
from broker_bridge.wire.messages import ServerIdentity
from broker_bridge.wire.topics import is_name

__all__ = ["RootKey", "ServerKeys", "new_keys", "read_root"]

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Random = Callable[[int], bytes]


class RootKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The federation's root of trust."""

    warning: str = "Keep this file off line. Who has it can replace the server's identity."
    federation: str
    seed: Key

    def __repr__(self) -> str:
        return f"RootKey({self.federation})"

    @property
    def sign(self) -> SignKey:
        """Signs the server's identity."""
        return SignKey.from_seed(self.seed)


class ServerKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's secrets. `repr` shows none."""

    federation: str
    sign_seed: Key
    kem_seed: Key
    root_public: Key
    identity: bytes  # the signed ServerIdentity
    fleet_epoch: int
    fleet_key: Key
    fleet_since: float = 0.0  # seconds since 1970, for people; 0: not known
    numbers_above: int = 0  # where epochs and sequences go on after a restore (decision 0080)

    def __post_init__(self) -> None:
        if not is_name(self.federation):
            raise ValueError("the federation's name must be a level of a topic")

    def __repr__(self) -> str:
        return f"ServerKeys({self.federation})"

    @property
    def sign(self) -> SignKey:
        """Signs announcements, answers and receipts."""
        return SignKey.from_seed(self.sign_seed)

    @property
    def kem(self) -> KemKey:
        """Receives enrolments and answers renewals."""
        return KemKey.from_seed(self.kem_seed)

    @property
    def said(self) -> ServerIdentity:
        """The server's identity, as the root signed it. Raises PeerError."""
        return server_identity(self.root_public, self.federation, self.identity)

    def with_next_fleet_key(self, random: Random, *, now: float) -> "ServerKeys":
        """The same server with the fleet key of the next epoch."""
        return msgspec.structs.replace(
            self,
            fleet_epoch=max(self.fleet_epoch, self.numbers_above) + 1,
            fleet_key=random(KEY_BYTES),
            fleet_since=now,
        )

    def restored(self, random: Random, *, now: float) -> "ServerKeys":
        """The same keys out of a backup, going on above what devices may have seen since.

        The fleet key is another: whoever was shut out since has the one in the backup.
        """
        above = max(self.numbers_above, self.fleet_epoch, self.said.sequence, int(now))
        return msgspec.structs.replace(self, numbers_above=above).with_next_fleet_key(
            random, now=now
        )

    def with_next_identity(self, root: RootKey, random: Random, *, now: float) -> "ServerKeys":
        """The same fleet with new keys for its server, signed by the root. Raises LocalError."""
        if root.federation != self.federation or root.sign.public != self.root_public:
            raise LocalError(
                f"this is the root key of another fleet ({root.federation!r}); give the root.json "
                f"that `midge init` made for {self.federation!r}"
            )
        sign, kem = random(KEY_BYTES), random(KEY_BYTES)
        said = ServerIdentity(
            federation=self.federation,
            sequence=max(self.said.sequence, self.numbers_above) + 1,
            sign_public=SignKey.from_seed(sign).public,
            kem_public=KemKey.from_seed(kem).public,
            issued_at=now,
        )
        return msgspec.structs.replace(
            self, sign_seed=sign, kem_seed=kem, identity=sign_server_identity(root.sign, said)
        )


def new_keys(federation: str, random: Random, *, now: float) -> tuple[RootKey, ServerKeys]:
    """A root, and a server under it, for a new fleet."""
    root = RootKey(federation=federation, seed=random(KEY_BYTES))
    sign, kem = random(KEY_BYTES), random(KEY_BYTES)
    said = ServerIdentity(
        federation=federation,
        sequence=1,
        sign_public=SignKey.from_seed(sign).public,
        kem_public=KemKey.from_seed(kem).public,
        issued_at=now,
    )
    return root, ServerKeys(
        federation=federation,
        sign_seed=sign,
        kem_seed=kem,
        root_public=root.sign.public,
        identity=sign_server_identity(root.sign, said),
        fleet_epoch=1,
        fleet_key=random(KEY_BYTES),
        fleet_since=now,
    )


def read_root(path: Path) -> RootKey:
    """Read root.json. Raises LocalError."""
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=RootKey)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LocalError(
            f"{path} is no root key ({error}); give the root.json that `midge init` made"
        ) from None
