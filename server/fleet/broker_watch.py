"""Between `midge device …` and the broker: what it must hear of, and whether it has heard.

A broker that `midge broker` runs follows the roster by itself: it reloads when somebody was
shut out, and starts anew when a name was opened again, which ends every connection that a
former holder may still have (decision 0085). For a mosquitto of somebody's own there is a
command line to give him. At a broker that knows devices by what midge did not make there is
nothing to run, and a sentence to say.
"""

import contextlib
import fcntl
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from broker_bridge.disk import alone, disk_errors, write_atomic
from broker_bridge.link.broker_config import ACL_FILE, REVOKED_FILE
from broker_bridge.link.local_broker import LocalBroker
from server.fleet.expulsion import keep_broker_files
from server.fleet.home import Home
from server.fleet.roster import Roster

__all__ = ["by_hand", "follow", "followed", "has_heard", "left_to_do"]

_LOCK = "midge-broker.lock"
_HEARD = "midge-broker.heard"  # the epoch of the roster that the broker goes by


def follow(home: Home, broker: LocalBroker, heard: Roster) -> Roster:
    """Make the broker go by the newest roster; return that one. Cheap when nothing changed."""
    if home.roster().epoch == heard.epoch:
        return heard
    roster = keep_broker_files(home)
    broker.reload()
    if roster.cuts != heard.cuts:
        broker.restart()
    say_heard(home, roster)
    return roster


def say_heard(home: Home, roster: Roster) -> None:
    """Tell the commands that wait which roster the broker goes by."""
    write_atomic(home.broker / _HEARD, b"%d\n" % roster.epoch, durable=False)


def followed(home: Home) -> AbstractContextManager[None]:
    """While `midge broker` runs: others can see that it does. Raises LocalError if one does."""
    refusal = f"`midge broker` is running for {home.folder} already; stop it first"
    return alone(home.broker / _LOCK, refusal=refusal)


def has_heard(
    home: Home, epoch: int, *, wait_s: float = 10.0, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Wait for a `midge broker` to go by this roster; at once False where none is running."""
    until = time.monotonic() + wait_s
    while _is_followed(home) and time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            if int((home.broker / _HEARD).read_text()) >= epoch:
                return True
        sleep(0.05)
    return False


def _is_followed(home: Home) -> bool:
    path = home.broker / _LOCK
    if not path.exists():
        return False
    with disk_errors(path), path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def by_hand(home: Home, *, restart: bool) -> str:
    """What to run where mosquitto is run as mosquitto.conf says; nothing if that is of no use."""
    if home.config().broker.is_foreign:
        return ""
    files = " ".join(shlex.quote(str(home.broker / name)) for name in (REVOKED_FILE, ACL_FILE))
    what = "restart" if restart else "reload"
    return f"sudo install -m 644 {files} /etc/mosquitto/midge/ && sudo systemctl {what} mosquitto"


def left_to_do(who: str, run: str) -> str:
    """What a person does at a broker that was not told of `who`. `run`: see `by_hand`."""
    if run:
        return f"if you run mosquitto yourself, run there: {run}"
    return (
        f"your broker does not hear of it: take away there the user name or certificate of {who}, "
        "or change the password (and give those who share it the new one first); until then it can "
        "connect, and nothing that it says is taken"
    )
