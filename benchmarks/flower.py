"""Flower in its deployment mode, for measuring beside midge: a SuperLink and SuperNodes.

Installed from PyPI into an environment of its own (.venv-flower), the newest release that
pip finds, with its own documented commands and defaults. The app gives 100,000 float32
parameters back as they came: `flower_app/`.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.fleet import stop, until
from broker_bridge.link.local_broker import free_port
from server.fleet.authority import Authority

__all__ = ["Flower", "FlowerMissingError", "install"]

_HERE = Path(__file__).parent
_APP = _HERE / "flower_app"
_ENVIRONMENT = _HERE.parent / ".venv-flower"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class FlowerMissingError(Exception):
    """Flower cannot be had here; the text says why."""


def install() -> str:
    """Make the environment once; return Flower's version. Raises FlowerMissingError."""
    python = _ENVIRONMENT / "bin" / "python"
    ready = _ENVIRONMENT / ".ready"
    if not ready.exists():
        print("installing flwr into .venv-flower (about 70 MB) …", file=sys.stderr, flush=True)
        _must(sys.executable, "-m", "venv", _ENVIRONMENT)
        _must(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "flwr")
        ready.touch()
    code = "import importlib.metadata; print(importlib.metadata.version('flwr'))"
    return _must(python, "-c", code).strip()


def _must(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FlowerMissingError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


class Flower:
    """Use as a context manager. `encrypted`: TLS between SuperNodes and SuperLink.

    A round waits for `nodes` SuperNodes; without `start_nodes` the caller starts them.
    """

    def __init__(self, *, nodes: int, encrypted: bool, start_nodes: bool = True) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="flower-bench-")
        self.folder = Path(self._temporary.name)
        self.port = free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        self._count = nodes
        self._start_nodes = start_nodes
        self._encrypted = encrypted
        self._environ = os.environ | _QUIET | {
            "FLWR_HOME": str(self.folder / "home"),
            "PATH": f"{_ENVIRONMENT / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }  # fmt: skip

    def __enter__(self) -> "Flower":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            stop(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._temporary.cleanup()

    def _start(self) -> None:
        secure = ["--insecure"]
        if self._encrypted:
            self._make_certificates()
            secure = [
                f"--ssl-certfile={self.folder / 'server.pem'}",
                f"--ssl-keyfile={self.folder / 'server.key'}",
                f"--ssl-ca-certfile={self.ca}",
            ]
        self._write_config()
        self._run(
            "superlink", "flower-superlink", *secure, "--port", str(self.port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        until(self._link_is_up, "the SuperLink to listen")
        for number in range(self._count if self._start_nodes else 0):
            self.start_node(number, self.port)

    def start_node(self, number: int, port: int) -> subprocess.Popen[bytes]:
        """Start one more SuperNode, that finds its SuperLink at `port`."""
        secure = f"--root-certificates={self.ca}" if self._encrypted else "--insecure"
        return self._run(
            f"node-{number}", "flower-supernode", secure, "--superlink", f"127.0.0.1:{port}",
            "--port", str(free_port()),
        )  # fmt: skip

    @property
    def ca(self) -> Path:
        """The certificate that the SuperNodes trust."""
        return self.folder / "ca.pem"

    def _make_certificates(self) -> None:
        now = datetime.now(UTC)
        authority = Authority.create("flower benchmark", now=now)
        issued = authority.issue_for_broker(["localhost", "127.0.0.1"], now=now)
        self.ca.write_bytes(authority.certificate)
        (self.folder / "server.pem").write_bytes(issued.certificate)
        (self.folder / "server.key").write_bytes(issued.key)

    def _write_config(self) -> None:
        trust = f'root-certificates = "{self.ca}"' if self._encrypted else "insecure = true"
        path = self.folder / "home" / "config.toml"
        path.parent.mkdir()
        path.write_text(
            '[superlink]\ndefault = "bench"\n\n[superlink.bench]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust}\n'
        )

    def _run(self, name: str, program: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            argv = [str(_ENVIRONMENT / "bin" / program), *options]
            # A session of its own: what it starts is stopped with it.
            process = subprocess.Popen(
                argv, stdout=log, stderr=log, env=self._environ, start_new_session=True
            )
        self._running.append(process)
        return process

    def _link_is_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self, name: str) -> str:
        """What a process has said so far, without colours."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def rounds(
        self, count: int, *, wait_s: float = 600.0, on_round: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Run `count` rounds; return when each one's mean was ready (monotonic seconds).

        `on_round` is called within half a second of each.
        """
        times = self.folder / "rounds.log"
        config = f"rounds={count} nodes={self._count} log='{times}'"
        run = self._run("run", "flwr", "run", str(_APP), "bench", "--run-config", config)
        give_up = time.monotonic() + wait_s
        found: list[float] = []
        while len(found) < count:
            time.sleep(0.5)
            if times.exists():
                lines = times.read_text().splitlines()
                fresh = [float(line.split()[1]) for line in lines[len(found) :]]
                found += fresh
                for _ in fresh:
                    on_round()
            failed = run.poll() not in (None, 0)
            if failed or time.monotonic() > give_up:
                said = self.log("run" if failed else "superlink")
                raise RuntimeError(f"Flower ran {len(found)} of {count} rounds:\n{said[-2000:]}")
        return found
