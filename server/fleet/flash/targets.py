"""The systems that a device may have: one row for each Python and processor.

The runtime decides: tflite-runtime has no wheel for Python 3.12 and newer, LiteRT's wheels for
3.11 want more room. Both exist for 64-bit systems only, so there is no 32-bit row.
"""

from dataclasses import dataclass
from importlib import resources

from broker_bridge.errors import LocalError

__all__ = ["TARGETS", "Pinned", "Target", "find_target"]


@dataclass(frozen=True)
class Pinned:
    """A line of a lock file: this version, and the SHA-256 of each file that will do."""

    name: str
    version: str
    hashes: frozenset[str]


@dataclass(frozen=True)
class Target:
    """A system that wheels are fetched for."""

    name: str
    python: str  # as in 3.11
    machine: str  # as `uname -m` says
    system: str  # for people

    @property
    def tag(self) -> str:
        """The folder of its wheels, as install.sh computes it from the machine it is on."""
        return f"cp{self.python.replace('.', '')}-{self.machine}"

    @property
    def lock(self) -> str:
        """The name of its lock file."""
        return f"py{self.python.replace('.', '')}.txt"

    def lock_text(self) -> str:
        """What the lock file says."""
        return resources.files(__package__).joinpath("locks", self.lock).read_text()

    def pinned(self) -> list[Pinned]:
        """The lines of the lock file."""
        lines = self.lock_text().replace("\\\n", " ").splitlines()
        return [_pinned(line) for line in lines if line and not line.startswith("#")]


TARGETS = (
    Target("bookworm-arm64", "3.11", "aarch64", "Raspberry Pi OS 12 bookworm, 64-bit"),
    Target("trixie-arm64", "3.13", "aarch64", "Raspberry Pi OS 13 trixie, 64-bit"),
    Target("bookworm-x86-64", "3.11", "x86_64", "Debian 12 bookworm, x86-64"),
    Target("trixie-x86-64", "3.13", "x86_64", "Debian 13 trixie, x86-64"),
)


def find_target(name: str) -> Target:
    """The target of this name. Raises LocalError."""
    for target in TARGETS:
        if target.name == name:
            return target
    names = ", ".join(target.name for target in TARGETS)
    raise LocalError(f"there is no target {name!r}; there are {names}")


def _pinned(line: str) -> Pinned:
    requirement, *hashes = line.split()
    name, _, version = requirement.partition("==")
    return Pinned(name, version, frozenset(h.removeprefix("--hash=sha256:") for h in hashes))
