"""Who this device is: its keys, its certificate and what it pinned, in one folder.

    identity.json    everything, 0600, replaced as a whole; the source of truth
    enrolling.json   the keys of an enrolment that has no answer yet
    renewing.json    new keys that the server has not confirmed yet
    tls/             the PEM files that TLS wants, written again from identity.json
                     (where a broker of somebody else's wants a password, it is in there, too)

The keys are made here and their secret halves never leave this folder. A power cut
in mid-enrolment loses nothing: the same keys are sent again.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.enrolment import SYSTEM_CA, Bundle, Contact, Credentials, server_identity
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, SignKey, fingerprint, random_bytes
from broker_bridge.wire.messages import Configured, ServerIdentity
from broker_bridge.wire.topics import is_name

__all__ = [
    "FleetKey",
    "Identity",
    "Keys",
    "bootstrap_files",
    "contact",
    "enrolled",
    "load",
    "new_keys",
    "offered_keys",
    "pending_keys",
    "read_bundle",
    "renewed",
    "renewing_keys",
    "save",
    "tls_files",
    "with_server",
]

T = TypeVar("T")
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]

_FORMER_MAX = 4  # fleet keys beside the newest

# RFC 8410 §7: what stands before the 32 bytes of an Ed25519 private key in PKCS #8.
_PKCS8_ED25519 = bytes.fromhex("302e020100300506032b657004220420")


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Three secrets, one for each use. `repr` shows none."""

    sign_seed: Key
    kem_seed: Key
    tls_seed: Key

    @property
    def sign(self) -> SignKey:
        """Signs what this device sends."""
        return SignKey.from_seed(self.sign_seed)

    @property
    def kem(self) -> KemKey:
        """Authenticates what this device seals."""
        return KemKey.from_seed(self.kem_seed)

    @property
    def tls_public(self) -> bytes:
        """What the operator's CA certifies, to get into the broker."""
        return SignKey.from_seed(self.tls_seed).public

    @property
    def fingerprint(self) -> str:
        """What two people compare."""
        return fingerprint(self.sign.public)

    def __repr__(self) -> str:
        return f"Keys({self.fingerprint})"


class FleetKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What opened task and model in an epoch. `repr` shows no secret."""

    epoch: int
    key: Key

    def __repr__(self) -> str:
        return f"FleetKey({self.epoch})"


class _Format(msgspec.Struct):
    """All that is asked of a file of another version."""

    format: int


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An enrolled device. `repr` shows no secret."""

    format: Literal[1] = 1
    federation: str
    device: str
    broker_host: str
    broker_port: Annotated[int, Meta(ge=1, le=65_535)]
    root_public: Key
    server_sign: Key
    server_kem: Key
    server_sequence: int = 0
    keys: Keys
    psk: Key
    fleet_epoch: int
    fleet_key: Key
    former: tuple[FleetKey, ...] = ()  # an open round keeps the key that it began with
    ca_pem: str  # or SYSTEM_CA
    certificate_pem: str
    # What a broker that midge did not set up wants instead of that certificate.
    broker: Credentials | UnsetType = UNSET
    certified_until: int = 0  # names the certificate; nothing here compares it with a clock
    floor_s: float = 0.0  # it is later than this: the server said so, signed

    def __post_init__(self) -> None:
        if not (is_name(self.federation) and is_name(self.device)):
            raise ValueError("the names of federation and device must be levels of a topic")

    def __repr__(self) -> str:
        return f"Identity({self.federation}/{self.device} {self.keys.fingerprint})"

    @property
    def scope(self) -> str:
        """What signatures between the server and this device are bound to."""
        return f"{self.federation}/{self.device}"

    @property
    def fleet_keys(self) -> dict[int, bytes]:
        """The fleet keys we have, by epoch."""
        return {each.epoch: each.key for each in self.former} | {self.fleet_epoch: self.fleet_key}


def new_keys(random: Callable[[int], bytes] = random_bytes) -> Keys:
    """Make keys, from the operating system's randomness unless told otherwise."""
    return Keys(random(KEY_BYTES), random(KEY_BYTES), random(KEY_BYTES))


