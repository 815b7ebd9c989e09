"""The fleet's folder: what `midge init` makes and every other command finds.

    midge.toml            settings
    offline/root.json     the federation's root key, for a drawer; devices pin its public half
    keys/server.json      the server's own keys and the fleet key
    keys/roster.json      who was revoked, once somebody was
    ca/                   the private CA that certifies broker, server, operator and devices
    broker/               what the broker needs: certificate, key, CA, who may not come in
    server/ operator/     client certificates for the two commands that talk to the broker
    bundles/              one file for each device that was added
    logins/               user names' passwords at a broker of somebody else's, if it wants them
    tasks/                task files
    state/                database, models, spool

Every secret is in a file that its owner alone can read.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from glob import glob
from pathlib import Path

import msgspec

from broker_bridge.config import load_config
from broker_bridge.disk import REAL_DISK, Disk, alone, disk_errors, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.link.access import Access
from broker_bridge.link.broker_config import ACL_FILE, REVOKED_FILE
from broker_bridge.link.local_broker import shipped_file
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.envelope import random_bytes
from broker_bridge.wire.topics import OPERATOR, SERVER, is_name
from server.config import EXAMPLE, ServerConfig
from server.fleet.authority import Authority, Issued
from server.fleet.certificates import read_certificate, read_key, write_private, write_public
from server.fleet.finding import check_fleet, check_place
from server.fleet.keys import ServerKeys, new_keys
from server.fleet.machines import MADE_AGAIN, ca_fault, check_usable, read_if_there
from server.fleet.roster import Roster, read_roster, write_roster

__all__ = ["Home", "ServerKeys", "ca_name", "create", "from_backup"]

_TABLES = ("broker", "broker.operator", "broker.devices")


@dataclass(frozen=True)
class Home:
    """A fleet's folder."""

    folder: Path

    @classmethod
    def find(cls, folder: Path) -> "Home":
        """The fleet in `folder`. Raises LocalError if there is none, or it is somebody else's."""
        check_fleet(folder)
        return cls(folder)

    def config(self, path: Path | None = None) -> ServerConfig:
        """The settings. Raises LocalError."""
        return load_config(path or self.folder / "midge.toml", ServerConfig)

    def federation(self, config: ServerConfig | None = None) -> str:
        """Its name, in every topic. Raises LocalError where the settings say another than the
        keys, if these can be read: an operator may have no more than settings and a certificate.
        """
        name = known = (config or self.config()).federation
        with contextlib.suppress(LocalError):
            known = self.keys().federation
        if known != name:
            raise LocalError(
                f"{self.folder / 'midge.toml'} names the federation {name!r}, and the keys are for "
                f"{known!r}; put the name of the keys into midge.toml"
            )
        return name

    @property
    def _keys(self) -> Path:
        return self.folder / "keys" / "server.json"

    def keys(self) -> ServerKeys:
        """The server's keys. Raises LocalError."""
        return _read(self._keys, ServerKeys)

    def next_epoch(self, *, disk: Disk = REAL_DISK) -> ServerKeys:
        """Make a new fleet key, for all who are not shut out, and return the keys with it.

        What was sealed under the old one stays so: an open round keeps a copy of its key.
        """
        now = _now().timestamp()
        return self.change_keys(lambda k: k.with_next_fleet_key(random_bytes, now=now), disk=disk)

    def change_keys(
        self, change: Callable[[ServerKeys], ServerKeys], *, disk: Disk = REAL_DISK
    ) -> ServerKeys:
        """Replace the server's keys by what `change` makes of them, whole or not at all."""
        with alone(self.folder / "keys" / "lock"):  # or two commands lose one another's keys
            new = change(self.keys())
            data = msgspec.json.encode(new)
            write_atomic(self.folder / "keys" / "server.json", data, disk=disk)
        return new

    def roster(self) -> Roster:
        """Who was revoked. Raises LocalError."""
        keys = self.keys()
        return read_roster(self._roster, federation=keys.federation, root_public=keys.root_public)

    def set_roster(self, roster: Roster) -> None:
        """Write down who was revoked, signed with the server's key."""
        keys = self.keys()
        write_roster(self._roster, roster, sign=keys.sign, identity=keys.identity)

    @property
    def _roster(self) -> Path:
        return self.folder / "keys" / "roster.json"

    def authority(self) -> Authority:
        """The private CA. Raises LocalError that says how it comes back."""
        key = self.ca_key()
        return Authority.load(self.ca_certificate(), key)

    def ca_certificate(self) -> bytes:
        """The CA's certificate, PEM. Raises LocalError that says how it comes back."""
        fault = ca_fault(self.folder)
        if fault:
            raise LocalError(f"{fault}; {MADE_AGAIN.format(self.folder)}")
        return read_if_there(self.folder / "ca" / "ca.pem") or b""

    def ca_key(self) -> bytes:
        """The CA's private key, PEM. Raises LocalError: it comes back from a backup only."""
        path = self.folder / "ca" / "ca-key.pem"
        key = read_if_there(path)
        try:
            read_key(key or b"")
        except LocalError:
            raise from_backup(path, "lost" if key is None else "damaged") from None
        return key or b""

    def check_clock(self, now: datetime) -> None:
        """Raise LocalError if `now` cannot be: what is certified then would be good for nobody."""
        begins = datetime.fromtimestamp(self.keys().said.issued_at, UTC) - timedelta(days=1)
        ends = now + timedelta(days=1) if ca_fault(self.folder) else self._ca_ends
        if not begins <= now < ends:
            raise LocalError(
                f"this machine's clock says {now:%Y-%m-%d}, and this fleet has keys of "
                f"{begins:%Y-%m-%d} and a CA that ends on {ends:%Y-%m-%d}; set that clock"
            )

    @property
    def _ca_ends(self) -> datetime:
        return read_certificate(self.ca_certificate()).expires

    def access(self, who: str, config: ServerConfig | None = None) -> Access:
        """How `server` or `operator` gets into the broker. Raises LocalError."""
        broker = (config or self.config()).broker
        name, table = {"server": (SERVER, "broker"), "operator": (OPERATOR, "broker.operator")}[who]
        own, login = (
            Access(host=broker.host, port=broker.port, tls=self.tls(who)),
            broker.login(table),
        )
        if not (login.says_who or login.ca):
            check_usable(self.folder, "server" if who == "server" else "operator")
        return own.with_login(login, name, settings=self.folder / "midge.toml", table=table)

    def tls(self, who: str) -> TlsFiles:
        """The client certificate of `server` or `operator`, for midge's own broker."""
        return TlsFiles(
            self.folder / "ca" / "ca.pem",
            self.folder / who / "client.pem",
            self.folder / who / "client-key.pem",
        )

    def login_files(self, *, secret: bool) -> set[Path]:
        """What is there of the files that midge.toml names for a broker of somebody else's: those
        that hold a password or a key, or those for everybody. Raises LocalError.
        """
        broker = self.config().broker
        kinds = ("password_file", "key") if secret else ("ca", "certificate")
        tables = [broker.login(each).of("*") for each in _TABLES]
        named = {text for table in tables for kind in kinds if (text := getattr(table, kind))}
        here = self.folder.absolute()
        return {here / path for text in named for path in glob(text, root_dir=here)}

    @property
    def broker(self) -> Path:
        """What the broker needs."""
        return self.folder / "broker"

    @property
    def state(self) -> Path:
        """Database, models and spool."""
        return self.folder / "state"

    @property
    def database(self) -> Path:
        """The database's file."""
        return self.state / "midge.db"

    def bundle(self, device: str) -> Path:
        """Where the bundle of `device` is, or would be."""
        return self.folder / "bundles" / f"{device}.bundle"


