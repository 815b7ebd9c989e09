"""`midge server`: put the parts of a server together and let it serve."""

import contextlib
import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import msgspec

from broker_bridge.config import assigned, overridden
from broker_bridge.console import show_log, stop_on_signals
from broker_bridge.disk import alone, disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.systemd import Supervisor
from broker_bridge.wire import messages
from broker_bridge.wire.messages import (
    ServerPresence,
)
from broker_bridge.wire.topics import SERVER, Topics
from server.commands.options import DIR, host_port
from server.config import ServerConfig
from server.coordinator import Coordinator
from server.events import Rules
from server.fleet.backup import remove_leftovers
from server.fleet.enrolment import Registrar
from server.fleet.expulsion import complete
from server.fleet.home import Home, ServerKeys
from server.ledger import Ledger
from server.quotas import Quotas, Shares
from server.service import Service
from server.store.database import Database

__all__ = ["connected", "serve", "server_command"]

_COLLECT_AFTER = 20_000  # objects more than before; an update makes a few dozen for a moment
_KEPT_BYTES = 16 * 1024 * 1024


@click.command("server")
@DIR
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path, dir_okay=False),
              help="A task file that a start may name; repeat for more.")  # fmt: skip
@click.option("--broker", "address", help="HOST:PORT; default: as in midge.toml.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE",
              help="Any setting of midge.toml, for this time; repeat for more.")  # fmt: skip
@click.option("--log", help="debug, info, warning or error.")
def server_command(
    folder: Path,
    tasks: tuple[Path, ...],
    address: str | None,
    assignments: tuple[str, ...],
    log: str | None,
) -> None:
    """Run the server until stopped (SIGTERM or Ctrl-C).

    \b
    Example:
      midge server --dir fleet --task wearables.task --set rounds.deadline_s=60
    """
    home = Home.find(folder)
    found = assigned(home.config(), assignments)
    listed = (*found.tasks, *(str(path) for path in tasks))
    config = overridden(found, "command line", log=log, tasks=listed)
    if address is not None:
        host, port = host_port(address)
        where = overridden(config.broker, "--broker", host=host, port=port)
        config = msgspec.structs.replace(config, broker=where)
    home.federation(config)
    show_log(config.log)
    stopped = stop_on_signals()
    with (
        _locked(home),
        _shut_out(home),
        contextlib.closing(Ledger(home, config, clock=time.time, free_bytes=_free_bytes)) as ledger,
    ):
        serve(home, config, ledger, stopped.is_set)


def serve(home: Home, config: ServerConfig, ledger: Ledger, stopped: Any) -> None:
    """Connect, and serve until `stopped`."""
    for path in config.tasks:
        if not Path(path).is_file():
            raise LocalError(f"there is no task file {path}; correct the path")
    link = connected(home, config, ledger.keys)
    rounds = config.rounds
    rules = Rules(
        target=rounds.target, quorum=rounds.quorum, deadline_s=rounds.deadline_s,
        abandoned_max=rounds.abandoned_max, evaluation_wait_s=rounds.evaluation_wait_s,
        packet_bytes_max=min(LIMITS.packet_bytes_max, link.limits.packet_bytes_max),
        uploads_max=config.limits.uploads_max,
    )  # fmt: skip
    shares = Shares(
        control_per_minute=config.limits.control_per_minute, repeats_max=config.limits.repeats_max
    )
    coordinator = Coordinator(federation=ledger.keys.federation, rules=rules)
    registrar = Registrar(home, ledger.db, time.time)
    service = Service(
        link, ledger, coordinator, registrar, evaluation_npz=config.evaluation.npz,
        quotas=Quotas(shares),
    )  # fmt: skip
    _spare_the_memory()
    try:
        service.run(Supervisor().watched(stopped, lambda: coordinator.detail))
    finally:
        link.close()


def connected(home: Home, config: ServerConfig, keys: ServerKeys) -> PahoLink:
    """A link whose will says that the server was lost. Raises LinkError, LocalError."""
    lost = messages.encode_json(ServerPresence(state="lost"))
    return home.access("server", config).open(
        SERVER, seed=keys.sign_seed,
        will=Message(Topics(keys.federation).srv, lost, retained=True),
        keepalive_s=config.broker.keepalive_s, wait_s=10.0, protocol=config.broker.mqtt,
        packet_bytes_max=config.broker.packet_bytes_max, inflight_max=config.broker.inflight_max,
        publishes_per_s=config.broker.publishes_per_s,
    )  # fmt: skip


def _spare_the_memory() -> None:
    """Have less done about memory that updates take and give back, thousands in a second."""
    gc.freeze()  # what was loaded by now stays, and need not be gone through again and again
    gc.set_threshold(_COLLECT_AFTER)
    # glibc gives freed memory back to the kernel, page by page, only to ask for it again. Once a
    # piece of this size was freed it keeps twice as much (mallopt(3), M_MMAP_THRESHOLD).
    bytearray(_KEPT_BYTES)


def _free_bytes(path: Path) -> int:
    with disk_errors(path):
        return shutil.disk_usage(path).free


@contextlib.contextmanager
def _shut_out(home: Home) -> Iterator[None]:
    """Before anything else: whatever commands that were killed have left undone, or behind."""
    remove_leftovers(home)
    with contextlib.closing(Database(home.database)) as db:
        complete(home, db)
    yield


def _locked(home: Home) -> AbstractContextManager[None]:
    """One server for one fleet: a second one would take the first one's connection."""
    refusal = f"a server is running for {home.folder} already; stop it first"
    return alone(home.state / "server.lock", refusal=refusal)
