"""Every command in the README runs, in order, as a reader would type it.

The port and the places of the examples are the only things changed: another test may
have the README's port, and the commands run in an empty folder.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_bridge.link.local_broker import free_port

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The lines of all shell blocks, continued lines joined, comments gone."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def fleet_commands() -> list[str]:
    return [line for line in commands() if not line.startswith("make ")]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator["Shell"]:
    running = Shell(tmp_path)
    yield running
    running.close()


class Shell:
    """Runs lines as a terminal does; `&` leaves a command running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        bin_folder = str(Path(sys.executable).parent)
        path = os.pathsep.join([bin_folder, os.environ["PATH"], "/usr/sbin"])
        self.env = os.environ | {"PATH": path}
        self.background: list[subprocess.Popen[bytes]] = []
        (folder / "examples").symlink_to(ROOT / "examples")

    def run(self, line: str) -> str:
        line = line.replace("8883", str(self.port))
        if line.startswith("midge init"):
            line += f" --port {self.port}"
        words = shlex.split(line)
        if words[-1] == "&":
            log = (self.folder / f"background-{len(self.background)}.log").open("wb")
            self.background.append(
                subprocess.Popen(words[:-1], cwd=self.folder, env=self.env, stdout=log, stderr=log)
            )
            return ""
        done = subprocess.run(
            words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def until(self, line: str, wanted: str) -> str:
        """Run `line` again and again until it prints something that matches `wanted`."""
        until = time.monotonic() + 90
        seen = ""
        while time.monotonic() < until:
            done = subprocess.run(
                shlex.split(line), cwd=self.folder, env=self.env, capture_output=True, text=True
            )
            seen = done.stdout + done.stderr
            if re.search(wanted, seen):
                return seen
            time.sleep(0.3)
        raise AssertionError(f"{line} never printed {wanted!r}:\n{seen}\n{self.logs()}")

    def hears(self, words: str) -> None:
        """Wait until a command in the background has printed these words."""
        until = time.monotonic() + 90
        while words not in self.logs():
            assert time.monotonic() < until, f"{words!r} was never printed:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in reversed(self.background):
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            process.wait(timeout=60)


def test_the_readme_names_the_two_commands_first() -> None:
    assert [line for line in commands() if line.startswith("make ")] == ["make demo", "make test"]


def test_your_own_fleet_in_five_commands(shell: Shell) -> None:
    lines = fleet_commands()
    shell.run(lines.pop(0))  # init
    shell.run(lines.pop(0))  # broker &
    shell.hears("mosquitto listens on")
    shell.run(lines.pop(0))  # server &
    shell.until("midge status --dir fleet", "waiting for a start")
    shell.run(lines.pop(0))  # device add
    shell.run(lines.pop(0))  # device run &
    shell.until("midge status --dir fleet", r"ready +1\b")
    start = lines.pop(0)
    assert start.startswith("mosquitto_pub")
    shell.run(start)
    shell.until("midge status --dir fleet", "3 rounds are done")
    assert "ward-3" in shell.logs() + shell.run(lines[1])
    for line in lines:
        assert line.startswith("midge ")
        shell.run(line)
    assert (shell.folder / "model.npz").exists()
    assert "enrolled" in shell.run("midge device list --dir fleet")


def test_the_readme_points_only_at_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