def pending_keys(
    folder: Path, *, disk: Disk = REAL_DISK, random: Callable[[int], bytes] = random_bytes
) -> Keys:
    """The keys of an enrolment under way: those found, else new ones, on disk before use."""
    path = folder / "enrolling.json"
    return _read(path, Keys, disk) if disk.exists(path) else _make_keys(path, disk, random)


def renewing_keys(
    folder: Path,
    identity: Identity,
    *,
    disk: Disk = REAL_DISK,
    random: Callable[[int], bytes] = random_bytes,
) -> Keys:
    """The keys that a renewal offers: those found, else new ones, on disk before use."""
    found = offered_keys(folder, identity, disk=disk)
    return found or _make_keys(folder / "renewing.json", disk, random)


def offered_keys(folder: Path, identity: Identity, *, disk: Disk = REAL_DISK) -> Keys | None:
    """The new keys that the server has not confirmed yet, if there are any that can be read."""
    path = folder / "renewing.json"
    if not disk.exists(path):
        return None
    with disk_errors(path):
        data = disk.read(path)
    try:
        found = msgspec.json.decode(data, type=Keys)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None  # damaged: other ones are offered
    return None if found == identity.keys else found  # the power went just after they became ours


def _make_keys(path: Path, disk: Disk, random: Callable[[int], bytes]) -> Keys:
    make_folder(path.parent, disk=disk)
    keys = new_keys(random)
    write_atomic(path, msgspec.json.encode(keys), disk=disk)
    return keys


def enrolled(
    bundle: Bundle, keys: Keys, configured: Configured, server: ServerIdentity | None = None
) -> Identity:
    """Put together what the bundle pinned, the device made, and the server answered.

    `server`: its identity, if a newer one than the bundle's was heard.
    """
    root = bytes.fromhex(bundle.root_public)
    if server is None:
        server = server_identity(root, bundle.federation, bytes.fromhex(bundle.server_identity))
    former = configured.former
    return Identity(
        federation=bundle.federation,
        device=bundle.device,
        broker_host=bundle.broker_host,
        broker_port=bundle.broker_port,
        root_public=root,
        server_sign=server.sign_public,
        server_kem=server.kem_public,
        server_sequence=server.sequence,
        keys=keys,
        psk=bytes.fromhex(bundle.token),
        fleet_epoch=configured.fleet_epoch,
        fleet_key=configured.fleet_key,
        former=() if former is None else (FleetKey(former.epoch, former.key),),
        ca_pem=bundle.ca_pem,
        broker=bundle.broker,
        certificate_pem=configured.certificate_pem,
        certified_until=configured.certified_until,
        floor_s=configured.issued_at,
    )


def renewed(identity: Identity, configured: Configured, keys: Keys) -> Identity:
    """The identity after an answer to our `Renew`, which was opened with `keys`."""
    if configured.device != identity.device:
        raise PeerError("other_device", "an answer for another device")
    held = identity.fleet_keys | _fleet_keys(configured)
    newest = max(held)
    others = sorted((FleetKey(e, k) for e, k in held.items() if e != newest), key=_epoch)
    changed = {} if not configured.certificate_pem else {
        "certificate_pem": configured.certificate_pem,
        "certified_until": configured.certified_until,
    }  # fmt: skip
    return msgspec.structs.replace(
        identity, keys=keys, fleet_epoch=newest, fleet_key=held[newest],
        former=tuple(others[-_FORMER_MAX:]), floor_s=max(identity.floor_s, configured.issued_at),
        **changed,
    )  # fmt: skip


def _fleet_keys(configured: Configured) -> dict[int, bytes]:
    former = configured.former
    held = {} if former is None else {former.epoch: former.key}
    return held | {configured.fleet_epoch: configured.fleet_key}


def _epoch(key: FleetKey) -> int:
    return key.epoch


