"""`midge`: the operator's command. Make a fleet, run its broker and server, start rounds."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from broker_bridge.config import overridden
from broker_bridge.console import run_command, show_log, stop_on_signals
from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import Engine, LocalBroker
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages, weights
from broker_bridge.wire.envelope import client_id, random_bytes
from broker_bridge.wire.messages import (
    Command,
    Presence,
    Reply,
    RoundSummary,
    ServerPresence,
    Until,
)
from broker_bridge.wire.topics import SERVER, DeviceState, Topics
from server import screen
from server.config import ServerConfig
from server.coordinator import Coordinator
from server.doctor import doctor
from server.events import Rules
from server.fleet.enrolment import TOKEN_HOURS, Registrar, add_device
from server.fleet.home import Home, create
from server.ledger import Ledger
from server.operator import Operator
from server.quotas import Quotas, Shares
from server.service import Service
from server.simulation import simulate
from server.store.database import Database
from server.store.models import ModelFiles
from server.tasks.cli import task

__all__ = ["main"]

_DIR = click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), envvar="MIDGE_DIR",
    default=Path("fleet"), show_default=True, help="The fleet's folder.",
)  # fmt: skip
_PORT = click.IntRange(1, 65_535)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("midge"), prog_name="midge")
def midge() -> None:
    """Federated training over the MQTT broker you already run.

    \b
    Example:
      midge init fleet
      midge broker --dir fleet &
      midge server --dir fleet --task wearables.task &
      midge device add ward-3 --dir fleet
      midge start --dir fleet --rounds 10
    """


# ── a fleet ─────────────────────────────────────────────────────────────────────────────


@midge.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--federation", default="demo", show_default=True, help="Its name, in every topic.")
@click.option("--host", "hosts", multiple=True, default=("localhost", "127.0.0.1"),
              show_default=True, help="Where the broker is; repeat for more names.")  # fmt: skip
@click.option("--port", type=_PORT, default=8883, show_default=True, help="The broker's port.")
@_JSON
def init(folder: Path, federation: str, hosts: tuple[str, ...], port: int, as_json: bool) -> None:
    """Make a fleet in FOLDER: keys, a private CA, certificates, settings.

    \b
    Example:
      midge init fleet --host broker.example.org --host 192.168.1.10
    """
    create(folder, federation=federation, hosts=list(hosts), port=port)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "federation": federation}))
        return
    click.echo(f"made the fleet {federation!r} in {folder}")
    click.echo(f"move {folder / 'offline' / 'root.json'} off this machine: it is the root of trust")
    click.echo(f"next: midge broker --dir {folder}")


@midge.command()
@_DIR
@click.option("--bind", default="127.0.0.1", show_default=True,
              help="Address to listen on; 0.0.0.0 lets devices on the network in.")  # fmt: skip
@click.option("--port", type=_PORT, help="Port; default: as in midge.toml.")
def broker(folder: Path, bind: str, port: int | None) -> None:
    """Run a broker for the fleet: mosquitto with midge's mosquitto.conf.

    \b
    Example:
      midge broker --dir fleet --bind 0.0.0.0
    """
    home = Home.find(folder)
    stopped = stop_on_signals()
    chosen = port or home.config().broker.port
    with LocalBroker(home.broker, port=chosen, bind=bind) as running:
        click.echo(f"{running.engine} listens on {bind}:{chosen}, log in {running.log_path}")
        if running.lacks:
            click.echo(running.lacks)
        while running.is_running and not stopped.wait(0.5):
            pass
        if not stopped.is_set():
            raise LocalError(f"the broker stopped by itself; see {running.log_path}")


@midge.command("server")
@_DIR
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path, dir_okay=False),
              help="A task file that a start may name; repeat for more.")  # fmt: skip
@click.option("--broker", "address", help="HOST:PORT; default: as in midge.toml.")
@click.option("--log", help="debug, info, warning or error.")
def server_command(
    folder: Path, tasks: tuple[Path, ...], address: str | None, log: str | None
) -> None:
    """Run the server until stopped (SIGTERM or Ctrl-C).

    \b
    Example:
      midge server --dir fleet --task wearables.task
    """
    home = Home.find(folder)
    found = home.config()
    listed = (*found.tasks, *(str(path) for path in tasks))
    config = overridden(found, "command line", log=log, tasks=listed)
    if address is not None:
        host, port = host_port(address)
        where = overridden(config.broker, "--broker", host=host, port=port)
        config = msgspec.structs.replace(config, broker=where)
    show_log(config.log)
    stopped = stop_on_signals()
    with (
        _locked(home),
        contextlib.closing(Ledger(home, config, clock=time.time, free_bytes=_free_bytes)) as ledger,
    ):
        serve(home, config, ledger, stopped.is_set)


def serve(home: Home, config: ServerConfig, ledger: Ledger, stopped: Any) -> None:
    """Connect, and serve until `stopped`."""
    for path in config.tasks:
        if not Path(path).is_file():
            raise LocalError(f"there is no task file {path}; correct the path")
    topics = Topics(ledger.keys.federation)
    link = PahoLink.open(
        config.broker.host, config.broker.port,
        client_id=client_id(SERVER, ledger.keys.sign_seed), tls=home.tls("server"),
        will=Message(topics.srv, messages.encode_json(ServerPresence(state="lost")), retained=True),
        keepalive_s=config.broker.keepalive_s, wait_s=10.0,
    )  # fmt: skip
    rounds = config.rounds
    rules = Rules(
        target=rounds.target, quorum=rounds.quorum, deadline_s=rounds.deadline_s,
        abandoned_max=rounds.abandoned_max, evaluation_wait_s=rounds.evaluation_wait_s,
        packet_bytes_max=ledger.packet_bytes, uploads_max=config.limits.uploads_max,
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
    try:
        service.run(stopped)
    finally:
        link.close()


def _free_bytes(path: Path) -> int:
    with disk_errors(path):
        return shutil.disk_usage(path).free


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    """One server for one fleet: a second one would take the first one's connection."""
    path = home.state / "server.lock"
    with disk_errors(path), path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"a server is running for {home.folder} already; stop it first"
            ) from None
        yield


