"""Thousands of links in one thread: for a simulated fleet, not for a device.

`Poller.open` gives links that promise what `link.base` promises; `Poller.turn` does the
waiting for all of them and returns those that have something to tell. It may be called in
a loop by the thread that owns the links, or by one of its own. Looking up a host and
shaking hands block, so a few threads do that, a few links at a time, and hand the open
connection back; nothing else runs beside `turn`.

Costs, at rest and with TLS: one file descriptor and about 60 kB a link, most of it
OpenSSL's. `raise_file_limit` asks the system for the descriptors.
"""

import contextlib
import heapq
import itertools
import queue
import resource
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from broker_bridge.errors import LocalError
from broker_bridge.link.paho_session import Connection, PahoSession
from broker_bridge.link.queued_link import GOODBYE_S
from broker_bridge.link.session_settings import SessionSettings

__all__ = ["PolledLink", "Poller", "raise_file_limit"]

_SPARE_FILES = 256  # what a process has open besides its links
_DIALS_AT_ONCE = 8


def raise_file_limit(links: int) -> None:
    """Make room for this many links in this process. Raises LocalError where that is refused."""
    wanted = links + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else max(hard, wanted)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    except (OSError, ValueError):
        raise LocalError(
            f"{links} connections need {wanted} open files and this system allows {hard}; "
            f"run `ulimit -n {wanted}` as root, or use more processes"
        ) from None


class PolledLink(PahoSession):
    """See `link.base.Link`. Made by `Poller.open`, and moved by `Poller.turn`."""

    def __init__(self, poller: "Poller", settings: SessionSettings) -> None:
        super().__init__(settings)
        self._poller = poller
        self._poked = False
        self.this: Connection | None = None  # what follows is the poller's
        self.file = -1
        self.waits_for = 0
        self.due_s = 0.0
        self._closed = threading.Event()

    @property
    def has_news(self) -> bool:
        """Whether `receive` would return at once."""
        return self._something_to_tell()

    def close(self) -> None:
        """Say goodbye and stop; wait for that, unless this is the thread that does it."""
        super().close()
        if not self._poller.is_mine:
            self._closed.wait(GOODBYE_S + 1.0)

    def ended(self) -> None:
        """The poller has let go of this link."""
        self._closed.set()

    def wake(self) -> None:
        """Make a waiting `receive` return None early. For another thread that has news."""
        super().wake()
        self._poke()

    def _poke(self) -> None:
        if not self._poked:  # a lost race only pokes twice
            self._poked = True
            self._poller.poke(self)

    def unpoke(self) -> None:
        """From here on, a poke is news again."""
        self._poked = False