def with_server(identity: Identity, signed: bytes) -> Identity:
    """The identity with the server's newest keys, as the root signed them; itself if these are
    no news. Raises PeerError for what the root did not sign, and for a second word on one
    sequence."""
    server = server_identity(identity.root_public, identity.federation, signed)
    same = (server.sign_public, server.kem_public) == (identity.server_sign, identity.server_kem)
    if server.sequence < identity.server_sequence or same:
        return identity
    if server.sequence == identity.server_sequence:
        raise PeerError("two_identities", "the root signed two servers with one number")
    return msgspec.structs.replace(
        identity, server_sign=server.sign_public, server_kem=server.kem_public,
        server_sequence=server.sequence,
    )  # fmt: skip


def save(folder: Path, identity: Identity, *, disk: Disk = REAL_DISK) -> None:
    """Write the identity down, whole, then forget the enrolment, and new keys that it has."""
    write_atomic(folder / "identity.json", msgspec.json.encode(identity), disk=disk)
    with disk_errors(folder):
        disk.unlink(folder / "enrolling.json")
        if offered_keys(folder, identity, disk=disk) is None:
            disk.unlink(folder / "renewing.json")


def load(folder: Path, *, disk: Disk = REAL_DISK) -> Identity | None:
    """The identity in `folder`, or None if the device has not enrolled."""
    path = folder / "identity.json"
    return _read(path, Identity, disk) if disk.exists(path) else None


def _read(path: Path, kind: type[T], disk: Disk) -> T:
    with disk_errors(path):
        data = disk.read(path)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if _is_newer(data):
            raise LocalError(
                f"{path} was written by a newer midge; install that one again, and keep the file: "
                "it holds this device's keys"
            ) from None
        raise LocalError(
            f"{path} is damaged ({error}); restore it from a backup, or remove it and enrol anew"
        ) from None


def _is_newer(data: bytes) -> bool:
    """Whether a whole file says that it is of a later format."""
    try:
        return msgspec.json.decode(data, type=_Format).format > 1
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def tls_files(folder: Path, identity: Identity) -> TlsFiles:
    """Write the PEM files for TLS and say where they are."""
    key = _pem("PRIVATE KEY", _PKCS8_ED25519 + identity.keys.tls_seed)
    own = identity.certificate_pem, key
    return _write_pem(folder / "tls", identity.ca_pem, own, identity.broker, identity.floor_s)


def bootstrap_files(folder: Path, bundle: Bundle) -> TlsFiles:
    """The same for the bundle's certificate, which gets in only to enrol."""
    own = bundle.bootstrap_certificate_pem, bundle.bootstrap_key_pem
    return _write_pem(folder / "tls-bootstrap", bundle.ca_pem, own, bundle.broker, 0.0)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle file. Raises LocalError."""
    with disk_errors(path):
        data = path.read_bytes()
    try:
        bundle = Bundle.decode(data)
        root = bytes.fromhex(bundle.root_public)
        server_identity(root, bundle.federation, bytes.fromhex(bundle.server_identity))
    except PeerError as error:
        raise LocalError(
            f"{path}: {error}; make a new one with `midge device add` and copy it whole"
        ) from None
    return bundle


def contact(bundle: Bundle) -> Contact:
    """The enrolment that a bundle is for."""
    return Contact(bundle.federation, bundle.device, bytes.fromhex(bundle.token))


def _write_pem(
    folder: Path, ca: str, own: tuple[str, str], shown: Credentials | UnsetType, floor_s: float
) -> TlsFiles:
    """`own`: certificate and key for midge's broker; `shown`: for another, in their place."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if isinstance(shown, Credentials) and shown.says_who:
        own = shown.certificate_pem, shown.key_pem
    texts = {"ca.pem": "" if ca == SYSTEM_CA else ca, "device.pem": own[0], "device.key": own[1]}
    for name, text in texts.items():
        if text and not _holds(folder / name, text.encode()):
            write_atomic(folder / name, text.encode())
    ca_path, certificate, key = (folder / name if text else None for name, text in texts.items())
    return TlsFiles(ca_path, certificate, key, floor_s)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file is as it should be; what a dying card made of it is any bytes at all."""
    with disk_errors(path):
        return path.exists() and path.read_bytes() == data


def _pem(label: str, der: bytes) -> str:
    body = base64.encodebytes(der).decode().replace("\n", "")
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"