# ── devices ─────────────────────────────────────────────────────────────────────────────


@midge.group()
def device() -> None:
    """Add devices to the fleet, and list them.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """


@device.command("add")
@click.argument("name")
@_DIR
@click.option("--hours", default=float(TOKEN_HOURS), show_default=True,
              help="How long the one-time token lives.")  # fmt: skip
@_JSON
def device_add(name: str, folder: Path, hours: float, as_json: bool) -> None:
    """Make a bundle with a one-time token for a new device NAME.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db:
        path = add_device(home, db, name, broker=home.config().broker, now=time.time(), hours=hours)
    if as_json:
        click.echo(json.dumps({"device": name, "bundle": str(path), "hours": hours}))
        return
    click.echo(f"wrote {path}: it holds a secret and enrols one device within {hours:g} hours")
    click.echo(f"next, on the device: midge-device run --bundle {path.name} --dir STATE --data …")


@device.command("list")
@_DIR
@_JSON
def device_list(folder: Path, as_json: bool) -> None:
    """List the devices that have enrolled.

    \b
    Example:
      midge device list --dir fleet --json
    """
    home = Home.find(folder)
    found = []
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        page = tx.devices(limit=500)
        while page:
            found += page
            page = tx.devices(after=page[-1].name, limit=500)
    rows = [
        {"device": d.name, "status": d.status, "last_round": d.last_round,
         "last_seen": d.last_seen, "software": d.software}
        for d in found
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows))
    else:
        screen.table(["device", "status", "last round", "last seen", "software"],
                     [[r["device"], r["status"], r["last_round"], screen.ago(r["last_seen"]),
                       r["software"]] for r in rows])  # fmt: skip


# ── rounds ──────────────────────────────────────────────────────────────────────────────


@midge.command()
@_DIR
@click.option("--task", help="Which task, if the server has several.")
@click.option("--rounds", type=int, help="How many rounds; default 1.")
@click.option("--until-accuracy", type=float, help="Stop when the model is this good (0 to 1).")
@click.option("--target", type=int, help="Updates that make a round.")
@click.option("--quorum", type=int, help="Updates that are enough at the deadline.")
@click.option("--deadline", "deadline_s", type=float, help="Seconds for one round.")
@_JSON
def start(
    folder: Path,
    task: str | None,
    rounds: int | None,
    until_accuracy: float | None,
    target: int | None,
    quorum: int | None,
    deadline_s: float | None,
    as_json: bool,
) -> None:
    """Start a run of rounds.

    \b
    Example:
      midge start --dir fleet --task wearables --rounds 10 --until-accuracy 0.8
    """
    until = None if until_accuracy is None else Until(accuracy=until_accuracy)
    command = Command(
        cmd="start", task=task, rounds=rounds, until=until, target=target, quorum=quorum,
        deadline_s=deadline_s,
    )  # fmt: skip
    _tell(_ask(folder, _checked(command)), as_json, "started")


@midge.command()
@_DIR
@_JSON
def stop(folder: Path, as_json: bool) -> None:
    """Stop the run; its open round ends without a model.

    \b
    Example:
      midge stop --dir fleet
    """
    _tell(_ask(folder, Command(cmd="stop")), as_json, "stopped")


@midge.command()
@_DIR
@_JSON
def pause(folder: Path, as_json: bool) -> None:
    """Open no further round until `midge resume`.

    \b
    Example:
      midge pause --dir fleet
    """
    _tell(_ask(folder, Command(cmd="pause")), as_json, "paused")


@midge.command()
@_DIR
@_JSON
def resume(folder: Path, as_json: bool) -> None:
    """Go on after `midge pause`.

    \b
    Example:
      midge resume --dir fleet
    """
    _tell(_ask(folder, Command(cmd="resume")), as_json, "resumed")


@midge.command()
@_DIR
@_JSON
def status(folder: Path, as_json: bool) -> None:
    """Say what the server is doing.

    \b
    Example:
      midge status --dir fleet --json
    """
    reply = _ask(folder, Command(cmd="status"))
    if as_json:
        click.echo(json.dumps(reply.status))
    else:
        screen.facts(reply.status or {})


@midge.command()
@_DIR
@_JSON
def watch(folder: Path, as_json: bool) -> None:
    """Follow rounds and devices until Ctrl-C.

    \b
    Example:
      midge watch --dir fleet
    """
    stopped = stop_on_signals()
    with _operator(folder) as (operator, topics):
        for topic, payload in operator.watch(stopped.is_set):
            line = _watched(topics, topic, payload, as_json)
            if line:
                click.echo(line)


def _watched(topics: Topics, topic: str, payload: bytes, as_json: bool) -> str:
    """One line for one message; nothing for one that is not ours."""
    try:
        place = topics.parse(topic)
        if as_json:
            return json.dumps({"topic": topic, "message": json.loads(payload)}) if payload else ""
        match place:
            case "metrics":
                return screen.summary_line(messages.decode_json(payload, RoundSummary))
            case DeviceState(name) if payload:
                return screen.presence_line(name, messages.decode_json(payload, Presence))
            case "srv":
                return f"server {messages.decode_json(payload, ServerPresence).state}"
    except (PeerError, ValueError):
        return ""
    return ""


@contextlib.contextmanager
def _operator(folder: Path) -> Iterator[tuple[Operator, Topics]]:
    home = Home.find(folder)
    config = home.config()
    operator = Operator(
        config.broker.host, config.broker.port, federation=config.federation,
        tls=home.tls("operator"),
    )  # fmt: skip
    try:
        yield operator, Topics(config.federation)
    finally:
        operator.close()


def _ask(folder: Path, command: Command) -> Reply:
    command = msgspec.structs.replace(command, id=random_bytes(8).hex())
    with _operator(folder) as (operator, _):
        reply = operator.ask(command)
    if not reply.ok:
        raise LocalError(reply.error or "the server refused, and gave no reason")
    return reply


def _checked(command: Command) -> Command:
    try:
        # Not through JSON, which has no NaN and would make it a setting that was not given.
        checked: Command = messages.decode(messages.encode(command), Command)
        return checked
    except PeerError as error:
        raise LocalError(f"not a start: {error}") from None


def _tell(reply: Reply, as_json: bool, word: str) -> None:
    if as_json:
        click.echo(messages.encode_json(reply))
        return
    run = (reply.status or {}).get("run")
    number = run.get("id") if isinstance(run, dict) else run
    click.echo(word if number is None else f"{word} run {number}; see it with `midge watch`")


# ── models ──────────────────────────────────────────────────────────────────────────────


@midge.group()
def model() -> None:
    """List and export the versions of the global model.

    \b
    Example:
      midge model export --dir fleet -o model.npz
    """


@model.command("list")
@_DIR
@_JSON
def model_list(folder: Path, as_json: bool) -> None:
    """List the models, newest first.

    \b
    Example:
      midge model list --dir fleet
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        found = tx.models(limit=1000)
    kept = set(ModelFiles(home.state / "models").versions())
    rows = [
        {"version": m.version, "round": m.round, "bytes": m.size_bytes, "digest": m.digest.hex(),
         "metrics": json.loads(m.metrics_json), "on_disk": m.version in kept}
        for m in found
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows))
    else:
        screen.table(["version", "round", "bytes", "metrics", "digest"],
                     [[r["version"], r["round"], r["bytes"], screen.brief(r["metrics"]),
                       str(r["digest"])[:12]] for r in rows])  # fmt: skip


