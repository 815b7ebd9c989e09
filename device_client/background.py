"""One piece of work at a time beside the loop: a second thread on a device."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from broker_bridge.errors import LocalError, PeerError
from device_client import events as ev

__all__ = ["Background", "ThreadBackground", "Work", "guarded"]

log = logging.getLogger("midge.device")

Work = Callable[[], list[ev.Event]]


class Background(Protocol):
    """Runs one piece of work at a time beside the loop."""

    def start(self, work: Work) -> None:
        """Begin `work`; its events will be in `finished`. Stops what ran before."""

    def stop(self) -> bool:
        """End the present work and forget its events; say whether there was any."""

    @property
    def stopping(self) -> bool:
        """Whether the present work should end at its next step."""

    def finished(self) -> list[ev.Event]:
        """The events of work that has ended since the last call. Raises what it raised."""


class ThreadBackground:
    """A second thread; `wake` tells the loop that there is news."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._results: queue.SimpleQueue[list[ev.Event] | Exception] = queue.SimpleQueue()

    @property
    def stopping(self) -> bool:
        """Whether the present work should end at its next step."""
        return self._stop.is_set()

    def start(self, work: Work) -> None:
        """Begin `work` in a thread of its own."""
        self.stop()
        stop = self._stop = threading.Event()

        def run() -> None:
            result: list[ev.Event] | Exception
            try:
                result = work()
            except Exception as error:  # our bug: raised again where the process can end by it
                result = error
            if not stop.is_set():
                self._results.put(result)
                self._wake()

        self._thread = threading.Thread(target=run, name="midge-training", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """End the present work at its next step, and wait for that."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return False
        thread.join()
        return True

    def finished(self) -> list[ev.Event]:
        """The events of work that has ended since the last call. Raises what it raised."""
        found: list[ev.Event] = []
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, Exception):
                raise result
            found += result
        return found


def guarded(work: Work, number: int) -> Work:
    """The same work of round `number`; what is wrong with data or model becomes an event."""

    def run() -> list[ev.Event]:
        try:
            return work()
        except (PeerError, LocalError) as error:
            log.error("round %d: %s", number, error)
            return [ev.Failed(number, str(error))]

    return run
