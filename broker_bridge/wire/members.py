"""Who is in a simulated fleet: the file that `midge simulate` writes and its devices read.

For simulation only: it holds the secrets that a real device makes itself and shows nobody.
Msgpack, for one version of midge on one machine: it is no part of the protocol.
"""

import msgspec

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
    """What all have in common, then each. `repr` shows no secret."""

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

    def __repr__(self) -> str:
        return f"Members({self.federation}, {len(self.members)})"
