"""Read and write `.task` files. Errors name the file."""

from pathlib import Path

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.taskfile import Plan, decode_task
from broker_bridge.wire.weights import Tensors

__all__ = ["read_task", "write_task"]


def read_task(path: str | Path) -> tuple[Plan, Tensors]:
    """Return plan and initial weights. Raises LocalError naming the file."""
    with disk_errors(Path(path)):
        data = Path(path).read_bytes()
    try:
        return decode_task(data)
    except PeerError as error:
        raise LocalError(f"{path}: {error}") from None


def write_task(path: str | Path, data: bytes) -> None:
    """Write `data`, all or nothing: a task is meant to be read by others."""
    write_atomic(Path(path), data, mode=0o644)
