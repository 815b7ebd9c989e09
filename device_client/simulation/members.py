"""Who there is: the file of identities that the server's side made in bulk.

That is for simulation only: it knows the secrets that a real device makes itself and shows
nobody.
"""

from pathlib import Path

import msgspec

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.wire import members
from broker_bridge.wire.members import Member
from device_client.identity import Identity, Keys

__all__ = ["Members"]


class Members(members.Members, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same, as devices need it."""

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