def create(folder: Path, *, federation: str, hosts: list[str], port: int) -> Home:
    """Make a fleet in `folder`, which must be new or empty. Raises LocalError."""
    if not is_name(federation):
        raise LocalError(
            f"{federation!r} cannot name a federation: use a-z, 0-9 and - (at most 40 characters)"
        )
    check_place(folder)
    names = ("offline", "keys", "ca", "broker", "server", "operator", "bundles", "tasks", "state")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            (folder / name).mkdir(mode=0o700)
    _make_keys(folder, federation)
    _make_certificates(folder, federation, hosts)
    # Last: a folder without it is not a fleet, so an interrupted init can be seen.
    text = EXAMPLE.format(federation=federation, host=hosts[0], port=port)
    write_atomic(folder / "midge.toml", text.encode(), mode=0o644)
    return Home(folder)


def _make_keys(folder: Path, federation: str) -> None:
    root, keys = new_keys(federation, random_bytes, now=_now().timestamp())
    write_atomic(folder / "offline" / "root.json", msgspec.json.encode(root))
    write_atomic(folder / "keys" / "server.json", msgspec.json.encode(keys))


def _now() -> datetime:
    return datetime.now(UTC)


def _make_certificates(folder: Path, federation: str, hosts: list[str]) -> None:
    now = _now()
    ca = Authority.create(ca_name(federation), now=now)
    write_public(folder / "ca" / "ca.pem", ca.certificate)
    write_private(folder / "ca" / "ca-key.pem", ca.key)
    write_public(folder / "broker" / "ca.pem", ca.certificate)
    write_public(folder / "broker" / REVOKED_FILE, ca.revocation_list([], number=0))
    write_public(folder / "broker" / ACL_FILE, shipped_file(ACL_FILE).read_bytes())
    _write(folder / "broker", "broker", ca.issue_for_broker(hosts, now=now))
    _write(folder / "server", "client", ca.issue_for_server(now=now))
    _write(folder / "operator", "client", ca.issue_for_operator(now=now))


def _write(folder: Path, name: str, issued: Issued) -> None:
    write_public(folder / f"{name}.pem", issued.certificate)
    write_private(folder / f"{name}-key.pem", issued.key)


def _read(path: Path, kind: type[ServerKeys]) -> ServerKeys:
    data = read_if_there(path)
    if data is None:
        raise from_backup(path, "lost")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise from_backup(path, f"damaged ({error})") from None


def from_backup(path: Path, trouble: str) -> LocalError:
    """What to do about a file of the fleet's folder that nobody can make again."""
    return LocalError(
        f"{path} is {trouble}, and nobody can make it again; `midge restore` your newest backup "
        f"into another folder, and copy {path.parent.name}/{path.name} from there (without a "
        "backup: make a new fleet with `midge init`)"
    )


def ca_name(federation: str) -> str:
    """What its CA is called."""
    return f"midge {federation}"
