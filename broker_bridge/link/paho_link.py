"""A Link over MQTT: one session with one broker, kept up by a thread until it is closed.

Promises what `link.base` promises; `paho_session` says what a session does, this file only
waits for it. The wait is `poll` where there is one: `select` knows no file descriptor
above 1023, and a server with many files open hands out such numbers.
"""

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from broker_bridge.errors import LinkError
from broker_bridge.link.paho_session import Connection, PahoSession
from broker_bridge.link.queued_link import GOODBYE_S
from broker_bridge.link.session_settings import Options, SessionSettings
from broker_bridge.link.tls import TlsFiles, client_context

__all__ = ["PahoLink"]

_PATIENCE_S = 0.2  # so long the owner may keep us from the network

_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class PahoLink(PahoSession):
    """See `link.base.Link`. Made by `open`."""

    def __init__(self, settings: SessionSettings) -> None:
        super().__init__(settings)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poked = False
        self._patience_s = _PATIENCE_S
        self._thread = threading.Thread(target=self._run, name="midge-link", daemon=True)

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        *,
        client_id: str,
        tls: TlsFiles | None = None,
        wait_s: float | None = 10.0,
        **options: Unpack[Options],
    ) -> "PahoLink":
        """Connect, and stay connected until `close`.

        `session_s`: how long the broker keeps our subscriptions and queue while we are
        away; 0 for a client that leaves no trace (operators' commands). A `will` is
        published by the broker, `will_delay_s` later, when we vanish without `close`.

        `wait_s`: keep trying that long, then raise LinkError saying why; what no retry
        can mend (TLS, certificate, authorisation) is raised at once. None: return at
        once and report success or failure as events. Raises LocalError for bad files.

        `packet_bytes_max`, `inflight_max`, `publishes_per_s`: what to hold to where the
        broker does not say what it takes, or discards what comes faster. `advice`: what a
        person changes when it does not let us in.
        """
        context = None if tls is None else client_context(tls)
        link = cls(
            SessionSettings(host=host, port=port, client_id=client_id, tls=context, **options)
        )
        link._thread.start()
        if wait_s is not None:
            try:
                link._wait_for_first_connection(wait_s)
            except BaseException:  # Ctrl-C too: nobody else could close it
                link.close()
                raise
        return link

    def close(self) -> None:
        """Send what is queued if the broker is there (a second at most), say goodbye, and stop."""
        super().close()
        # A name look-up or a handshake cannot be interrupted; then the thread, a daemon,
        # finds the flag when it returns.
        self._thread.join(timeout=GOODBYE_S + 1.0)

    def _wait_for_first_connection(self, wait_s: float) -> None:
        def decided() -> bool:
            final = self._final_failure is not None
            return self.connections > 0 or final or self._crash is not None

        with self._changed:
            self._changed.wait_for(decided, wait_s)
            if self.connections > 0:
                return
            # Another try may have come before we woke, and say less.
            failure, crash = self._final_failure or self._failure, self._crash
        if crash is not None:
            raise crash
        where = self._settings.where
        raise LinkError(failure.reason if failure else f"no answer from {where} in {wait_s:g} s")

    # ── The thread ──────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while self._closing_since is None:
                self._sleep(self._one_connection())
        except Exception as error:  # a bug of ours: the owner must see it, not a dead thread
            self._crashed(error)
        finally:
            self._wake_read.close()
            self._wake_write.close()

    def _sleep(self, duration_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing_since is not None, duration_s)

    def _one_connection(self) -> float:
        """Connect, serve until the connection ends, and say how long to stay away."""
        this = self._begin()
        try:
            self._dial(this)
            with _Selector() as selector:
                selector.register(self._wake_read, selectors.EVENT_READ)
                self._serve(this, selector)
        except OSError as error:
            self._broken(this, error)
        return self._end(this)

    def _serve(self, this: Connection, selector: selectors.BaseSelector) -> None:
        waited_for = 0
        while self._goes_on(this, time.monotonic()):
            with self._our_turn():
                reading, writing = self._prepare(this)
            sock = this.socket
            if sock is None:
                return  # the write found the connection gone
            wanted = reading * selectors.EVENT_READ | writing * selectors.EVENT_WRITE
            if wanted != waited_for:
                _change(selector, sock, waited_for, wanted)
                waited_for = wanted
            undelivered = reading and this.has_unread
            wait_s = 0.0 if undelivered else self._wait_s(this, time.monotonic())
            events = {key.fileobj: mask for key, mask in selector.select(wait_s)}
            was_poked = self._wake_read in events
            if was_poked:
                self._wake_read.recv(4096)
            ready = events.get(sock, 0)
            with self._our_turn():
                if was_poked:
                    self._poked = False  # before the queues are looked at: no poke gets lost
                self._work(
                    this,
                    readable=bool(ready & selectors.EVENT_READ) or undelivered,
                    writable=bool(ready & selectors.EVENT_WRITE),
                )

    @contextmanager
    def _our_turn(self) -> Iterator[None]:
        """After what the owner does together; not long after, for the broker must hear of us."""
        is_ours = self._turn.acquire(timeout=self._patience_s)
        self._patience_s = _PATIENCE_S if is_ours else 0.0  # lost once for each long step
        try:
            yield
        finally:
            if is_ours:
                self._turn.release()

    def _poke(self) -> None:
        # One is enough until the thread has looked: each costs a system call, and often a
        # change of threads. A full pipe wakes just as well, a closed one needs no waking.
        if self._poked:
            return
        self._poked = True
        try:
            self._wake_write.send(b"\0")
        except (BlockingIOError, OSError):
            return


def _change(selector: selectors.BaseSelector, sock: Any, before: int, wanted: int) -> None:
    if not before:
        selector.register(sock, wanted)
    elif wanted:
        selector.modify(sock, wanted)
    else:
        selector.unregister(sock)
