"""How often in a row a task ended its process, and how long it has to wait for the next."""

import contextlib
import math
from collections.abc import Callable, Iterator

from broker_bridge.errors import LocalError
from device_client.sandbox.process import ProcessEndedError

__all__ = ["Deaths"]

_FREE = 2  # so many in a row cost nothing
_WAIT_S, _WAIT_MAX_S = 60.0, 3600.0


class Deaths:
    """Counts for one task at a time: another one starts anew. `clock`: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._digest = b""
        self._count = 0
        self._until_s = 0.0

    def begin(self, digest: bytes) -> None:
        """The task with this digest is at hand now."""
        if digest != self._digest:
            self._digest = digest
            self.forget()

    def check(self) -> None:
        """Raise LocalError while it is too early to try again."""
        left_s = self._until_s - self._clock() if self._count > _FREE else 0.0
        if left_s > 0:
            raise LocalError(
                f"this task ended its training process {self._count} times in a row; it is "
                f"tried again in {math.ceil(left_s)} s"
            )

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the death, if there is one in this block."""
        try:
            yield
        except ProcessEndedError as error:
            if not error.clean:
                self._count += 1
                doubled = min(10, max(0, self._count - _FREE - 1))
                self._until_s = self._clock() + min(_WAIT_MAX_S, _WAIT_S * 2**doubled)
            raise

    def forget(self) -> None:
        """A process did its work to the end."""
        self._count, self._until_s = 0, 0.0
