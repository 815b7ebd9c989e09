"""How one gets into a broker: where it is, whom we take for it, and who we are to it.

A broker that midge set up takes certificates of the fleet's own CA, and there is nothing to
say. Somebody else's broker has a certificate of another CA, and lets in who has a user name and
a password, or a client certificate that it knows. `Login` is how settings say so, in files'
names; `Access` is what comes of it; whatever connects does so with an `Access`.

Promises: a password or key is read from a file that its owner alone may read, is in no setting
and no repr, and goes to a broker only over TLS, after the broker has shown who it is.
Promises nothing about what the holder of a password may do there: the broker's rules say that.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles, check_pair, client_context
from broker_bridge.wire.enrolment import SYSTEM_CA, TEXT_CHARS_MAX, Credentials, Text
from broker_bridge.wire.envelope import CLIENT_ID, KEY_BYTES, client_id, random_bytes

__all__ = ["Access", "Login", "ca_pem", "credentials", "read_secret"]


class Login(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings, in `midge.toml` and `device.toml`: what somebody else's broker wants of us.

    Empty: as with midge's own broker. `{name}` stands for a device's name, `midge-server` or
    `midge-operator`; a path is relative to the settings' folder.
    """

    ca: Text = ""  # a PEM file, or "system": whom this machine trusts
    username: Text = ""
    password_file: Text = ""
    certificate: Text = ""
    key: Text = ""
    client_id: Text = ""  # "{name}-{random}" unless said otherwise

    def __post_init__(self) -> None:
        if self.password_file and not self.username:
            raise ValueError("password_file stands without username; name both")
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key belong together; name both")

    @property
    def says_who(self) -> bool:
        """Whether we are somebody else to this broker than to midge's own."""
        return bool(self.username or self.certificate)

    def of(self, name: str) -> "Login":
        """The same for `name`. Its client id stays a pattern."""
        named = {
            each: str(getattr(self, each)).replace("{name}", name)
            for each in ("username", "password_file", "certificate", "key")
        }
        return msgspec.structs.replace(self, **named)


@dataclass(frozen=True, kw_only=True)
class Access:
    """A broker, and how we get in. `advice`: what a person changes when we do not."""

    host: str
    port: int
    tls: TlsFiles
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    client_id: str = CLIENT_ID
    advice: str = ""

    def with_login(self, login: Login, name: str, *, settings: Path, table: str) -> "Access":
        """The same broker as `name` gets into it with this login. `settings`: the file that holds
        it, in its `table`. Raises LocalError for files that are not there or not ours alone.
        """
        mine, folder = login.of(name), settings.parent
        tls = self.tls
        if mine.ca:
            tls = replace(tls, ca=None if mine.ca == SYSTEM_CA else folder / mine.ca)
        found = replace(
            self, tls=tls, client_id=mine.client_id or self.client_id,
            advice=f"correct [{table}] in {settings}",
        )  # fmt: skip
        if not mine.says_who:
            return found
        certificate = folder / mine.certificate if mine.certificate else None
        key = folder / mine.key if mine.key else None
        if key is not None:
            read_secret(key, "the key")
        return replace(
            found, tls=replace(tls, certificate=certificate, key=key),
            username=mine.username or None, password=_password(mine, folder),
        )  # fmt: skip

    def open(self, name: str, *, seed: bytes | None = None, **options: Any) -> PahoLink:
        """Connect as `name`; see `PahoLink.open`. `seed`: of the client id of who comes back to
        its session; without one the id is new. Raises LinkError, LocalError.
        """
        return PahoLink.open(
            self.host, self.port,
            client_id=client_id(name, seed or random_bytes(KEY_BYTES), self.client_id),
            tls=self.tls, username=self.username, password=self.password, advice=self.advice,
            **options,
        )  # fmt: skip


def credentials(login: Login, name: str, folder: Path) -> Credentials | None:
    """What the bundle of the device `name` carries: the files' contents. None for midge's own
    broker. Raises LocalError.
    """
    mine = login.of(name)
    if not mine.says_who and not mine.client_id:
        return None
    certificate = key = ""
    if mine.certificate:
        paths = folder / mine.certificate, folder / mine.key
        key = read_secret(paths[1], "the key")
        check_pair(*paths)  # shows here, and not first on the device
        certificate = _text(paths[0])
    return Credentials(
        username=mine.username, password=_password(mine, folder) or "",
        certificate_pem=certificate, key_pem=key, client_id=mine.client_id,
    )  # fmt: skip


def ca_pem(ca: str, folder: Path, *, own: str) -> str:
    """What a bundle says of the CA: PEM, or `SYSTEM_CA`. `own`: the fleet's. Raises LocalError."""
    if not ca or ca == SYSTEM_CA:
        return ca or own
    client_context(TlsFiles(folder / ca))
    return _text(folder / ca)


def read_secret(path: Path, what: str) -> str:
    """The text in a file that its owner alone may read. Raises LocalError."""
    text = _text(path)
    with disk_errors(path):
        mode = path.stat().st_mode
    if mode & 0o077:
        raise LocalError(
            f"others on this machine may read {what} in {path}; `chmod 600 {path}`, and get "
            "another if they could have"
        )
    return text


def _password(login: Login, folder: Path) -> str | None:
    """The file's only line."""
    if not login.password_file:
        return None
    path = folder / login.password_file
    words = read_secret(path, "the password").removesuffix("\n").removesuffix("\r")
    if not words or "\n" in words or len(words) > TEXT_CHARS_MAX:
        raise LocalError(f"{path} should hold a password in one line, and nothing else")
    return words


def _text(path: Path) -> str:
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise LocalError(f"{path} is no text; check that it is the right file") from None