@model.command("export")
@_DIR
@click.option("--version", "number", type=int, help="Which; default: the newest.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help="An .npz file with one array for each tensor.")  # fmt: skip
def model_export(folder: Path, number: int | None, output: Path) -> None:
    """Write a model's weights to an .npz file.

    \b
    Example:
      midge model export --dir fleet -o model.npz
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        row = tx.latest_model() if number is None else tx.model(number)
    if row is None:
        raise LocalError("there is no such model; see `midge model list`")
    tensors = weights.decode(ModelFiles(home.state / "models").read(row.version, row.digest))
    if output.suffix != ".npz":
        raise LocalError(f"{output}: the name must end in .npz")
    with disk_errors(output), output.open("wb") as file:
        np.savez(file, **tensors)
    click.echo(f"wrote model {row.version} to {output}")


# ── the demo ────────────────────────────────────────────────────────────────────────────


@midge.command()
@click.option("--rounds", default=20, show_default=True, help="The most rounds to run.")
@click.option("--accuracy", default=0.85, show_default=True, help="The target that ends the run.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False),
              help="Work in this new folder and leave it there.")  # fmt: skip
@click.option("--broker", "engine", type=click.Choice(["mosquitto", "iotcore"]),
              help="Which broker to start; default: the best one there is.")  # fmt: skip
@click.option("--plain", is_flag=True, help="Plain lines, as when not on a terminal.")
@_JSON
def demo(
    rounds: int,
    accuracy: float,
    keep: Path | None,
    engine: Engine | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Run a whole federation on this machine: ten people's smartwatches, real broker, mutual TLS.

    \b
    Example:
      midge demo --rounds 5
    """
    from server.demo import run_demo

    run_demo(
        rounds=rounds, accuracy=accuracy, keep=keep, engine=engine, plain=plain, as_json=as_json
    )


def host_port(address: str) -> tuple[str, int]:
    """Take HOST:PORT apart. Raises LocalError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise LocalError(f"{address!r} is not HOST:PORT; write for example localhost:8883")
    return host, int(port)


midge.add_command(task)
midge.add_command(simulate)
midge.add_command(doctor)


def main() -> None:
    """Run `midge`."""
    run_command(midge, "midge")


if __name__ == "__main__":
    main()
