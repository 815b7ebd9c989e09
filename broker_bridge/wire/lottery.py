"""The draw that invites a share of the fleet without a message to each device.

Seed and threshold are public, in the signed announcement; each device works out for
itself whether it is drawn, and the server can check the answer. The draw is even
over devices for a seed that nobody could choose after the names were known. It hides
nothing and keeps nobody from joining undrawn: the server checks that.
"""

import hashlib

__all__ = ["EVERYONE", "drawn"]

EVERYONE = 2**32
"""The threshold below which every device's number lies."""


def drawn(seed: bytes, device: str, threshold: int) -> bool:
    """Say whether `device` is drawn: H(seed, device) < threshold, in 0 … 2**32.

    H is the first four bytes, big-endian, of SHA-256 over the seed (32 bytes, so that
    nothing needs to separate it) and the device's name in ASCII.
    """
    digest = hashlib.sha256(seed + device.encode("ascii")).digest()
    return int.from_bytes(digest[:4], "big") < threshold
