"""Which devices are here, by their own word and by their wills. Pure.

The broker may have forgotten who is here when we lose it; whoever is will say so again.
"""

from collections import Counter

from broker_bridge.wire.messages import Presence

__all__ = ["Attendance"]


class Attendance:
    """The last presence of each enrolled device that was heard of."""

    def __init__(self) -> None:
        self._presence: dict[str, Presence] = {}

    def seen(self, device: str, presence: Presence) -> None:
        """A device said this of itself, or its will did."""
        self._presence[device] = presence

    def forget(self, device: str) -> None:
        """This one counts no more."""
        self._presence.pop(device, None)

    def clear(self) -> None:
        """Forget everybody."""
        self._presence.clear()

    def knows(self, device: str) -> bool:
        """Whether anything was heard of this device."""
        return device in self._presence

    def is_lost(self, device: str) -> bool:
        """Whether its connection broke, and it did not come back."""
        presence = self._presence.get(device)
        return presence is not None and presence.state == "lost"

    def online(self, role: str) -> list[str]:
        """The devices of this role that are here."""
        return [
            device
            for device, presence in self._presence.items()
            if presence.role == role and presence.state not in ("lost", "sleeping")
        ]

    def states(self) -> dict[str, int]:
        """How many are in each state."""
        return dict(Counter(p.state for p in self._presence.values()))
