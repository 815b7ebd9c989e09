"""What one connection teaches the next: which MQTT to speak, and how long to stay away.

Waits grow, and each is drawn at random: after a power cut a whole fleet would otherwise knock in
the same second. Pure: time comes in as durations, and the draw as a function.
"""

from broker_bridge.link.failures import Failure, suspect_a_copy
from broker_bridge.link.session_settings import SessionSettings

__all__ = ["Attempts"]

_GOOD_DEAL_BYTES = 16 * 1024  # more than greetings and a few control messages
_LOST_SOON_MAX = 3  # then it is said what may be behind it


class Attempts:
    """The attempts of one session, one after another."""

    def __init__(self, settings: SessionSettings) -> None:
        self.protocol = "3.1.1" if settings.protocol == "3.1.1" else "5.0"
        self._settings = settings
        self._is_old = False  # the broker said that it does not speak MQTT 5
        self._delay_s = settings.backoff_first_s
        self._lost_soon = 0  # connections in a row that the broker ended soon after it took them

    def version_refused(self) -> None:
        """The broker said that it does not speak the MQTT of this attempt."""
        self._is_old = self.protocol == "5.0"

    def ended(
        self, failure: Failure, *, greeted: bool, lasted_s: float, carried_bytes: int
    ) -> tuple[Failure | None, float]:
        """Return what to tell of it, if anything, and how many seconds to stay away.

        `greeted`: the broker took us. `lasted_s`: since the attempt began. `carried_bytes`: of
        topics and payloads, both ways.
        """
        if not greeted and self._choose_protocol(failure):
            return None, 0.0
        if greeted and not self._is_old and self._settings.protocol == "auto":
            # A broker that was just going down may have hung up on MQTT 5, too. Only that
            # tells how large a packet may be, so it is tried first each time.
            self.protocol = "5.0"
        # A connection that outlived the wait before it, or carried a good deal over a bad line,
        # was a success. One that did not (two clients of one name throwing each other out)
        # must not start again at once.
        succeeded = greeted and (lasted_s > self._delay_s or carried_bytes >= _GOOD_DEAL_BYTES)
        if succeeded:
            self._delay_s = self._settings.backoff_first_s
        self._lost_soon = self._lost_soon + 1 if greeted and not succeeded else 0
        if self._lost_soon >= _LOST_SOON_MAX:
            failure = suspect_a_copy(failure)
        return failure, self._draw_delay()

    def _choose_protocol(self, failure: Failure) -> bool:
        """Change between MQTT 5 and 3.1.1 if that may help; say whether to try at once."""
        if self._settings.protocol != "auto" or not failure.try_older_mqtt:
            return False
        self.protocol = "3.1.1" if self.protocol == "5.0" else "5.0"
        return self.protocol == "3.1.1"

    def _draw_delay(self) -> float:
        """Half of the wait is drawn; the next is twice as long."""
        delay_s = self._delay_s * (0.5 + 0.5 * self._settings.random())
        self._delay_s = min(self._delay_s * 2, self._settings.backoff_max_s)
        return delay_s
