"""`midge bundle`: a device's software in one file. Also what it shares with `midge flash`."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.enrolment import Bundle
from server.commands.options import DIR, JSON, host_port
from server.config import Broker
from server.fleet import additions
from server.fleet.enrolment import broker_login
from server.fleet.flash.card import this_time
from server.fleet.flash.parcel import cached_tasks, own_files, parcel, settings_text, tarball
from server.fleet.flash.targets import TARGETS, Target, find_target
from server.fleet.flash.wheelhouse import cache_folder
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["FILE", "FOLDER", "What", "bundle", "what_options"]

_DAYS = 7
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
_WHAT = (
    click.option("--data", default="", help="Where its samples are on the device: npz:FILE, …"),
    click.option("--with", "own", multiple=True, type=FILE,
                 help="Put this file into /var/lib/midge/data on the device; repeat for more."),
    click.option("--role", type=click.Choice(["train", "evaluate"]), default="train",
                 show_default=True, help="What the device does in rounds."),
    click.option("--task-cache", is_flag=True, help="Put the fleet's tasks on the device."),
    click.option("--days", default=float(_DAYS), show_default=True,
                 help="How long the one-time token lives."),
    click.option("--by-hand", is_flag=True,
                 help="It waits for `midge device accept` before it gets in."),
    click.option("--bundle", "made", type=FILE,
                 help="A bundle of `midge device add` or `replace`, instead of a new one."),
    click.option("--broker", "address", help="HOST:PORT for devices, if not as in midge.toml."),
    click.option("--wheels", type=FOLDER, help="Where wheels are kept; default: your cache."),
)  # fmt: skip


def what_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options about what a device gets."""
    for option in reversed(_WHAT):
        command = option(command)
    return command


@dataclass(frozen=True)
class What:
    """What a device gets, as the options say."""

    home: Home
    data: str
    own: tuple[Path, ...]
    role: str
    task_cache: bool
    days: float
    by_hand: bool
    made: Path | None
    address: str | None
    wheels: Path | None

    def parcel(
        self, targets: Sequence[Target], token: bytes | None, now: float
    ) -> dict[str, bytes]:
        """Every file for a device with this bundle. Raises LocalError."""
        tasks = sorted((self.home.folder / "tasks").glob("*.task")) if self.task_cache else []
        return parcel(
            targets, self.wheels or cache_folder(), made_at=int(now), bundle=token,
            settings=settings_text(data=self.data, role=self.role),
            extra=own_files(self.own) | cached_tasks(tasks),
        )  # fmt: skip

    def token(self, device: str, now: float) -> tuple[bytes, str]:
        """A one-time token for the device: its bundle, and when it ends. Raises LocalError."""
        path = self.made
        if path is None:
            broker = self._broker()
            with contextlib.closing(Database(self.home.database)) as db:
                path = additions.add(
                    self.home, db, device, now=now, hours=self.days * 24, by_hand=self.by_hand,
                    broker=broker,
                ).bundle  # fmt: skip
        with disk_errors(path):
            data = path.read_bytes()
        found = _decoded(data, path)
        if found.device != device:
            raise LocalError(f"{path} is for the device {found.device!r}, not {device!r}")
        return data, found.token_expires

    def is_replaced(self, device: str) -> bool:
        """Whether a new token takes the place of one that nobody has used yet."""
        if self.made is not None:
            return False
        with contextlib.closing(Database(self.home.database)) as db, db.reading() as tx:
            former = tx.token(device)
        return former is not None and former.used_at is None

    def _broker(self) -> Broker:
        broker = self.home.config().broker
        if not self.address:
            return broker
        host, port = host_port(self.address)
        return msgspec.structs.replace(broker, host=host, port=port)

    def must_get_in(self, names: Sequence[str]) -> None:
        """Refuse a broker that wants what is not there for each of these. Raises LocalError."""
        if self.made is None:
            for name in names:
                broker_login(self.home, self._broker(), name)

    def host(self) -> str:
        """Where the device looks for the broker. Raises LocalError."""
        if self.made is None:
            return self._broker().host
        with disk_errors(self.made):
            return _decoded(self.made.read_bytes(), self.made).broker_host

    def must_be_reachable(self) -> None:
        """Refuse a broker's address that means the device itself. Raises LocalError."""
        host = self.host()
        if _is_itself(host):
            raise LocalError(
                f"on a Pi, {host!r} is the Pi itself; say --broker HOST:PORT with an address of "
                "this machine on your network, one that `midge init --host` put into the "
                "broker's certificate"
            )


def _is_itself(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _decoded(data: bytes, path: Path) -> Bundle:
    try:
        return Bundle.decode(data)
    except PeerError as error:
        raise LocalError(f"{path}: {error}; take one of `midge device add`") from None


@click.command()
@click.option("--device", help="Enrol as this device; without it the bundle only upgrades.")
@click.option("--for", "targets", multiple=True,
              type=click.Choice([target.name for target in TARGETS]),
              default=("bookworm-arm64", "trixie-arm64"), show_default=True,
              help="The systems that it can be installed on; repeat for more.")  # fmt: skip
@click.option("--out", "-o", required=True, type=FILE, help="The file to write, a .tar.gz.")
@what_options
@DIR
@JSON
def bundle(
    device: str | None, targets: tuple[str, ...], out: Path, folder: Path, as_json: bool,
    **what: Any,
) -> None:  # fmt: skip
    """Write one file that installs a device without internet: sudo ./install.sh

    \b
    Example:
      midge bundle --device ward-3 --for bookworm-x86-64 -o ward-3.tar.gz --dir fleet
    """
    now = time.time()
    wanted = What(Home.find(folder), **what)
    found = [find_target(name) for name in targets]
    if not out.parent.is_dir():
        raise LocalError(f"there is no folder {out.parent}; make it, or correct the path")
    wanted.parcel(found, None, now)  # whatever cannot be had is found out before a token is made
    replaced = bool(device) and wanted.is_replaced(device or "")
    token, expires = wanted.token(device, now) if device else (None, "")
    name = f"midge-{device or 'upgrade'}"
    data = tarball(wanted.parcel(found, token, now), name)
    with this_time(out):
        write_atomic(out, data, mode=0o600)
    if device and _is_itself(wanted.host()):
        click.echo(
            f"note: it looks for the broker at {wanted.host()!r}, which is right on this machine "
            "alone; for another say --broker HOST:PORT", err=True,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"device": device, "file": str(out), "bytes": len(data),
                               "for": list(targets), "token_expires": expires}))  # fmt: skip
        return
    click.echo(
        f"wrote {out}: {len(data) / 1e6:.1f} MB for {', '.join(targets)}, no internet needed"
    )
    if replaced:
        click.echo(f"the card or bundle made before for {device} enrols no more")
    if device:
        click.echo(f"it holds a secret: it enrols one device, once, until {expires}")
    click.echo(f"next, on the device: tar xzf {out.name} && sudo {name}/install.sh")
