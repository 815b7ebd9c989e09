"""What a fuzz target is, and when what it does is a fault.

A target raises nothing but MidgeError, which `check` takes for the answer it is. Anything
else is a fault: another exception, an invariant that an assertion names, or memory out of
proportion to the input. Where a signature or a seal would stop random bytes at the door, a
target also plays the insider: it signs or seals the bytes with a real key.

The first byte of most inputs chooses a mode, modulo how many there are.
"""

import atexit
import functools
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broker_bridge.errors import MidgeError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.enrolment import Contact
from broker_bridge.wire.envelope import KemKey, SignKey

__all__ = [
    "CONTACT",
    "CORPUS",
    "DEVICE_KEM",
    "MIB",
    "ROUND_KEM",
    "SERVER_KEM",
    "SIGN",
    "Target",
    "check",
    "checked_for_memory",
    "folder",
    "key",
    "seeds_of",
    "split",
]

CORPUS = Path(__file__).parent / "corpus"
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """`run` takes any bytes; `seeds` are valid inputs. Memory: `base_bytes` + `factor` × input."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    base_bytes: int = 1 * MIB
    factor: int = 64
    is_slow: bool = False  # a server, a socket or a disk is behind it


def check(target: Target, data: bytes) -> None:
    """Feed `data`; only a fault comes out."""
    said = ""
    try:
        target.run(data)
    except MidgeError as error:
        said = str(error)
    # What a person reads in a log is bounded, whatever was sent.
    assert len(said) < 4 * LIMITS.control_bytes_max, f"{len(said)} characters"


def checked_for_memory(target: Target, data: bytes) -> None:
    """`check`, and fail if Python's heap and numpy's grew out of proportion on the way."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        check(target, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = target.base_bytes + target.factor * len(data)
    assert peak - before <= allowed, f"{len(data)} bytes made {peak - before} bytes of memory"


def seeds_of(target: Target) -> list[bytes]:
    """The valid inputs, and those in the corpus: past crashers among them."""
    folder = CORPUS / target.name
    files = sorted(p for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    return target.seeds() + [path.read_bytes() for path in files]


def split(data: bytes, modes: int) -> tuple[int, bytes]:
    return (data[0] % modes, data[1:]) if data else (0, b"")


@functools.cache
def folder(name: str) -> Path:
    """A folder for one target, in memory where that is possible: most writes are fsynced."""
    given, shm = os.environ.get("MIDGE_FUZZ_FOLDER"), Path("/dev/shm")
    place = given or (shm if shm.is_dir() else None)
    made = Path(tempfile.mkdtemp(prefix=f"midge-fuzz-{name}-", dir=place))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def key(number: int) -> bytes:
    """32 bytes that are the same in every process, so that findings can be replayed."""
    return bytes([number]) * 32


SIGN = SignKey.from_seed(key(1))
SERVER_KEM, DEVICE_KEM, ROUND_KEM = (KemKey.from_seed(key(n)) for n in (2, 3, 4))
CONTACT = Contact("demo", "ward-1", key(5))
