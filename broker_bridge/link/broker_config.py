"""The files a local broker is started with: the shipped ones, moved to another place.

PURE: text in, text out. `render_config` changes where the broker listens, where its
files are and as whom it runs, and nothing else; what the tests and the demo run is
therefore what a fleet runs. `render_iotcore` writes the poor relation's file.
"""

from pathlib import PurePath

__all__ = [
    "ACL_FILE",
    "BROKER_FILE",
    "BROKER_KEY_FILE",
    "CA_FILE",
    "REVOKED_FILE",
    "render_config",
    "render_iotcore",
]

CA_FILE = "ca.pem"
BROKER_FILE = "broker.pem"
BROKER_KEY_FILE = "broker-key.pem"
ACL_FILE = "mosquitto.acl"
REVOKED_FILE = "revoked.pem"

# The folders that mosquitto.conf names. Both become one folder of ours.
_SHIPPED_FOLDERS = ("/etc/mosquitto/midge/", "/var/lib/mosquitto/")
_PATH_OPTIONS = frozenset(
    {"acl_file", "cafile", "certfile", "crlfile", "keyfile", "persistence_location"}
)


def render_config(
    conf_text: str, *, port: int, bind: str, folder: PurePath, user: str | None = None
) -> str:
    """Return `conf_text` listening on `bind`:`port`, with its files in `folder`.

    `user`: whom mosquitto becomes when root starts it; None leaves the line as it is.
    """
    lines = conf_text.splitlines()
    return "\n".join(_line(line, port, bind, folder, user) for line in lines) + "\n"


def _line(line: str, port: int, bind: str, folder: PurePath, user: str | None) -> str:
    option, _, value = line.partition(" ")
    if option == "listener":
        return f"listener {port} {bind}"
    if option == "user" and user is not None:
        return f"user {user}"
    if option in _PATH_OPTIONS:
        for shipped in _SHIPPED_FOLDERS:
            if value.startswith(shipped):
                return f"{option} {folder}/{value.removeprefix(shipped)}"
    return line


def render_iotcore(*, port: int, bind: str, folder: PurePath | None) -> str:
    """Return a rumqttd configuration. `folder`: where its certificates are; None: no TLS.

    Figures measured: with small segments it loses messages that it acknowledged, and it
    never frees them, so 4 × 64 MB is the compromise. The default payload of 20 KB would
    cut off every chunk.
    """
    tls = (
        ""
        if folder is None
        else f"""
[v4.1.tls]
capath = {_toml(folder / CA_FILE)}
certpath = {_toml(folder / BROKER_FILE)}
keypath = {_toml(folder / BROKER_KEY_FILE)}
"""
    )
    return f"""id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 67108864
max_segment_count = 4

[v4.1]
name = "midge"
listen = "{bind}:{port}"
next_connection_delay_ms = 1
{tls}
[v4.1.connections]
connection_timeout_ms = 5000
max_payload_size = 1048576
max_inflight_count = 100
dynamic_filters = true
"""


def _toml(path: PurePath) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
