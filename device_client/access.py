"""How this device gets into its broker: as its bundle said, unless `device.toml` says otherwise."""

from dataclasses import replace
from pathlib import Path

from msgspec import UnsetType

from broker_bridge.link.access import Access
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.enrolment import Bundle, Credentials
from broker_bridge.wire.envelope import CLIENT_ID
from device_client.config import DeviceConfig
from device_client.identity import Identity, bootstrap_files, tls_files

__all__ = ["access_to_enrol", "access_to_work"]


def access_to_work(folder: Path, identity: Identity, config: DeviceConfig, path: Path) -> Access:
    """For an enrolled device with its state in `folder`. `path`: where `config` is from.

    Writes the PEM files for TLS. Raises LocalError for files that `config` names.
    """
    host = config.broker_host or identity.broker_host
    port = config.broker_port or identity.broker_port
    found = _access(host, port, tls_files(folder, identity), identity.broker)
    return found.with_login(config.broker, identity.device, settings=path, table="broker")


def access_to_enrol(folder: Path, bundle: Bundle) -> Access:
    """For a device that has nothing but a bundle."""
    host, port = bundle.broker_host, bundle.broker_port
    found = _access(host, port, bootstrap_files(folder, bundle), bundle.broker)
    advice = "correct [broker.devices] in midge.toml, and make another bundle: `midge device add`"
    return replace(found, advice=advice)


def _access(host: str, port: int, tls: TlsFiles, shown: Credentials | UnsetType) -> Access:
    if isinstance(shown, UnsetType):
        return Access(host=host, port=port, tls=tls)
    return Access(
        host=host, port=port, tls=tls, username=shown.username or None,
        password=shown.password or None, client_id=shown.client_id or CLIENT_ID,
    )  # fmt: skip
