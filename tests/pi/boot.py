"""A flashed card's life in a machine that boots: `python -m tests.pi.boot`, or `make pi-boot`.

`midge flash` writes a card; it boots, installs without a network, enrols with a real server
behind a real mosquitto, and trains rounds. In the middle of one its power is cut. It must come
back with the same key, not enrol again, and bring the run to its end. Prints what it measured.
Anything else is an AssertionError, and the folder with every log stays.

Emulated instruction by instruction: times say that it works, not how fast a Pi is. Memory is real.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from broker_bridge.wire.envelope import fingerprint
from examples.wearables.source import person
from server.cli import main as main_of_midge
from server.store.database import Database
from tests.fleets import Fleet, typed, wait_until
from tests.pi.board import BROKER, Board
from tests.pi.debian import CannotFetchError
from tests.pi.image import BOOKWORM, TRIXIE, Release, card_image

DEVICE = "ward-3-pi-07"
GIVE_UP_S = 1800.0
PERSON = 3
ROUNDS = 3
CUT_IN = 2  # the round in which the power goes


class Story:
    """One card, from being written to its second life."""

    def __init__(
        self, release: Release, folder: Path, *, copies: int = 1, fail_first: bool = False
    ) -> None:
        self.release = release
        self.fail_first = fail_first
        self.folder = folder
        self.copies = copies
        self.figures: dict[str, Any] = {"system": release.suite}
        self.fleet = Fleet(folder, also_at=(BROKER[0],))

    def tell(self) -> dict[str, Any]:
        """Everything, in order. Raises AssertionError."""
        began = time.monotonic()
        image = card_image(self.release)
        self.note("base image, s", time.monotonic() - began)
        self.fleet.start()
        self.flash(image)
        board = Board(
            self.folder / "cards" / f"{DEVICE}.img", broker_port=self.fleet.port, folder=self.folder
        )
        try:
            self.first_life(board)
            self.second_life(board)
        finally:
            board.cut_power()
        self.ask_doctor()
        return self.figures

    def note(self, what: str, value: Any) -> None:
        """Keep a figure, and say it at once: this takes minutes."""
        self.figures[what] = round(value, 1) if isinstance(value, float) else value
        print(f"  {what:48} {self.figures[what]}", flush=True)

    def flash(self, image: Path) -> None:
        samples = self.folder / "samples.npz"
        x, y = person(PERSON)
        np.savez(samples, x=np.tile(x, (self.copies, 1, 1)), y=np.tile(y, self.copies))
        self.note("samples", len(y) * self.copies)
        began = time.monotonic()
        done = self.fleet.midge(
            "flash", "--device", DEVICE, "--image", str(image), "--out",
            str(self.folder / "cards"), "--broker", "{}:{}".format(*BROKER), "--with", str(samples),
            "--data", f"npz:/var/lib/midge/data/{samples.name}", "--no-wait",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "read back: identical" in done.stdout, done.stdout
        self.note("midge flash, s", time.monotonic() - began)

    def first_life(self, board: Board) -> None:
        if self.fail_first:
            self.failed_life(board)
        on, on_at = time.monotonic(), time.time()
        board.power_on()
        if not self.release.cloud_init and not self.fail_first:
            board.wait_until_off(GIVE_UP_S)  # firstrun.sh ran, and systemd reboots
            assert "systemd.run" not in (board.card.read("cmdline.txt") or b"").decode()
            self.note("power-on to the reboot after firstrun.sh, s", time.monotonic() - on)
            board.power_on()
        board.wait_for(r"Finished midge-first-boot", "the installation ends", GIVE_UP_S)
        log = (board.card.read("midge/log/install.txt") or b"").decode()
        assert log.endswith("result: installed\n"), log
        assert board.card.read("midge/device.bundle") is None, "the token is still on the card"
        self.note("power-on to installed, s", time.monotonic() - on)
        before = wait_until(self.enrolled, "the device enrols", GIVE_UP_S)
        self.note("power-on to enrolled, s", before[1] - on_at)
        self.note("fingerprint", before[0])
        self.before = before
        board.wait_for("has done its work, and is erased", "its bundle is erased", GIVE_UP_S)
        self.fleet.start_run(rounds=ROUNDS, target=1, quorum=1, deadline_s=2 * GIVE_UP_S)
        self.wait_for_models(2, board)
        self.note("power-on to the first accepted update, s", time.monotonic() - on)
        board.wait_for(rf"round {CUT_IN}: training", "the next round trains", GIVE_UP_S)
        board.wait_for(
            rf"round {CUT_IN}: training[\s\S]*memory training", "its process runs", GIVE_UP_S
        )
        assert len(self.fleet.model_files()) == CUT_IN, "the round was over before the power went"
        board.cut_power()
        self.note_memory(board.said)

    def failed_life(self, board: Board) -> None:
        """A card with a damaged file, and what is left to do when the file is as it was."""
        name = "midge/uninstall.sh"
        right = board.card.read(name) or b""
        board.card.write({name: right[:-9] + b"# damage\n"})
        board.power_on()
        if not self.release.cloud_init:
            board.wait_until_off(GIVE_UP_S)
            board.power_on()
        board.wait_for(r"Failed to start midge-first-boot", "the installation fails", GIVE_UP_S)
        board.wait_for(r"a file was damaged", "the journal has the reason", GIVE_UP_S)
        board.wait_for(r"Startup finished", "the rest of the system has started", GIVE_UP_S)
        time.sleep(15.0)
        began = re.findall(r"systemd\[1\]: Starting midge-first-boot", board.said)
        assert len(began) == 1, "it is tried once in a boot"
        board.cut_power()
        log = (board.card.read("midge/log/install.txt") or b"").decode()
        assert log.endswith("tried again at the next boot\n"), log
        assert board.card.read("midge/device.bundle"), "the next boot needs it"
        self.note("installation with a damaged file", "failed, once in that boot")
        board.card.write({name: right})

    def second_life(self, board: Board) -> None:
        on = time.monotonic()
        board.power_on()
        board.wait_for(r"connected to the broker", "it is back", GIVE_UP_S)
        self.note("after the power cut: power-on to connected, s", time.monotonic() - on)
        self.wait_for_models(CUT_IN + 1, board)
        self.note("after it: power-on to the next accepted update, s", time.monotonic() - on)
        self.wait_for_models(ROUNDS + 1, board)
        self.note("after it: power-on to the end of the run, s", time.monotonic() - on)
        assert self.enrolled() == self.before, "it came back as somebody else"
        assert "midge-first-boot" not in board.said, "it installed again"
        board.wait_for(r"midge-report\.service: Deactivated|Finished midge-report", "a report",
                       GIVE_UP_S)  # fmt: skip

    def enrolled(self) -> tuple[str, float] | None:
        """(fingerprint, when it enrolled) of the device, once it has."""
        time.sleep(0.3)
        with contextlib.closing(Database(self.fleet.home.database)) as db, db.reading() as tx:
            found = tx.device(DEVICE)
        return (fingerprint(found.sign_public), found.enrolled_at) if found else None

    def wait_for_models(self, count: int, board: Board) -> None:
        def there() -> bool:
            time.sleep(0.3)
            assert board.is_on, f"the board went off:\n{board.said[-3000:]}"
            return len(self.fleet.model_files()) >= count

        wait_until(there, f"model {count - 1}", GIVE_UP_S)

    def note_memory(self, said: str) -> None:
        for what in ("agent", "training"):
            most = re.findall(rf"memory {what} \d+ now \d+ most (\d+)", said)
            self.note(f"RSS of {what}, at most, MB", max(map(int, most)) / 1000)
        free = re.findall(r"memory machine 0 available (\d+)", said)
        self.note("memory available, at least, MB", min(map(int, free)) / 1000)

    def ask_doctor(self) -> None:
        image = self.folder / "cards" / f"{DEVICE}.img"
        done = typed(main_of_midge, "flash", "doctor", "--image", str(image), "--json")
        found = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
        clock = found.pop("clock")
        assert "behind" in clock["found"], clock  # it woke up years ago
        assert found["enrolment"]["found"] == "enrolled", found
        assert all(each["level"] == "ok" for each in found.values()), found
        self.note("midge flash doctor", "all well, but for a clock that was behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=("bookworm", "trixie"), default="bookworm")
    parser.add_argument("--copies", type=int, default=1, help="so many times one person's samples")
    parser.add_argument("--fail-first", action="store_true", help="damage a file at first")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    folder = Path(tempfile.mkdtemp(prefix="midge-boot-"))
    print(f"{chosen.system}: logs in {folder}", flush=True)
    release = {"bookworm": BOOKWORM, "trixie": TRIXIE}[chosen.system]
    story = Story(release, folder, copies=chosen.copies, fail_first=chosen.fail_first)
    try:
        story.tell()
    except CannotFetchError as error:
        sys.exit(f"pi-boot: {error}")
    finally:
        story.fleet.stop()
    shutil.rmtree(folder)
    print("the same key before and after the power cut, and every round was done")


if __name__ == "__main__":
    main()
