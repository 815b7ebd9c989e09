"""One process of simulated devices. `midge simulate` starts it; it ends on SIGTERM.

Prints one line of JSON a second.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec

from broker_bridge.console import run_command, show_log, stop_on_signals
from broker_bridge.link.poller import raise_file_limit
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import Plan
from device_client.data import load_samples
from device_client.simulation.fate import Fate
from device_client.simulation.members import Members
from device_client.simulation.swarm import Swarm
from device_client.trainer import LocalTrainer, Trainer


@contextlib.contextmanager
def _folder(given: Path | None, devices: int) -> Iterator[Path]:
    """Where the devices' folders are; in memory, where there is room: each has its own disk."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield given
        return
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of our own in it
    needed = devices * 200_000
    fits = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(prefix="midge-sim-", dir=memory if fits else None) as found:
        yield Path(found)


@click.command()
@click.argument("members", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--from", "first", default=0, help="The first of them to run here.")
@click.option("--step", default=1, help="And every so many after it.")
@click.option("--state", type=click.Path(path_type=Path, file_okay=False),
              help="Where to keep their folders; default: in memory, gone at the end.")  # fmt: skip
@click.option("--fate", "fate_json", default="{}", help="The fields of Fate, as JSON.")
@click.option("--train", default="fast", help="fast, or where each finds samples, as for `run`.")
@click.option("--plain-port", default=0, help="A port of this machine without TLS; 0: use TLS.")
@click.option("--log", default="error")
def simulate(
    members: Path, first: int, step: int, state: Path | None, fate_json: str, train: str,
    plain_port: int, log: str,
) -> None:  # fmt: skip
    """Run simulated devices. `midge simulate` starts this."""
    show_log(log)
    stopped = stop_on_signals()
    found = Members.read(members)
    mine = msgspec.structs.replace(found, members=found.members[first::step])
    raise_file_limit(len(mine.members))
    fate = msgspec.convert(json.loads(fate_json), Fate)
    load = None if train == "fast" else _real(train)
    with _folder(state, len(mine.members)) as folder:
        swarm = Swarm(mine, folder, fate=fate, load=load, plain_port=plain_port)
        try:
            _run(swarm, stopped.is_set)
        finally:
            swarm.close()


def _real(data: str) -> Callable[[Plan], LocalTrainer]:
    def load(plan: Plan) -> Trainer:
        return Trainer(TaskRuntime(plan, num_threads=1), load_samples(data, plan.task))

    return load


def _run(swarm: Swarm, stopped: Callable[[], bool]) -> None:
    said_s = 0.0
    while not stopped():
        swarm.turn(0.25)
        if swarm.clock() - said_s >= 1.0:
            said_s = swarm.clock()
            print(json.dumps(swarm.status()), flush=True)


def main() -> None:
    """Run the simulated devices of one process."""
    run_command(simulate, "midge-simulate")


if __name__ == "__main__":
    main()
