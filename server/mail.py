"""What the server says to one device alone, signed. What it says to everyone: noticeboard.py.

Receipts that come about together share a signature (decision 0136), so they are collected until
somebody gives them out: at the end of a step, or before anything is said or done that must come
after them.
"""

from broker_bridge.wire import messages
from broker_bridge.wire.messages import Busy, Go, Need
from broker_bridge.wire.topics import Topics
from server import events as ev
from server.ledger import Ledger
from server.noticeboard import Noticeboard

__all__ = ["Mail"]


class Mail:
    """Of one federation. `receipts`: those that were not given out yet."""

    def __init__(self, ledger: Ledger, board: Noticeboard, topics: Topics) -> None:
        self.receipts: list[ev.Acknowledge] = []
        self.sign = ledger.keys.sign  # made once: it takes as long as a signature
        self._board = board
        self._topics = topics

    def scope(self, device: str) -> str:
        """To or by whom something is signed."""
        return f"{self._topics.federation}/{device}"

    def send(self, device: str, message: Go | Busy | Need) -> None:
        """Say something about a round."""
        kind = "need" if isinstance(message, Need) else "go"
        signed = messages.signed(self.sign, kind, self.scope(device), message)
        self._board.publish(self._topics.down(device, kind), signed)

    def configure(self, device: str, signed: bytes) -> None:
        """Say something about its keys and certificate, which whoever knows them has signed."""
        self._board.publish(self._topics.down(device, "cfg"), signed)

    def give_receipts(self) -> None:
        """Say those that came about together, under one signature."""
        if not self.receipts:
            return
        receipts, self.receipts = self.receipts, []
        said = [(self.scope(each.device), each.ack) for each in receipts]
        signed = messages.signed_together(self.sign, "ack", said)
        for receipt, data in zip(receipts, signed, strict=True):
            self._board.publish(self._topics.down(receipt.device, "ack"), data)
