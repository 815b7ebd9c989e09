"""What a device writes down beside its identity: rounds seen, and how often it started."""

from pathlib import Path

import msgspec

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Presence
from device_client.events import Memory

__all__ = ["Journal"]


class Journal:
    """Small files in the device's folder."""

    def __init__(self, folder: Path) -> None:
        self._memory = folder / "rounds.json"
        self._boots = folder / "boots"
        self.folder = folder

    def memory(self) -> Memory:
        """The highest round seen, and how far it went. Raises LocalError when it is damaged."""
        if not self._memory.exists():
            return Memory()
        try:
            return msgspec.json.decode(self._memory.read_bytes(), type=Memory)
        except msgspec.MsgspecError as error:
            raise LocalError(
                f"{self._memory} is damaged ({error}); restore it from a backup: without it "
                "an old announcement could be replayed to this device"
            ) from None

    def remember(self, memory: Memory) -> None:
        """Write it down; when this returns, it survives."""
        write_atomic(self._memory, msgspec.json.encode(memory))

    def show(self, presence: Presence) -> None:
        """Leave the present state where `midge-device status` reads it. Need not survive."""
        path = self.folder / "status.json"
        fresh = path.with_suffix(".new")
        with disk_errors(path):
            fresh.write_bytes(messages.encode_json(presence))
            fresh.replace(path)

    def boot(self) -> int:
        """Count one more start of the process, and say which it is."""
        text = self._boots.read_text() if self._boots.exists() else "0"
        number = int(text) + 1 if text.isdecimal() else 1
        write_atomic(self._boots, str(number).encode())
        return number
