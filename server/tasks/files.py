"""Read and write `.task` files. Errors name the file."""

import os
from pathlib import Path

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.taskfile import Plan, decode_task
from broker_bridge.wire.weights import Tensors

__all__ = ["read_task", "write_task"]


def read_task(path: str | Path) -> tuple[Plan, Tensors]:
    """Return plan and initial weights. Raises LocalError naming the file."""
    try:
        return decode_task(Path(path).read_bytes())
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from None
    except PeerError as error:
        raise LocalError(f"{path}: {error}") from None


def write_task(path: str | Path, data: bytes) -> None:
    """Write `data` so that a reader finds all of it or nothing."""
    target = Path(path)
    unfinished = target.with_name(target.name + ".part")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, target)
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror}") from None
