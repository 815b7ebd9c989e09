"""Which devices are here, by their own word and by their wills. Pure.

The broker may have forgotten who is here when we lose it; whoever is will say so again.
"""

from collections import Counter, defaultdict

from broker_bridge.wire.messages import Presence

__all__ = ["Attendance"]


class Attendance:
    """The last presence of each enrolled device that was heard of."""

    def __init__(self) -> None:
        self._presence: dict[str, Presence] = {}
        # Who is here, by role: asked for each message, so never looked for among all.
        self._here: defaultdict[str, dict[str, None]] = defaultdict(dict)

    def seen(self, device: str, presence: Presence) -> None:
        """A device said this of itself, or its will did."""
        before = self._presence.get(device)
        if before is not None and before.role != presence.role:
            self._here[before.role].pop(device, None)
        self._presence[device] = presence
        if presence.state in ("lost", "sleeping"):
            self._here[presence.role].pop(device, None)
        else:
            self._here[presence.role][device] = None

    def forget(self, device: str) -> None:
        """This one counts no more."""
        before = self._presence.pop(device, None)
        if before is not None:
            self._here[before.role].pop(device, None)

    def clear(self) -> None:
        """Forget everybody."""
        self._presence.clear()
        self._here.clear()

    def knows(self, device: str) -> bool:
        """Whether anything was heard of this device."""
        return device in self._presence

    def is_lost(self, device: str) -> bool:
        """Whether its connection broke, and it did not come back."""
        presence = self._presence.get(device)
        return presence is not None and presence.state == "lost"

    def online(self, role: str) -> list[str]:
        """The devices of this role that are here."""
        return list(self._here[role])

    def count(self, role: str) -> int:
        """How many devices of this role are here."""
        return len(self._here[role])

    def states(self) -> dict[str, int]:
        """How many are in each state."""
        return dict(Counter(p.state for p in self._presence.values()))
