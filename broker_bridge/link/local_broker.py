"""Start a broker on this machine: for the demo, the tests, and `midge broker`.

Promises: mosquitto with the shipped mosquitto.conf and mosquitto.acl, listening on
127.0.0.1 unless told otherwise, up when `start` returns and gone when `stop` does;
every reason why it is not becomes one sentence. Where no mosquitto can be had, the
pip package `iotcore`, and one line (`lacks`) that says what is missing then.

Does not make certificates: `folder` must hold ca.pem, broker.pem, broker-key.pem and, for
mosquitto, the list of revoked certificates.
"""

import contextlib
import getpass
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO, Literal

from broker_bridge.disk import owner_only, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.link.broker_config import (
    ACL_FILE,
    BROKER_FILE,
    BROKER_KEY_FILE,
    CA_FILE,
    REVOKED_FILE,
    render_config,
    render_iotcore,
)

__all__ = ["Engine", "LocalBroker", "find_engine", "find_mosquitto", "free_port", "shipped_file"]

Engine = Literal["mosquitto", "iotcore"]

IOTCORE_LACKS = (
    "demo broker iotcore: it checks no client certificates, has no ACL and no persistence; "
    "install mosquitto for real use"
)

_CATCHES_SIGNALS_S = 10.0  # after it listens, at the latest, whatever its log says or has lost
_PORTS = range(20_000, 32_000)
_CLAIMS: list[socket.socket] = []  # as long as this process lives

# Debian and Homebrew install it where a user's PATH may not look.
_MOSQUITTO_FOLDERS = (
    "/usr/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/sbin",
    "/opt/homebrew/opt/mosquitto/sbin",
    "/usr/local/opt/mosquitto/sbin",
    "/home/linuxbrew/.linuxbrew/sbin",
)


def find_mosquitto() -> Path | None:
    """Return the mosquitto program of this machine, if it has one."""
    places = os.pathsep.join([os.environ.get("PATH", ""), *_MOSQUITTO_FOLDERS])
    found = shutil.which("mosquitto", path=places)
    return None if found is None else Path(found)


def find_engine() -> Engine:
    """Return the best broker this machine has. Raises LocalError if it has none."""
    if find_mosquitto() is not None:
        return "mosquitto"
    if importlib.util.find_spec("iotcore") is not None:
        return "iotcore"
    raise LocalError(
        "no MQTT broker is installed; run `sudo apt install mosquitto` or "
        "`brew install mosquitto`, or, for a demo only, `pip install iotcore`"
    )


