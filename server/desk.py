"""What an operator asks over MQTT, and the answer. Under one id it is carried out once.

Whoever the broker lets write on the topic `ctl` is believed; what he asks for is decided by the
coordinator. A yes is said only to what a restart would not undo.
"""

import logging

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import PeerError
from broker_bridge.link.base import Message
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Command, Reply
from broker_bridge.wire.topics import Topics
from server import events as ev
from server.ledger import Ledger
from server.noticeboard import Noticeboard
from server.room import Room

__all__ = ["Desk"]

log = logging.getLogger("midge.server")


class Desk:
    """Where one server's operators ask."""

    def __init__(self, ledger: Ledger, board: Noticeboard, room: Room, topics: Topics) -> None:
        self._ledger = ledger
        self._board = board
        self._room = room
        self._topics = topics

    def hear(self, message: Message) -> list[ev.Event]:
        """The command in a message; nothing if it is answered already, here or earlier.

        Raises PeerError for what is none.
        """
        if message.retained:
            raise PeerError("retained_command", "a retained command would start again by itself")
        try:
            command = messages.decode_json(message.payload, Command)
        except PeerError as error:
            self.answer(Reply(ok=False, error=_how_to_command(error)))
            raise
        if command.cmd == "status":
            return [ev.Commanded(command)]
        answered = self._answered(command)
        if answered is not None:
            self._board.publish(self._topics.ctl_reply, answered.encode())
            return []
        if self._room.postponed:
            self.answer(Reply(ok=False, cmd=command.cmd, error=self._room.trouble))
            return []
        return [ev.Commanded(command)]

    def _answered(self, command: Command) -> str | None:
        """What was answered to the same request when it came before."""
        if command.id is None:
            return None
        with self._ledger.db.reading() as tx:
            return tx.reply_to(command.id)

    def answer(self, reply: Reply) -> None:
        """Answer, and remember the answer for when the same request comes again."""
        reply = self._as_written(reply)
        if reply.status is not None:
            reply = Reply(
                ok=reply.ok, cmd=reply.cmd, id=reply.id, error=reply.error,
                status=reply.status | {"model_version": self._ledger.model_version},
            )  # fmt: skip
        if reply.cmd and reply.error:  # whoever used mosquitto_pub does not hear the answer
            log.warning("%s: %s", reply.cmd, reply.error)
        data = messages.encode_json(reply)
        if reply.id is not None and reply.cmd != "status":
            try:
                with self._ledger.db.transaction() as tx:
                    tx.remember_reply(reply.id, data.decode())
            except DiskFullError as error:
                self._room.none(error)  # answered, and carried out again if it is asked again
        self._board.publish(self._topics.ctl_reply, data)

    def _as_written(self, reply: Reply) -> Reply:
        """The answer to a command; no yes to what a restart would undo, for want of room."""
        if not self._room.postponed or not reply.ok or reply.cmd == "status":
            return reply
        undone = f"{self._room.trouble}. Until then a restart would undo this {reply.cmd}"
        return Reply(ok=False, cmd=reply.cmd, id=reply.id, error=undone)


def _how_to_command(error: PeerError) -> str:
    return (
        f"not a command ({error}); send JSON such as "
        '{"cmd":"start","task":"wearables","rounds":10}, or cmd stop, pause, resume, status'
    )
