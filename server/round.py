"""The open round: who has a place in it, and what became of each place. Rules only.

Joins, commits, chunks and receipts of one round, for the coordinator, which decides when
a round opens and how it ends. A device has one place; what a finished upload was told
once it is told again whenever it asks.
"""

from collections import Counter
from collections.abc import Callable
from typing import Literal

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.chunks import bitmap_of
from broker_bridge.wire.messages import Ack, Busy, Go, Init, Join, Need, RoundSummary
from server.cohort import invitations
from server.events import (
    Accept,
    Acknowledge,
    BeginUpload,
    Effect,
    Forget,
    Inited,
    Joined,
    Opened,
    Refuse,
    Refused,
    Rules,
    Run,
    Send,
    Upload,
    Withdraw,
)

__all__ = ["Round"]

Status = Literal["going", "accepting", "accepted", "rejected"]
_REASON_BYTES_MAX = 500  # in an `Ack`, which has at most 460 beside it: 1,024 are sure to go
_REVOKED = "the device was revoked"
_AT_ONCE = "as many uploads are open as may be at once"
_NO_ROOM = "the server has no room on its disk"


class Round:
    """One open round. Time comes in with each call that needs it."""

    def __init__(
        self,
        opened: Opened,
        rules: Rules,
        *,
        now_s: float,
        rejects: Counter[str],
        is_lost: Callable[[str], bool],
    ) -> None:
        self.announcement = opened.announcement
        self.digest = opened.digest
        self.update_bytes = opened.update_bytes
        self.target = opened.announcement.target
        self.quorum = opened.announcement.quorum
        self.opened_s = now_s
        self.uploads: dict[str, Upload] = {}  # by device
        self.joined: set[str] = set()
        self._rules = rules
        self._rejects = rejects  # counted over all rounds
        self._is_lost = is_lost
        self._revoked: set[str] = set()
        self._by_upload: dict[bytes, Upload] = {}
        self._counts: Counter[str] = Counter()  # of uploads, by status

    # ── what others may ask ─────────────────────────────────────────────────────────────

    @property
    def over_s(self) -> float:
        """When the deadline is."""
        return self.opened_s + self.announcement.deadline_s

    @property
    def reached(self) -> bool:
        """Whether the target is reached and no update is between disk and sum."""
        return self._counts["accepted"] >= self.target and not self._counts["accepting"]

    @property
    def places(self) -> int:
        """How many uploads are known."""
        return len(self._by_upload)

    def upload(self, upload: bytes) -> Upload | None:
        """The place that has this upload id."""
        return self._by_upload.get(upload)

    def count(self, *statuses: str) -> int:
        """How many uploads have one of these statuses. Asked for each message: no loop."""
        return sum(self._counts[status] for status in statuses)

    def status(self, now_s: float) -> dict[str, object]:
        """What an operator may want to know, as JSON types."""
        return {
            "number": self.announcement.round,
            "target": self.target,
            "quorum": self.quorum,
            "invited": len(self.uploads),
            "uploading": sum(u.init is not None for u in self.uploads.values()),
            "accepted": self.count("accepted"),
            "seconds_left": round(self.over_s - now_s, 1),
        }

    def summary(
        self,
        state: Literal["closed", "abandoned"],
        run: Run,
        *,
        now_s: float,
        reason: str = "",
    ) -> RoundSummary:
        """How the round ended, in counts, means and seconds."""
        inits = [u.init for u in self.uploads.values() if u.init and u.status == "accepted"]
        examples = sum(i.examples for i in inits)
        losses = [i.metrics["loss"] * (i.examples / examples) for i in inits if "loss" in i.metrics]
        return RoundSummary(
            federation=self.announcement.federation,
            run=run.id,
            round=self.announcement.round,
            state=state,
            task=run.task,
            model_version=self.announcement.model_version,
            invited=len(self.uploads),
            joined=len(self.joined),
            accepted=len(inits),
            rejected=self.count("rejected"),
            target=self.target,
            quorum=self.quorum,
            examples=examples,
            train_loss=sum(losses) if losses else None,
            update_bytes=self.update_bytes,
            round_s=now_s - self.opened_s,
            train_s_max=max((i.train_s for i in inits), default=0.0),
            reason=reason,
        )

    # ── places ──────────────────────────────────────────────────────────────────────────

    def put(self, place: Upload) -> None:
        """Give a device this place, instead of the one it may have had."""
        former = self.uploads.get(place.device)
        if former is not None:
            self._counts[former.status] -= 1
        self.uploads[place.device] = self._by_upload[place.upload] = place
        self._counts[place.status] += 1

    def _mark(self, place: Upload, status: Status) -> None:
        self._counts[place.status] -= 1
        place.status = status
        self._counts[status] += 1

    def joined_by(self, event: Joined, *, now_s: float, room: bool) -> list[Effect]:
        """A device joins this round; `room`: whether there is any on the disk."""
        device, join = event.device, event.join
        self.joined.add(device)
        place = self.uploads.get(device)
        if place is not None and place.status in ("accepted", "rejected", "accepting"):
            return self._final(place)
        if place is None and not room:
            busy = Busy(round=join.round, retry_after_s=self._rules.retry_after_s, reason=_NO_ROOM)
            return [Send(device, busy)]
        if place is None and self._full():
            wait_s = max(self._rules.retry_after_s, (self.over_s - now_s) / 8)
            busy = Busy(round=join.round, retry_after_s=wait_s, reason="the cohort is full")
            return [Send(device, busy)]
        if place is None and self._free(self._rules.uploads_max, "going", "accepting") < 1:
            busy = Busy(round=join.round, retry_after_s=self._rules.retry_after_s, reason=_AT_ONCE)
            return [Send(device, busy)]
        effects: list[Effect] = []
        if place is None or place.init is not None:
            # A device that joins again after its commit has lost its outbox: a new attempt,
            # a new id, so that no key is used twice.
            attempt = 0
            if place is not None:
                attempt = place.attempt + 1
                self._by_upload.pop(place.upload)
                effects.append(Forget(place.upload))
            if attempt >= len(event.uploads):
                busy = Busy(round=join.round, retry_after_s=-1, reason="too many attempts")
                return [*effects, Send(device, busy)]
            size = self._packet_bytes(join)
            place = Upload(device, event.uploads[attempt], size, attempt=attempt)
            self.put(place)
        return [*effects, Send(device, self._go(place))]

    def _full(self) -> bool:
        """Whether every place of the cohort is taken."""
        return self._free(invitations(self.target), "going", "accepting", "accepted") < 1

    def _free(self, most: int, *statuses: str) -> int:
        """How many of `most` places are free. A device that was lost gives its place to another."""
        free = most - self.count(*statuses)
        if free > 0:
            return free
        return free + sum(
            u.status == "going" and self._is_lost(u.device) for u in self.uploads.values()
        )

    def _packet_bytes(self, join: Join) -> int:
        wanted = min(join.packet_bytes_max or self._rules.packet_bytes_max, LIMITS.packet_bytes_max)
        return max(LIMITS.packet_bytes_min, min(wanted, self._rules.packet_bytes_max))

    def _go(self, place: Upload) -> Go:
        return Go(
            round=self.announcement.round,
            announcement=self.digest,
            upload=place.upload,
            shard=0,
            packet_bytes=place.packet_bytes,
            window=self._rules.window,
        )

    def _final(self, place: Upload) -> list[Effect]:
        """The answer that a finished upload always gets."""
        if place.status == "accepting":
            return []
        status: Literal["accepted", "rejected"] = (
            "accepted" if place.status == "accepted" else "rejected"
        )
        ack = Ack(
            round=self.announcement.round,
            upload=place.upload,
            status=status,
            reason=_in_short(place.reason),
        )
        return [Acknowledge(place.device, ack)]

    # ── uploads ─────────────────────────────────────────────────────────────────────────

    def inited(self, event: Inited) -> list[Effect]:
        """A device commits to an update. Raises PeerError."""
        device, init = event.device, event.init
        place = self._by_upload.get(init.upload)
        if place is None and event.ours and device not in self.uploads:
            # Let in before we were restarted: the id proves it.
            place = Upload(device, init.upload, packet_bytes=0)
            self.put(place)
        if place is None or place.device != device:
            raise PeerError("unasked_upload", f"{device} sent an upload that nobody asked for")
        if place.status != "going":
            return self._final(place)
        if place.init is not None and place.init != init:
            raise PeerError("changed_commit", f"{device} changed the commit of an upload")
        reason = self._objection(place, init)
        if reason is not None:
            return self._reject(place, *reason)
        place.init = init
        return [BeginUpload(device, init)]

    def _objection(self, place: Upload, init: Init) -> tuple[str, str] | None:
        if init.examples < 1:
            return "no_examples", "an update must come from at least one example"
        if init.examples > self.announcement.weight_max:
            most = self.announcement.weight_max
            return "absurd_examples", f"{init.examples} examples; this round allows {most}"
        if init.total_bytes != self.update_bytes:
            return (
                "wrong_size",
                f"{init.total_bytes} bytes; an update of this task has {self.update_bytes}",
            )
        packet_bytes = place.packet_bytes or self._rules.packet_bytes_max
        largest = init.layout.for_packets(init.total_bytes, packet_bytes).body_bytes
        smallest = LIMITS.packet_bytes_min // 2 if place.packet_bytes == 0 else largest
        if not smallest <= init.body_bytes <= largest:
            return "wrong_size", f"chunks of {init.body_bytes} bytes were not agreed on"
        return None

    def _reject(self, place: Upload, kind: str, reason: str) -> list[Effect]:
        self._rejects[kind] += 1
        self._mark(place, "rejected")
        place.reason = reason
        return [
            Refuse(place.device, place.upload, reason),
            *self._final(place),
        ]

    def begun(self, upload: bytes, missing: tuple[int, ...]) -> list[Effect]:
        """The spool is ready for an upload, and lacks these chunks."""
        place = self._by_upload.get(upload)
        if place is None or place.init is None:
            return []
        if not missing:
            return self.complete(upload)
        count = place.init.layout.count
        return [Send(place.device, Need(upload=upload, bitmap=bitmap_of(missing, count)))]

    def complete(self, upload: bytes) -> list[Effect]:
        """Every chunk is in the spool."""
        place = self._by_upload.get(upload)
        if place is None or place.init is None or place.status != "going":
            return []
        self._mark(place, "accepting")
        return [Accept(place.device, place.init)]

    def accepted(self, upload: bytes) -> list[Effect]:
        """An update is in the sum and on disk."""
        place = self._by_upload.get(upload)
        if place is None:
            return []
        if place.device in self._revoked:  # it was between disk and sum when that was said
            return [Withdraw(place.device, _REVOKED)]
        if place.status != "accepting":
            return []
        self._mark(place, "accepted")
        return self._final(place)

    def shut_out(self, device: str, *, revoked: bool) -> list[Effect]:
        """A device was suspended or revoked: its place is over, and if revoked all it gave."""
        place = self.uploads.get(device)
        if not revoked:
            if place is None or place.status != "going":
                return []
            return self._reject(place, "suspended_device", "the device is suspended")
        self._revoked.add(device)
        if place is not None and place.status != "rejected":
            self._mark(place, "rejected")
            place.reason = _REVOKED
        return [Withdraw(device, _REVOKED)]

    def refused(self, event: Refused, *, now_s: float) -> list[Effect]:
        """An update was not taken, for good or for now."""
        place = self._by_upload.get(event.upload)
        if place is None or place.status not in ("going", "accepting"):
            return []
        if place.status == "going" and now_s < place.quiet_until_s:
            return []  # it was told already: this is what was still on its way
        if event.status == "rejected":
            kind, _, reason = event.reason.partition(": ")
            return self._reject(place, kind, reason or kind)
        self._mark(place, "going")
        place.quiet_until_s = now_s + self._rules.retry_after_s
        ack = Ack(
            round=self.announcement.round,
            upload=event.upload,
            status=event.status,
            reason=_in_short(event.reason),
            retry_after_s=self._rules.retry_after_s,
        )
        return [Acknowledge(place.device, ack)]


def _in_short(reason: str) -> str:
    return reason.encode(errors="replace")[:_REASON_BYTES_MAX].decode(errors="ignore")