def shipped_file(name: str) -> Path:
    """Return `mosquitto.conf` or `mosquitto.acl`: beside the packages, or where pip put them."""
    root = Path(__file__).resolve().parents[2]
    for folder in (root, Path(sys.prefix) / "share" / "midge"):
        if (folder / name).is_file():
            return folder / name
    raise LocalError(f"{name} is missing from this installation of midge; install it again")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago.

    From below those that systems give to outgoing connections, so that nobody dials from it
    while a broker is restarted.
    """
    while True:
        port = secrets.choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            _claim(port)
            return port


def _claim(port: int) -> None:
    """Keep other processes of ours from choosing this port before a broker is bound to it.

    A name in Linux's abstract namespace, gone with this process. Raises OSError if it is taken.
    """
    if sys.platform == "linux":
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0midge-port-{port}")
        except OSError:
            claim.close()
            raise
        _CLAIMS.append(claim)


_TIED = ["setpriv", "--pdeathsig", "TERM", "--"]  # of util-linux; it becomes the command


class LocalBroker:
    """One broker process. `with LocalBroker(folder, port=…) as broker:` starts and stops it.

    Writes its configuration, its log and its database into `folder`. `conf_text` replaces
    the shipped mosquitto.conf (and means no TLS for iotcore): for tests. `conf_more` goes
    below it, as it is. Not `shipped_acl`: the folder's mosquitto.acl is kept as it is. `tied`: it
    ends with the thread that started it, however that ended, where this machine can do so.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        bind: str = "127.0.0.1",
        engine: Engine | None = None,
        conf_text: str | None = None,
        conf_more: str = "",
        shipped_acl: bool = True,
        tied: bool = False,
    ) -> None:
        self.folder = folder.absolute()
        self.port = port
        self.bind = bind
        self.engine: Engine = engine or find_engine()
        self.log_path = self.folder / "broker.log"
        self._conf_text = conf_text
        self._conf_more = conf_more
        self._shipped_acl = shipped_acl
        self._tied = _TIED if tied and shutil.which(_TIED[0]) else []
        self._log: BinaryIO | None = None
        self._log_start = 0
        self._listens_since_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """The address to dial from this machine."""
        return "127.0.0.1" if self.bind in ("0.0.0.0", "") else self.bind  # noqa: S104

    @property
    def lacks(self) -> str:
        """What this engine cannot do, for a person to read; empty for mosquitto."""
        return IOTCORE_LACKS if self.engine == "iotcore" else ""

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return None if self._process is None else self._process.pid

    def start(self, *, wait_s: float = 15.0) -> None:
        """Start the broker and return when it accepts connections. Raises LocalError."""
        if self.is_running:
            return
        self._check_port()
        command = self._prepare()
        if self._log is not None:  # the broker before this one ended by itself
            self._log.close()
        # Kept open: what the broker says can be read even where the file was renamed or removed.
        self._log = open(self.log_path, "a+b", opener=owner_only)  # noqa: SIM115
        self._log_start = self._log.tell()
        # A session of its own: Ctrl-C is for us, and the broker goes last.
        self._process = subprocess.Popen(
            [*self._tied, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=self.folder,
            start_new_session=True,
        )
        self._wait_until_up(wait_s)
        self._listens_since_s = time.monotonic()

    def stop(self) -> None:
        """Ask the broker to end, and wait for it; mosquitto writes its database first."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._let_go()

    def kill(self) -> None:
        """End the broker as a power cut would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._let_go()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the broker ends by itself; say whether it did."""
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
        return True

    def restart(self) -> None:
        """Stop if running, and start again on the same port with the same files."""
        self.stop()
        self.start()

    def reload(self, *, wait_s: float = 15.0) -> None:
        """Have mosquitto read the revoked certificates and the rules again, while it runs.

        The rules hold at once, for those who are connected too. A certificate is looked at
        only when its client connects (decision 0085). Raises LocalError if it does not do it.
        """
        if self.engine != "mosquitto" or self._process is None:
            return
        give_up = time.monotonic() + wait_s
        # It listens a moment before it catches signals, and one that it does not catch ends it.
        catches_s = self._listens_since_s + _CATCHES_SIGNALS_S
        self._wait_for_word(b" running", self._log_start, min(give_up, catches_s))
        start = self._log_bytes()
        while self.is_running and time.monotonic() < give_up:
            # mosquitto 2.0.11 forgets a signal that comes while it still obeys the one before.
            self._process.send_signal(signal.SIGHUP)
            if self._wait_for_word(b"Reloading config", start, time.monotonic() + 1.0):
                return
        raise LocalError(f"mosquitto did not read its files again; see {self.log_path}")

    def __enter__(self) -> "LocalBroker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _let_go(self) -> None:
        """The process is gone."""
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _prepare(self) -> list[str]:
        if self._conf_text is None:
            listed = (REVOKED_FILE,) if self.engine == "mosquitto" else ()
            for name in (CA_FILE, BROKER_FILE, BROKER_KEY_FILE, *listed):
                if not (self.folder / name).is_file():
                    raise LocalError(
                        f"the broker needs {self.folder / name}; `midge init` makes it"
                    )
        if self.engine == "iotcore":
            return self._prepare_iotcore()
        return self._prepare_mosquitto()

    def _prepare_mosquitto(self) -> list[str]:
        program = find_mosquitto()
        if program is None:
            raise LocalError("mosquitto is not installed; run `sudo apt install mosquitto`")
        text = self._conf_text
        if text is None:
            text = shipped_file("mosquitto.conf").read_text()
            if self._shipped_acl:
                shutil.copyfile(shipped_file(ACL_FILE), self.folder / ACL_FILE)
        # mosquitto must read a key that only its owner can read, so it stays who we are.
        config = self.folder / "mosquitto.conf"
        rendered = render_config(
            text, port=self.port, bind=self.bind, folder=self.folder, user=getpass.getuser()
        )
        write_atomic(config, (rendered + self._conf_more).encode(), durable=False)
        return [str(program), "-c", str(config)]

    def _prepare_iotcore(self) -> list[str]:
        if importlib.util.find_spec("iotcore") is None:
            raise LocalError("iotcore is not installed; run `pip install iotcore`")
        config = self.folder / "iotcore.toml"
        folder = self.folder if self._conf_text is None else None
        text = render_iotcore(port=self.port, bind=self.bind, folder=folder)
        write_atomic(config, text.encode(), durable=False)
        return [sys.executable, "-m", "iotcore", "--config", str(config), "--log-level", "ERROR"]

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.bind else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.bind, self.port))
            except PermissionError as error:
                raise LocalError(f"port {self.port} needs root; choose one above 1023") from error
            except OSError as error:
                raise LocalError(
                    f"port {self.port} on {self.bind} cannot be used ({error.strerror}); "
                    "stop the program that holds it (perhaps another broker) or choose "
                    "another port"
                ) from error

    def _wait_for_word(self, word: bytes, start: int, give_up: float) -> bool:
        """Whether the log says this, from byte `start` on, while the broker runs."""
        while self._log is not None and self.is_running and time.monotonic() < give_up:
            size = self._log_bytes()
            start = start if start <= size else 0  # somebody emptied it, as logrotate may
            if word in os.pread(self._log.fileno(), size - start, start):
                return True
            time.sleep(0.01)
        return False

    def _log_bytes(self) -> int:
        return 0 if self._log is None else os.fstat(self._log.fileno()).st_size

    def _wait_until_up(self, wait_s: float) -> None:
        give_up = time.monotonic() + wait_s
        while time.monotonic() < give_up:
            if not self.is_running:
                raise LocalError(
                    f"{self.engine} did not start: {self._last_words()} (log: {self.log_path})"
                )
            try:
                with socket.create_connection((self.host, self.port), timeout=1.0):
                    return
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise LocalError(
            f"{self.engine} did not answer on {self.host}:{self.port} within "
            f"{wait_s:g} s (log: {self.log_path})"
        )

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        errors = [line for line in lines[-20:] if "Error" in line]
        said = " ".join(errors[-2:] or lines[-1:] or ["it said nothing."])
        if "restore persistent database" not in said:
            return said
        # Nobody's promise lies there: the server lays out again what the broker forgot.
        return (
            f"{said} Its memory is damaged: remove {self.folder / 'midge.db'}, and start it again"
        )
