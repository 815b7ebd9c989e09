"""What a device writes down beside its identity: rounds seen, and how often it started."""

import contextlib
from pathlib import Path

import msgspec

from broker_bridge.disk import (
    REAL_DISK,
    Disk,
    DiskFullError,
    disk_errors,
    sync_folder,
    write_atomic,
)
from broker_bridge.errors import LocalError
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Presence
from device_client.events import Memory

__all__ = ["Journal"]

_ROUND_MAX = 2**53  # what an announcement can say


class Journal:
    """Small files in the device's folder."""

    def __init__(self, folder: Path, *, disk: Disk = REAL_DISK) -> None:
        self.disk = disk
        self._memory = folder / "rounds.json"
        self._boots = folder / "boots"
        self._shown = folder / "status.json"
        self.folder = folder

    def memory(self) -> Memory:
        """The highest round seen, and how far it went. Raises LocalError when it is damaged."""
        data = self._read(self._memory)
        if data is None:
            return Memory()
        try:
            memory = msgspec.json.decode(data, type=Memory)
            if not 0 <= memory.round <= _ROUND_MAX:
                raise ValueError(f"round {memory.round}")
            return memory
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise LocalError(
                f"{self._memory} is damaged ({error}); restore it from a backup: without it "
                "an old announcement could be replayed to this device"
            ) from None

    def remember(self, memory: Memory) -> None:
        """Write it down; when this returns, it survives."""
        write_atomic(self._memory, msgspec.json.encode(memory), disk=self.disk)

    def settle(self) -> None:
        """What an earlier process wrote here, and failed to sync, survives when this returns.

        Until then it may be read and forgotten again. Raises LocalError.
        """
        sync_folder(self.folder, disk=self.disk)

    def show(self, presence: Presence) -> None:
        """Leave the present state where `midge-device status` reads it. Need not survive."""
        data = messages.encode_json(presence)
        write_atomic(self._shown, data, disk=self.disk, durable=False)

    def shown(self) -> dict[str, object] | None:
        """The state that was shown last; None if there is none that can be read."""
        try:
            return msgspec.json.decode(self._read(self._shown) or b"", type=dict[str, object])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None  # it is written without a sync: a power cut may leave nothing of it

    def boot(self) -> int:
        """Count one more start of the process, and say which it is."""
        text = self._read(self._boots) or b"0"
        number = int(text) + 1 if text.isdigit() and len(text) < 16 else 1  # else: damage
        with contextlib.suppress(DiskFullError):  # a number twice is better than no device
            write_atomic(self._boots, str(number).encode(), disk=self.disk)
        return number

    def _read(self, path: Path) -> bytes | None:
        with disk_errors(path):
            return self.disk.read(path) if self.disk.exists(path) else None
