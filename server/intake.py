"""The updates of one open round, on their way into its sum. No network.

The order of writing is the promise: an update is accepted when its chunks and its receipt
are on the disk, and only then may its device hear so. What cannot be written takes the sum
back to the updates that have a receipt, and those are summed again after a kill, from
their sealed chunks, to the same bits: exact sums do not care for order.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import messages, weights
from broker_bridge.wire.chunks import Layout, chunk_header, open_chunk, tags_digest
from broker_bridge.wire.envelope import AEAD_TAG_BYTES, ChunkKey, KemKey, sha256
from broker_bridge.wire.messages import Announcement, Init
from broker_bridge.wire.update import Binding, update_key
from server.aggregation.exact import ExactSum
from server.events import Accept, Accepted, Refused, Upload
from server.store import rows
from server.store.database import AtDisk, Database
from server.store.spool import Spool

__all__ = ["ATTEMPTS_MAX", "Intake"]

log = logging.getLogger("midge.server")

ATTEMPTS_MAX = 8  # uploads a device may begin in one round
_OPENED_BYTES_MAX = 64 * 1024 * 1024  # of updates on their way that are kept as opened, too


@dataclass(frozen=True)
class _Incoming:
    device: str
    init: Init
    layout: Layout
    key: ChunkKey
    opened: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # body and tag, by index


class Intake:
    """What came in of one round's updates, in memory, in the spool and in the database."""

    def __init__(
        self,
        announcement: Announcement,
        digest: bytes,
        key: KemKey,
        specs: Sequence[weights.TensorSpec],
        *,
        db: Database,
        spool: Spool,
        check_room: Callable[[Layout], None],
        clock: Callable[[], float],
    ) -> None:
        """`check_room` raises DiskFullError when an update cut so has no room on the disk."""
        self.announcement = announcement
        self.digest = digest
        self.key = key
        self.sum = ExactSum(
            specs, fraction_bits=announcement.fraction_bits, weight_max=announcement.weight_max
        )
        self.uploads: dict[bytes, _Incoming] = {}
        self._db = db
        self._spool = spool
        self._check_room = check_room
        self._clock = clock
        self._opened_bytes = 0

    def upload_ids(self, device: str) -> tuple[bytes, ...]:
        """The ids this device may be given in this round, one for each attempt.

        Derived from the round's key, so that they need not be written down: after a
        restart an id still proves that its device was let in.
        """
        start = self.key.seed + device.encode()
        return tuple(
            sha256(b"midge v1 upload id" + bytes([attempt]) + start)[:8]
            for attempt in range(ATTEMPTS_MAX)
        )

    def has_upload_of(self, device: str) -> bool:
        """Whether this device has an update here, begun or accepted."""
        return any(each.device == device for each in self.uploads.values())

    # ── chunks ──────────────────────────────────────────────────────────────────────────

    def begin(self, device: rows.Device, init: Init) -> tuple[int, ...]:
        """Make room for an upload; return the chunks it lacks. Raises PeerError, LocalError."""
        if init.upload not in self._spool:
            self._check_room(init.layout)
        incoming = self.uploads.get(init.upload)
        if incoming is None:
            federation = self.announcement.federation
            binding = Binding(federation, device.name, self.digest, init.upload)
            key = update_key(
                init.enc, binding, round_key=self.key, sender=device.kem_public, psk=device.psk
            )
            incoming = _Incoming(device.name, init, init.layout, key)
        self._spool.begin(init.upload, init.layout)
        self.uploads[init.upload] = incoming
        return tuple(self._spool.missing(init.upload))

    def put_chunk(self, device: str, chunk: bytes) -> bytes | None:
        """Keep a chunk that opens; return its upload, if no other chunk is missing any more.

        Raises PeerError for a chunk that nobody asked for or that was altered.
        """
        header = chunk_header(chunk)
        incoming = self.uploads.get(header.transfer)
        if incoming is None or incoming.device != device:
            raise PeerError("unasked_upload", f"{device} sent a chunk that nobody asked for")
        incoming.layout.check(header, chunk)
        body = header.open_(chunk, incoming.key)
        if self._spool.put(header, chunk):
            self._remember(incoming, header.index, body, chunk[-AEAD_TAG_BYTES:])
        return header.transfer if self._spool.complete(header.transfer) else None

    def _remember(self, incoming: _Incoming, index: int, body: bytes, tag: bytes) -> None:
        """Keep what was opened, while there is room: else it is read and opened once more.

        In place of what a failed sync lost: memory must not hold other bytes than the disk.
        """
        before = incoming.opened.pop(index, None)
        if before is not None:
            self._opened_bytes -= len(before[0])
        if self._opened_bytes + len(body) <= _OPENED_BYTES_MAX:
            self._opened_bytes += len(body)
            incoming.opened[index] = body, tag

    def _let_go(self, incoming: _Incoming) -> None:
        """Forget what was kept of an update."""
        for body, _ in incoming.opened.values():
            self._opened_bytes -= len(body)
        incoming.opened.clear()

    # ── whole updates ───────────────────────────────────────────────────────────────────

    def accept(self, effects: Sequence[Accept], *, at_disk: AtDisk) -> list[Accepted | Refused]:
        """Open, check and sum complete updates; put them and their receipts on disk together.

        `at_disk` is entered while the disk is waited for.
        """
        results: list[Accepted | Refused] = []
        good: list[Accept] = []
        for effect, error in self._add_all(effects):
            if error is None:
                good.append(effect)
            else:
                results.append(_not_added(effect.init, error))
        try:
            self.commit(good, at_disk=at_disk)
        except (LocalError, PeerError) as error:
            # Nothing of this group is promised: the sum goes back to what has a receipt.
            log.error("cannot keep updates: %s", error)
            self._sum_again()
            status: Literal["busy", "resend"] = (
                "busy" if isinstance(error, DiskFullError) else "resend"
            )
            return results + [Refused(e.init.upload, status, str(error)) for e in good]
        return [*results, Accepted(tuple([e.init.upload for e in good]))] if good else results

    def _add_all(self, effects: Sequence[Accept]) -> Iterator[tuple[Accept, PeerError | None]]:
        """Do to each what `add` does. In memory are as many at once as are summed at once."""
        for first in range(0, len(effects), self.sum.at_once):
            opened: list[tuple[Accept, bytes]] = []
            for effect in effects[first : first + self.sum.at_once]:
                try:
                    opened.append((effect, self._taken_up(effect.init)))
                except PeerError as error:
                    yield effect, error
            refused = self.sum.add_all(
                [update for _, update in opened],
                [effect.init.examples for effect, _ in opened],
                delta_bound=self.announcement.delta_bound,
            )
            for (effect, _), why in zip(opened, refused, strict=True):
                yield effect, why

    def add(self, init: Init) -> None:
        """Open and check a complete update, and add it to the sum. Raises PeerError, LocalError."""
        bound = self.announcement.delta_bound
        self.sum.add(self._taken_up(init), init.examples, delta_bound=bound)

    def _taken_up(self, init: Init) -> bytes:
        """A complete update, opened; what was kept of it in memory is let go."""
        incoming = self.uploads[init.upload]
        update = self._at_hand(incoming) or self._opened(incoming)
        self._let_go(incoming)
        return update

    def _at_hand(self, incoming: _Incoming) -> bytes | None:
        """The update, if every chunk of it is still in memory as it was opened."""
        count = incoming.layout.count
        if len(incoming.opened) < count:
            return None
        opened = [incoming.opened[index] for index in range(count)]
        if tags_digest([tag for _, tag in opened]) != incoming.init.tags:
            self._let_go(incoming)
            raise PeerError("bad_seal", "the chunks are not those that the device committed to")
        return b"".join([body for body, _ in opened])

    def _opened(self, incoming: _Incoming) -> bytes:
        init = incoming.init
        bodies: list[bytes] = []
        torn: list[int] = []
        chunks = list(self._spool.chunks(init.upload, incoming.layout))
        for index, chunk in enumerate(chunks):
            try:
                bodies.append(open_chunk(chunk, incoming.key))
            except PeerError:
                torn.append(index)
        for index in torn:  # in this process in any case; after a restart it is torn again
            with suppress(LocalError):
                self._spool.forget(init.upload, index)
        if torn:
            raise PeerError("torn", f"{len(torn)} chunks were torn on our disk")
        if tags_digest(chunks) != init.tags:
            raise PeerError("bad_seal", "the chunks are not those that the device committed to")
        return b"".join(bodies)

    def commit(self, effects: Sequence[Accept], *, at_disk: AtDisk = nullcontext) -> None:
        """Sync the updates, then write their receipts. Raises LocalError."""
        if not effects:
            return
        with at_disk():
            self._spool.sync([e.init.upload for e in effects])
        with self._db.transaction(at_disk=at_disk) as tx:
            tx.add_accepted([self._receipt(e.device, e.init, "accepted") for e in effects])

    def _receipt(
        self, device: str, init: Init, status: rows.ReceiptStatus, reason: str = ""
    ) -> rows.Receipt:
        return rows.Receipt(
            upload=init.upload,
            round=init.round,
            device=device,
            init=messages.encode(init),
            status=status,
            reason=reason,
            examples=init.examples,
            metrics_json=msgspec.json.encode(init.metrics).decode(),
            at=self._clock(),
        )

    def refuse(self, device: str, upload: bytes, reason: str) -> None:
        """Write down that an upload was rejected, and drop what was kept of it in memory.

        Raises DiskFullError or LocalError; then it is still here, to be refused again.
        """
        incoming = self.uploads.get(upload)
        if incoming is not None:
            with self._db.transaction() as tx:
                tx.add_receipt(self._receipt(device, incoming.init, "rejected", reason[:500]))
            self.forget(upload)

    def forget(self, upload: bytes) -> None:
        """Drop what was kept in memory of an attempt that its device replaced by another."""
        incoming = self.uploads.pop(upload, None)
        if incoming is not None:
            self._let_go(incoming)

    def withdraw(self, device: str, reason: str) -> list[bytes]:
        """Take back whatever a device gave; return its uploads, which are to be forgotten.

        On the disk first: after a kill the sum is made of the updates that still have a receipt.
        Raises LocalError.
        """
        with self._db.transaction() as tx:
            taken = tx.withdraw(
                self.announcement.round, device, at=self._clock(), reason=reason[:500]
            )
        for receipt in taken:
            if receipt.status == "accepted":
                self._take_out(messages.decode(receipt.init, Init))
        return [upload for upload, each in self.uploads.items() if each.device == device]

    def _take_out(self, init: Init) -> None:
        """Take one update out of the sum; if it cannot be read any more, add the others anew."""
        try:
            self.sum.remove(self._opened(self.uploads[init.upload]), init.examples)
        except (PeerError, LocalError) as error:
            log.warning("the sum is made anew: %s", error)
            self._sum_again()

    # ── coming back ─────────────────────────────────────────────────────────────────────

    def take_up(self, receipts: Iterable[rows.Receipt]) -> list[Upload]:
        """Sum the updates that have a receipt, from their sealed chunks on disk."""
        uploads: list[Upload] = []
        for receipt in receipts:
            init: Init = messages.decode(receipt.init, Init)
            if receipt.status == "accepted":
                with self._db.reading() as tx:
                    device = tx.device(receipt.device)
                if device is None:
                    raise LocalError(f"the database lost the device {receipt.device!r}")
                self.begin(device, init)
                self._add_promised(receipt.device, init)
            uploads.append(
                Upload(
                    receipt.device,
                    receipt.upload,
                    packet_bytes=0,
                    init=init,
                    status="accepted" if receipt.status == "accepted" else "rejected",
                    reason=receipt.reason,
                )
            )
        return uploads

    def _sum_again(self) -> None:
        """After a failed commit: the sum of exactly those updates that have a receipt."""
        self.sum = ExactSum(
            self.sum.specs, fraction_bits=self.sum.fraction_bits, weight_max=self.sum.weight_max
        )
        with self._db.reading() as tx:
            receipts = tx.receipts(self.announcement.round, status="accepted")
        for receipt in receipts:
            self._add_promised(receipt.device, messages.decode(receipt.init, Init))

    def _add_promised(self, device: str, init: Init) -> None:
        """Add an update that has a receipt; without it there is no model of this round."""
        try:
            self.sum.add(self._taken_up(init), init.examples)  # it was judged at its receipt
        except PeerError as error:
            raise LocalError(
                f"{self._spool.folder}/{init.upload.hex()}.update: the update of {device} has a "
                f"receipt and cannot be read ({error}); check the disk and put the file back, or "
                "give this round up, and all in it, with `midge stop --without-server`"
            ) from error


def _not_added(init: Init, error: PeerError) -> Refused:
    if error.reason == "torn":
        return Refused(init.upload, "resend", str(error))
    return Refused(init.upload, "rejected", f"{error.reason}: {error}")
