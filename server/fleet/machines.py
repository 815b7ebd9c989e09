"""The machines of a fleet that show a certificate: broker, server, operator.

Where their files lie, and what is wrong with them, in words that begin with the file. Looks, and
changes nothing: `repair.py` makes again what can be made again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.link.broker_config import BROKER_FILE, BROKER_KEY_FILE, CA_FILE
from broker_bridge.wire.topics import OPERATOR, SERVER
from server.fleet.certificates import (
    belong_together,
    holds,
    is_issued_by,
    read_certificate,
    read_key,
)

__all__ = [
    "MADE_AGAIN",
    "Machine",
    "brokers_ca_fault",
    "ca_fault",
    "certificate_fault",
    "check_usable",
    "ends",
    "machine",
    "machines",
    "read_if_there",
]

MADE_AGAIN = "`midge keys repair --dir {}` makes it again"
_COMMON_NAMES = {"server": SERVER, "operator": OPERATOR}  # the broker goes by its hosts
Name = Literal["broker", "server", "operator"]


@dataclass(frozen=True)
class Machine:
    """One of them, and its files."""

    name: Name
    certificate: Path
    key: Path

    def fault(self) -> str:
        """Why nobody can use these files; empty if one can. Raises LocalError if they are there
        and cannot be looked at.
        """
        certificate, key = read_if_there(self.certificate), read_if_there(self.key)
        fault = _fault(self.certificate, certificate, read_certificate) or _fault(
            self.key, key, read_key
        )
        if fault:
            return fault
        if not belong_together(certificate or b"", key or b""):
            return f"{self.certificate} is not the certificate of {self.key}"
        return ""

    def fault_in_fleet(self, ca: bytes, now: datetime) -> str:
        """The same, and whether the fleet's CA certified it, until later than `now`."""
        fault = self.fault()
        if fault:
            return fault
        certificate = read_if_there(self.certificate) or b""
        if not is_issued_by(certificate, ca):
            return f"{self.certificate} is not from this fleet's CA"
        name = read_certificate(certificate).name
        if name != _COMMON_NAMES.get(self.name, name):
            return f"{self.certificate} is that of {name}"
        return ends(self.certificate, now)


def machine(folder: Path, name: Name) -> Machine:
    """The files of one of them, in the fleet's folder."""
    if name == "broker":
        return Machine(name, folder / name / BROKER_FILE, folder / name / BROKER_KEY_FILE)
    return Machine(name, folder / name / "client.pem", folder / name / "client-key.pem")


def machines(folder: Path) -> tuple[Machine, ...]:
    """All three."""
    return machine(folder, "broker"), machine(folder, "server"), machine(folder, "operator")


def ca_fault(folder: Path) -> str:
    """Why nobody can use the CA's certificate; empty if one can."""
    return certificate_fault(folder / "ca" / "ca.pem")


def brokers_ca_fault(folder: Path) -> str:
    """Why the broker's copy of the CA's certificate lets nobody in; empty if it does."""
    path = folder / "broker" / CA_FILE
    found = read_if_there(path)
    if found is None:
        return f"{path} is missing"
    ca = read_if_there(folder / "ca" / "ca.pem") or b""
    return "" if holds(found, ca) else f"{path} does not hold this fleet's CA"


def certificate_fault(path: Path) -> str:
    """Why nobody can use this certificate; empty if one can."""
    return _fault(path, read_if_there(path), read_certificate)


def ends(path: Path, now: datetime) -> str:
    """That a certificate ended before `now`; empty if it did not."""
    expires = read_certificate(read_if_there(path) or b"").expires
    return f"{path} expired on {expires:%Y-%m-%d}" if expires <= now else ""


def check_usable(folder: Path, name: Name) -> None:
    """Raise LocalError, with the command that helps, unless this one's files can be used."""
    fault = ca_fault(folder) or machine(folder, name).fault()
    if name == "broker":
        fault = fault or brokers_ca_fault(folder)
    if fault:
        raise LocalError(f"{fault}; {MADE_AGAIN.format(folder)}")


def read_if_there(path: Path) -> bytes | None:
    """What is in a file; None where there is none. Raises LocalError for any other trouble."""
    with disk_errors(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _fault(path: Path, found: bytes | None, read: Callable[[bytes], object]) -> str:
    if found is None:
        return f"{path} is missing"
    try:
        read(found)
    except LocalError:
        return f"{path} is damaged"
    return ""
