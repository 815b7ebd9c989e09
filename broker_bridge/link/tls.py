"""TLS towards the broker.

Promises: the broker's certificate and host name are always verified, and TLS 1.2 is
the least. A machine whose clock may be wrong gives a time that it knows has passed
(`floor_s`), and the certificate's dates are held against that and never against the clock.
Promises nothing about what the broker does with what it is sent: that
is what sealing is for.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

from broker_bridge.errors import LocalError

__all__ = ["TlsFiles", "check_pair", "client_context"]


@dataclass(frozen=True)
class TlsFiles:
    """Where the PEM files are: the CA we trust, and who we are to the broker.

    `ca` None: the CAs that this machine trusts, as for web sites.
    `floor_s`: seconds since 1970 that have surely passed, for a machine whose clock is not to
    be believed. None: the clock is right.
    """

    ca: Path | None
    certificate: Path | None = None
    key: Path | None = None
    floor_s: float | None = None


# OpenSSL's X509_V_FLAG_NO_CHECK_TIME (1.1.0 and later), which `ssl` has no name for.
_NO_CHECK_TIME = 0x200000


class _DatedSocket(ssl.SSLSocket):
    """Holds the end of the peer's certificate against the floor, once the rest is verified."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        ends = str((self.getpeercert() or {}).get("notAfter", ""))
        floor_s = getattr(self.context, "floor_s", 0.0)
        if not ends or ssl.cert_time_to_seconds(ends) < floor_s:
            error = ssl.SSLCertVerificationError(1, "certificate has expired")
            error.verify_message = f"certificate has expired ({ends})"
            raise error


class _FlooredContext(ssl.SSLContext):
    """Verifies all but dates; `_DatedSocket` looks at those."""

    sslsocket_class = _DatedSocket
    floor_s = 0.0


def _context(floor_s: float | None) -> ssl.SSLContext:
    """It verifies certificate and host name, as PROTOCOL_TLS_CLIENT does."""
    if floor_s is None:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = _FlooredContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= _NO_CHECK_TIME
    context.floor_s = floor_s
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context that trusts `files.ca` and nobody else.

    Raises LocalError, naming the file, when one is missing, unreadable or no PEM.
    """
    context = _context(files.floor_s)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.ca is None:
        _trust_as_this_machine(context)
    else:
        _trust(context, files.ca)
    if files.certificate is not None:
        _load_identity(context, files.certificate, files.key or files.certificate)
    return context


def check_pair(certificate: Path, key: Path) -> None:
    """Raise LocalError unless these are a certificate and its key."""
    _load_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key)


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    _check_readable(ca, "CA certificate")
    try:
        context.load_verify_locations(cafile=str(ca))
    except ssl.SSLError as error:
        raise LocalError(
            f"{ca} holds no CA certificate in PEM form; copy the CA file of your broker there"
        ) from error


def _trust_as_this_machine(context: ssl.SSLContext) -> None:
    context.load_default_certs()
    # A folder of CAs is read only when one is looked for, so the context cannot be asked.
    found = ssl.get_default_verify_paths()
    if found.cafile is None and not (found.capath and any(Path(found.capath).iterdir())):
        raise LocalError(
            "this machine trusts no CA; `sudo apt install ca-certificates`, or name the "
            "broker's CA in a PEM file"
        )


def _load_identity(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _check_readable(certificate, "client certificate")
    _check_readable(key, "client key")
    try:
        # An empty password: OpenSSL would otherwise stop and ask on the terminal.
        context.load_cert_chain(str(certificate), str(key), password="")
    except ssl.SSLError as error:
        if "MISMATCH" in str(error).upper():
            problem = f"the key in {key} does not belong to the certificate in {certificate}"
        else:
            problem = f"{certificate} and {key} are not a certificate and its unencrypted PEM key"
        raise LocalError(
            f"{problem}; put both back from a backup, or enrol again where this is a device"
        ) from error


def _check_readable(path: Path, what: str) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError as error:
        raise LocalError(f"the {what} {path} does not exist; check the path") from error
    except OSError as error:
        raise LocalError(
            f"the {what} {path} cannot be read ({error.strerror}); check owner and mode"
        ) from error
