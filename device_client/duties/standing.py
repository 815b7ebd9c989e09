"""Where a device stands, whatever its duty: what outlives a round."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from broker_bridge.wire.messages import Announcement, Report
from device_client.events import Effect, Eligible, Keep, LinkUp, Memory, Remember

__all__ = ["Standing", "State"]


class State(Enum):
    """Where the device is in a round."""

    IDLE = "idle"
    WAITING = "waiting"
    JOINING = "joining"
    FETCHING = "fetching"
    TRAINING = "training"
    SEALING = "sealing"
    UPLOADING = "uploading"
    EVALUATING = "evaluating"


_UNKNOWN = LinkUp(packet_bytes_max=0, inflight_max=0)
_FREE = Eligible()


@dataclass
class Standing:
    """What the participant and its duties know. All of them read it; who learns it, writes it."""

    device: str
    memory: Memory
    samples: int
    draw: Callable[[], float]  # uniform in [0, 1)
    kept_version: int | None  # of the model for this device's own programs; None: they need none
    detail: str = ""  # for a person
    now_s: float = 0.0
    link: LinkUp = _UNKNOWN
    is_connected: bool = True
    eligible: Eligible = _FREE  # what the owner's rules have against working now
    task: bytes = b""  # digest of the task at hand
    accepted: int = -1  # the last round with an update of ours
    report: Report | None = None  # the last one, of a device that evaluates

    def remember(self, **changes: object) -> list[Effect]:
        """Change what survives a power cut."""
        self.memory = replace(self.memory, **changes)  # type: ignore[arg-type]
        return [Remember(self.memory)]

    def keep(self, announcement: Announcement) -> list[Effect]:
        """The announced model is here: keep it, if it is newer than what is kept."""
        version = announcement.model_version
        if self.kept_version is None or version <= self.kept_version:
            return []
        self.kept_version = version
        return [Keep(version, announcement.round)]
