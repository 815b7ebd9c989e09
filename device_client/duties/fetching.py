"""Task and model of an announcement: the task first, for it says what a model is."""

from typing import Literal

from broker_bridge.wire.messages import Announcement, Blob, NeedBlob
from device_client import events as ev
from device_client.duties.asking import Asking
from device_client.duties.standing import Standing

__all__ = ["Fetching"]


class Fetching:
    """What is announced, until all of it is here."""

    def __init__(self, here: Standing, announcement: Announcement, asking: Asking) -> None:
        self.is_complete = False
        self.in_vain = False  # nobody sends it, however often we ask
        self._here = here
        self._announcement = announcement
        self._asking = asking

    def begin(self) -> list[ev.Effect]:
        """Fetch the next thing that is missing."""
        self.is_complete = False
        self._asking.heard()
        return [ev.Fetch(*self._wanted)]

    def step(self, event: ev.Event) -> list[ev.Effect]:
        """Take one event, change, and say what to do."""
        match event:
            case ev.Tick() if self._asking.is_due and self._here.is_connected:
                return self._ask()
            case ev.LinkUp() | ev.Fetching():
                # With a new connection, the broker goes on by itself; asked, it would send all.
                self._asking.heard()
            case ev.Fetched(kind, digest) if digest == self._digest(kind):
                return self._fetched(kind, digest)
        return []

    def _ask(self) -> list[ev.Effect]:
        if self._asking.in_vain:
            self.in_vain = True
            return []
        self._asking.asked()
        kind, blob = self._wanted
        return [ev.Send(NeedBlob(kind=kind, digest=blob.digest))]

    def _fetched(self, kind: Literal["task", "model"], digest: bytes) -> list[ev.Effect]:
        if kind == "model":
            self.is_complete = True
            return []
        self._here.task = digest
        return self.begin()

    @property
    def _wanted(self) -> tuple[Literal["task", "model"], Blob]:
        if self._here.task != self._announcement.task.digest:
            return "task", self._announcement.task
        return "model", self._announcement.model

    def _digest(self, kind: Literal["task", "model"]) -> bytes:
        told = self._announcement
        return (told.task if kind == "task" else told.model).digest
