"""Errors, sorted by who has to answer them.

    MidgeError
     ├─ PeerError    the other side sent something wrong: drop it, count it by `reason`, go on
     ├─ LinkError    the network or the broker: wait with jittered back-off, reconnect, resume
     └─ LocalError   this machine: say which file or setting and what to do; exit code 2

Anything else that is raised is our own bug and is allowed to crash the process:
the supervisor restarts it, and nothing that was promised is lost.
"""

__all__ = ["LinkError", "LocalError", "MidgeError", "PeerError"]


class MidgeError(Exception):
    """The root of every error that midge raises on purpose."""


class PeerError(MidgeError):
    """The other side sent something wrong.

    `reason` is a short stable word (`bad_signature`, `wrong_shape`) under which
    the event is counted; the message is for a person who reads the log.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason.replace("_", " "))
        self.reason = reason


class LinkError(MidgeError):
    """The network or the broker failed; trying again later may succeed."""


class LocalError(MidgeError):
    """This machine cannot go on as it is; the message says what to do about it."""
