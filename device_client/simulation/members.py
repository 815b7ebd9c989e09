"""Who there is: the file of identities that the server's side made in bulk.

That is for simulation only: it knows the secrets that a real device makes itself and shows
nobody.
"""

from pathlib import Path

import msgspec

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from device_client.identity import Identity, Keys

__all__ = ["Member", "Members"]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What belongs to one device. `repr` shows no secret."""

    device: str
    sign_seed: bytes
    kem_seed: bytes
    tls_seed: bytes
    psk: bytes
    certificate_pem: str

    def __repr__(self) -> str:
        return f"Member({self.device})"


class Members(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file that `midge simulate` writes: what all have in common, then each."""

    federation: str
    broker_host: str
    broker_port: int
    root_public: bytes
    server_sign: bytes
    server_kem: bytes
    fleet_epoch: int
    fleet_key: bytes
    ca_pem: str
    members: list[Member]

    @classmethod
    def read(cls, path: Path) -> "Members":
        """Read the file. Raises LocalError."""
        with disk_errors(path):
            data = path.read_bytes()
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise LocalError(f"{path} is no file of simulated devices: {error}") from None

    def identity(self, member: Member) -> Identity:
        """The identity of one of them, as an enrolled device has it."""
        common = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name in Identity.__struct_fields__
        }
        keys = Keys(member.sign_seed, member.kem_seed, member.tls_seed)
        return Identity(
            device=member.device, keys=keys, psk=member.psk,
            certificate_pem=member.certificate_pem, **common,
        )  # fmt: skip
