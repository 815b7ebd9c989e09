"""A federation of real processes under a storm of SIGKILLs, and what must be so afterwards.

A seed says who is killed when. The times are those of a real machine, so a seed repeats the
plan, not the run; what comes out must be the same whatever the times were.
"""

import random
import re
import shutil
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from broker_bridge.link.local_broker import LocalBroker, shipped_file
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import verify
from broker_bridge.wire.messages import Announcement
from server.store.database import Database
from tests.fleets import FEDERATION, MIDGE, TOPICS, Fleet, Listener, Program, World, wait_until

NAMES = ("ann", "ben", "cay", "dan")
OFTEN = {"server": 4, "device": 5, "broker": 3}
BLOWS_IN_A_ROW = 6
GIVE_UP_S = 120.0
_RECEIPT = re.compile(r"round (\d+): update ([0-9a-f]{16}) accepted")

SETTINGS = """
[rounds]
deadline_s = 100000.0
evaluation_wait_s = 0.5
"""


@dataclass
class Storm:
    """A fleet whose every process may die at any time, and is started again."""

    folder: Path
    seed: int
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.fleet = Fleet(self.folder / "storm", settings=SETTINGS)
        self.fleet.broker = self._broker()
        self.data = {name: self.fleet.samples(name) for name in NAMES}
        self.devices: dict[str, Program] = {}
        self.heard: Listener | None = None

    def _broker(self) -> LocalBroker:
        """The shipped broker, but for small packets: an update is many chunks."""
        home, text = self.fleet.home.broker, shipped_file("mosquitto.conf").read_text()
        shutil.copy(shipped_file("mosquitto.acl"), home)
        text = text.replace("max_packet_size 262144", "max_packet_size 4096")
        return LocalBroker(home, port=self.fleet.port, engine="mosquitto", conf_text=text)

    # ── The storm ───────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        self.fleet.start()
        self.fleet.enrol(*NAMES)
        self.heard = self.fleet.listen(TOPICS.round)
        for name in NAMES:
            self._start_device(name)
        every = len(NAMES)
        self.fleet.start_run(rounds=100_000, target=every, quorum=every)
        # A command is no promise until it is answered: a kill may lose it, and nobody repeats it.
        self._server.wait_for("run 1 of task")

    def rage(self, *, kills: int = 0, until_s: float = 0.0) -> None:
        """Kill until so many died, and until that time on the monotonic clock is over.

        After every few blows a round must come to its end before the next one falls.
        """
        while self.kills.total() < kills or time.monotonic() < until_s:
            for _ in range(BLOWS_IN_A_ROW):
                time.sleep(self.draw.uniform(0.05, 1.2))
                self._strike()
                self._mend()
            self._lull()

    def outage(self, away_s: float) -> None:
        """The broker is gone for long, and half-way the server and a device die as well."""
        self.fleet.broker.kill()
        if self.draw.random() < 0.5:
            (self.fleet.home.broker / "midge.db").unlink(missing_ok=True)
        self._sit_out(away_s / 2)
        self._server.kill()
        self.devices[self.draw.choice(NAMES)].kill()
        self.kills.update(("broker", "server", "device"))
        self._sit_out(away_s / 2)
        self.fleet.broker.start()

    def _sit_out(self, seconds: float) -> None:
        over_s = time.monotonic() + seconds
        while time.monotonic() < over_s:
            self._mend()
            time.sleep(1.0)

    def _strike(self) -> None:
        (who,) = self.draw.choices(list(OFTEN), list(OFTEN.values()))
        pause_s = self.draw.choice((0.0, 0.0, self.draw.uniform(0, 1)))
        match who:
            case "server":
                self._server.kill()
                self.kills[who] += 1
                time.sleep(pause_s)
                self._start_server()
            case "device":
                self.devices[self.draw.choice(NAMES)].kill()
                self.kills[who] += 1
                time.sleep(pause_s)
            case "broker":
                how = self.draw.choice(("killed", "killed and wiped", "stopped"))
                if how == "stopped":  # it writes its state down, and comes back to it later
                    self.fleet.broker.stop()
                else:
                    self.fleet.broker.kill()
                    self.kills[who] += 1
                if how == "killed and wiped":
                    (self.fleet.home.broker / "midge.db").unlink(missing_ok=True)
                time.sleep(pause_s)
                self.fleet.broker.start()

    def _mend(self) -> None:
        """Start again what is not running, as a supervisor does."""
        if not self._server.is_running:
            self._start_server()
        for name, device in self.devices.items():
            if not device.is_running:
                self._start_device(name)

    @property
    def _server(self) -> Program:
        assert self.fleet.server is not None
        return self.fleet.server

    def _start_server(self) -> None:
        # Without waiting: the next blow may fall while it comes up.
        folder = self.fleet.home.folder
        self.fleet.server = self.fleet._run(
            self.fleet.folder / "server.log", *MIDGE, "server", "--dir", str(folder)
        )

    def _start_device(self, name: str) -> None:
        self.devices[name] = self.fleet.device(name, data=self.data[name])

    def calm(self) -> int:
        """Let the round that is open close; stop the run. Returns how many rounds were closed."""
        self._lull()
        stopped = self.fleet.midge("stop")
        assert stopped.returncode == 0, stopped.stderr
        return self._closed_rounds()

    def _lull(self) -> None:
        """Wait until one more round is closed."""
        closed = self._closed_rounds()

        def another() -> bool:
            self._mend()
            return self._closed_rounds() > closed

        try:
            wait_until(another, f"a round after round {closed}", GIVE_UP_S)
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}: {error}\n{self._last_words()}") from None

    def _closed_rounds(self) -> int:
        with closing(Database(self.fleet.home.database)) as db, db.reading() as tx:
            return sum(r.model_after is not None for r in tx.rounds_of(1))

    def _last_words(self) -> str:
        logs = [self.fleet.folder / f"{name}.log" for name in ("server", *NAMES)]
        return "\n".join(
            f"{path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            for path in logs
        )

    def end(self) -> None:
        self.fleet.stop()

    # ── What must be so ─────────────────────────────────────────────────────────────────

    def check(self, rounds: int) -> None:
        self._check_models(rounds)
        self._check_receipts(rounds)
        self._check_rounds_only_grow()
        self._check_nobody_crashed()

    def _check_models(self, rounds: int) -> None:
        """Bit for bit those of a run that nobody disturbed."""
        expected = undisturbed(self.folder / "calm", self.data, rounds)
        found = self.fleet.model_files()
        assert found.keys() == expected.keys()
        wrong = [name for name in expected if found[name] != expected[name]]
        assert not wrong, f"seed {self.seed}: other bits in {wrong}"

    def _check_receipts(self, rounds: int) -> None:
        """Every receipt that a device heard is in the sum, and each device is there once."""
        with closing(Database(self.fleet.home.database)) as db, db.reading() as tx:
            counted = [r for n in range(1, rounds + 2) for r in tx.receipts(n, status="accepted")]
        kept = {(r.round, r.device, r.upload.hex()) for r in counted}
        heard = {
            (int(number), name, upload)
            for name in NAMES
            for number, upload in _RECEIPT.findall(self.devices[name].log)
        }
        assert heard <= kept, f"seed {self.seed}: revoked {sorted(heard - kept)}"
        of_round = Counter((r.round, r.device) for r in counted)
        wanted = {(number, name) for number in range(1, rounds + 1) for name in NAMES}
        assert wanted <= of_round.keys()
        assert set(of_round.values()) == {1}, f"seed {self.seed}: somebody counts twice"

    def _check_rounds_only_grow(self) -> None:
        assert self.heard is not None
        with closing(Database(self.fleet.home.database)) as db, db.reading() as tx:
            numbers = [r.number for r in tx.rounds_of(1)]
        assert numbers == list(range(1, len(numbers) + 1))
        opened = [int(n) for n in re.findall(r"round (\d+) is open", self._server.log)]
        assert opened == sorted(set(opened)), f"seed {self.seed}: a round was opened twice"
        server = self.fleet.home.keys().sign.public
        for message in self.heard.hear():
            if message.payload:
                payload = verify(server, f"round {FEDERATION}", message.payload)
                assert messages.decode(payload, Announcement).round <= numbers[-1]

    def _check_nobody_crashed(self) -> None:
        for program in (self._server, *self.devices.values()):
            assert "Traceback" not in program.log, f"seed {self.seed}:\n{program.log}"


def undisturbed(folder: Path, data: dict[str, str], rounds: int) -> dict[str, bytes]:
    """The models of so many rounds in which nothing goes wrong."""
    folder.mkdir()
    world = World(folder, rounds={"deadline_s": 100_000.0})
    with closing(world), suppress(KeyError):
        for name, source in data.items():
            world.agent(name, data=source)
        world.settle()
        assert world.tell(cmd="start", rounds=rounds, target=len(data))["ok"]
        world.until(lambda: world.coordinator.run is None, "the run ends")
    models = world.home.state / "models"
    return {path.name: path.read_bytes() for path in sorted(models.iterdir())}
