"""The owner's half of a link, with the network half at work between any two of its steps."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from broker_bridge.link import queued_link
from broker_bridge.link.base import Connected, LinkEvent, LinkLimits, Message
from broker_bridge.link.queued_link import QueuedLink

THEIRS = LinkLimits(60_000, 20, "5.0")


class Bare(QueuedLink):
    """A link whose network half is the test."""

    def __init__(self, receive_queue_bytes_max: int = 1_000) -> None:
        super().__init__(
            protocol="5.0",
            receive_queue_bytes_max=receive_queue_bytes_max,
            send_queue_bytes_max=1_000_000,
        )
        self.pokes = 0

    def _poke(self) -> None:
        self.pokes += 1

    def bring(self, *payloads: bytes) -> None:
        """One turn of the network brings these."""
        for number, payload in enumerate(payloads, 1):
            self.take("t", payload, retained=False, packet_id=number)
        self._hand_in()


def at_step(number: int, of: Callable[[], Any], then: Callable[[], Any]) -> tuple[Any, bool]:
    """Call `of`, and `then` before the `number`-th step of Python's that it takes in this module.

    Return what `of` returned, and whether it came so far.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != queued_link.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == number:
                sys.settrace(None)
                then()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = of()
    finally:
        sys.settrace(before)
    return found, seen >= number


def wherever(
    of: Callable[[Bare], Any], then: Callable[[Bare], Any], made: Callable[[], Bare]
) -> Iterator[tuple[Bare, Any]]:
    """Each way in which `then` happens as a whole within `of`: the link, and what `of` returned."""
    number, came_so_far = 0, True
    while came_so_far:
        number += 1
        link = made()
        found, came_so_far = at_step(number, partial(of, link), partial(then, link))
        if came_so_far:
            yield link, found
    assert number > 3, "nothing was traced"


def test_a_change_comes_before_the_messages_after_it_wherever_the_owner_is_interrupted() -> None:
    def reconnect(link: Bare) -> None:
        link._up(THEIRS, resumed=True)
        link.bring(b"after")

    for link, first in wherever(lambda link: link.receive(0), reconnect, Bare):
        told: list[LinkEvent] = [] if first is None else [first]
        while (event := link.receive(0)) is not None:
            told.append(event)
        assert [type(each) for each in told] == [Connected, Message]


def full() -> Bare:
    """A link whose queue holds as much as it may."""
    link = Bare(receive_queue_bytes_max=1_000)
    link.bring(bytes(600), bytes(600))
    return link


def test_whoever_stops_reading_is_woken_wherever_the_owner_catches_up_meanwhile() -> None:
    for link, reads_on in wherever(Bare._reads_on, lambda link: link.receive(0), full):
        assert reads_on or link.pokes


def test_whoever_stops_reading_while_the_owner_catches_up_is_woken() -> None:
    decided: list[bool] = []

    def decide(link: Bare) -> None:
        link.pokes = 0
        decided.append(link._reads_on())

    for link, message in wherever(lambda link: link.receive(0), decide, full):
        assert isinstance(message, Message)
        assert decided.pop() or link.pokes


def test_a_queue_of_a_few_bytes_brings_a_hundred_thousand_messages_in_order() -> None:
    count, link, looks = 100_000, Bare(receive_queue_bytes_max=40), threading.Event()
    link._poke = looks.set  # type: ignore[method-assign]

    def network() -> None:
        number = 0
        while number < count:
            looks.clear()
            if not link._reads_on():
                looks.wait()  # for ever, if nobody wakes us
                continue
            while link.may_take() and number < count:
                link.take("t", b"%d" % number, retained=False, packet_id=0)
                number += 1
            link._hand_in()

    thread = threading.Thread(target=network, daemon=True)
    thread.start()
    for number in range(count):
        event = link.receive(20.0)
        assert isinstance(event, Message), f"nobody woke the network after {number}"
        assert event.payload == b"%d" % number
    thread.join()