class Poller:
    """One thread's worth of links. One thread calls `turn`; any may use the links."""

    def __init__(self, *, dials_at_once: int = _DIALS_AT_ONCE) -> None:
        self.links: set[PolledLink] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._poked: deque[PolledLink] = deque()
        self._asleep = False
        self._timers: list[tuple[float, int, PolledLink]] = []
        self._order = itertools.count()
        self._again: set[PolledLink] = set()  # TLS holds bytes of theirs already decrypted
        self._dialled: queue.SimpleQueue[PolledLink] = queue.SimpleQueue()
        self._dialers = ThreadPoolExecutor(dials_at_once, thread_name_prefix="midge-dial")
        self._crash: BaseException | None = None
        self._turner = threading.get_ident()

    @property
    def is_mine(self) -> bool:
        """Whether this is the thread that calls `turn`."""
        return self._turner == threading.get_ident()

    def open(self, settings: SessionSettings) -> PolledLink:
        """Add a link; it is dialled from `turn`, now and whenever it was lost."""
        link = PolledLink(self, settings)
        self.links.add(link)
        self._poked.append(link)
        self._interrupt()
        return link

    def cut(self, link: PolledLink) -> None:
        """End a link without a goodbye, as a power cut does: the broker publishes its will."""
        link._closing_since = time.monotonic()
        this, link.this = link.this, None
        self._ended(link)
        if this is not None and this.socket is not None:
            this.socket.close()

    def close(self) -> None:
        """Close every link, politely for a second, and stop. Calls `turn` itself."""
        self._crash = None  # it was raised, or nobody looks any more
        for link in self.links:
            link.close()
        give_up = time.monotonic() + 2.0
        while self.links and time.monotonic() < give_up:
            self.turn(0.05)
        for link in list(self.links):
            self._ended(link)
        self._dialers.shutdown(wait=False, cancel_futures=True)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    # ── One turn ────────────────────────────────────────────────────────────────────────

    def turn(self, timeout_s: float) -> list[PolledLink]:
        """Let time pass, `timeout_s` at most; return the links that have something to tell."""
        self._turner = threading.get_ident()
        if self._crash is not None:
            raise self._crash
        touched = self._look_at_pokes()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            due_s, _, link = heapq.heappop(self._timers)
            if due_s == link.due_s:  # else it was put off meanwhile
                self._on_time(link, touched)
        for link, mask in self._wait(timeout_s, bool(touched)):
            self._move(link, mask)
            touched.add(link)
        return [link for link in touched if link.has_news]

    def _look_at_pokes(self) -> set[PolledLink]:
        touched = set()
        while self._poked:
            link = self._poked.popleft()
            link.unpoke()
            self._on_poke(link)
            touched.add(link)
        while not self._dialled.empty():
            link = self._dialled.get()
            self._move(link, 0)
            touched.add(link)
        return touched

    def _wait(self, timeout_s: float, busy: bool) -> list[tuple[PolledLink, int]]:
        again, self._again = self._again, set()
        if busy or again:
            timeout_s = 0.0
        elif self._timers:
            timeout_s = min(timeout_s, max(0.0, self._timers[0][0] - time.monotonic()))
        self._asleep = True
        if self._poked or not self._dialled.empty():
            timeout_s = 0.0
        found = self._selector.select(timeout_s)
        self._asleep = False
        moving = dict.fromkeys(again, selectors.EVENT_READ)
        for key, mask in found:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            else:
                moving[key.data] = moving.get(key.data, 0) | mask
        return list(moving.items())

    def poke(self, link: PolledLink) -> None:
        """A link's owner queued something. From any thread."""
        self._poked.append(link)
        self._interrupt()

    def _interrupt(self) -> None:
        if self._asleep:  # else `turn` looks before it sleeps
            with contextlib.suppress(BlockingIOError, OSError):
                self._wake_write.send(b"\0")

    # ── One link ────────────────────────────────────────────────────────────────────────

    def _on_poke(self, link: PolledLink) -> None:
        if link not in self.links:
            return
        if link.this is not None:
            if link.file >= 0:
                self._move(link, 0)
        elif link._closing_since is not None:
            self._ended(link)
        elif link.due_s == 0.0:
            self._dial(link)

    def _on_time(self, link: PolledLink, touched: set[PolledLink]) -> None:
        if link not in self.links:
            return
        if link.this is None:
            self._dial(link)
        else:
            self._move(link, 0)
            touched.add(link)

    def _dial(self, link: PolledLink) -> None:
        this = link.this = link._begin()

        def dial() -> None:
            try:
                link._dial(this)
            except BaseException as error:  # a bug of ours: `turn` raises it
                self._crash = error
            else:
                self._dialled.put(link)
            self._interrupt()

        self._dialers.submit(dial)

    def _move(self, link: PolledLink, mask: int) -> None:
        """Let one link do what its socket, its owner and the time ask for."""
        this = link.this
        if this is None or (mask and link.file < 0):
            return
        try:
            if link.file >= 0:
                link._work(
                    this,
                    readable=bool(mask & selectors.EVENT_READ),
                    writable=bool(mask & selectors.EVENT_WRITE),
                )
            now = time.monotonic()
            if link._goes_on(this, now):
                reading, writing = link._prepare(this)
                if this.socket is not None:
                    self._wait_for(link, this.socket, reading=reading, writing=writing)
                    self._put_off(link, now + link._wait_s(this, now))
                    return
        except OSError as error:
            link._broken(this, error)
        self._over(link, this)

    def _wait_for(self, link: PolledLink, sock: Any, *, reading: bool, writing: bool) -> None:
        wanted = reading * selectors.EVENT_READ | writing * selectors.EVENT_WRITE
        if link.file < 0:
            link.file = sock.fileno()
        if wanted != link.waits_for:
            if not link.waits_for:
                self._selector.register(link.file, wanted, link)
            elif wanted:
                self._selector.modify(link.file, wanted, link)
            else:
                self._selector.unregister(link.file)
            link.waits_for = wanted
        if reading and link.this is not None and link.this.has_unread:
            self._again.add(link)  # invisible to the selector

    def _over(self, link: PolledLink, this: Connection) -> None:
        """A connection ended, or came to nothing."""
        self._let_go(link)
        delay_s = link._end(this)
        link.this = None
        if link._closing_since is not None:
            self._ended(link)
        else:
            self._set_timer(link, time.monotonic() + delay_s)

    def _let_go(self, link: PolledLink) -> None:
        """By number: the socket may be closed already, and must be forgotten before a new
        one of the same number is waited for.
        """
        if link.waits_for:
            self._selector.unregister(link.file)
        link.file, link.waits_for = -1, 0
        self._again.discard(link)

    def _put_off(self, link: PolledLink, due_s: float) -> None:
        # A time that moves back leaves the timer where it is: going off early does no harm.
        if due_s < link.due_s or link.due_s <= time.monotonic():
            self._set_timer(link, due_s)

    def _set_timer(self, link: PolledLink, due_s: float) -> None:
        link.due_s = due_s  # whatever else is in the heap for this link is void
        heapq.heappush(self._timers, (due_s, next(self._order), link))

    def _ended(self, link: PolledLink) -> None:
        self._let_go(link)
        self.links.discard(link)
        link.ended()
