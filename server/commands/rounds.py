"""Start rounds, steer and watch them. All of it can be done with `mosquitto_pub` as well."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click
import msgspec

from broker_bridge.console import stop_on_signals
from broker_bridge.disk import alone
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import random_bytes
from broker_bridge.wire.messages import (
    Command,
    Presence,
    Reply,
    RoundSummary,
    ServerPresence,
    Until,
)
from broker_bridge.wire.topics import DeviceState, Topics
from server import screen
from server.commands.options import DIR, JSON
from server.fleet.home import Home
from server.old_copy import stop_here
from server.operator import Operator
from server.store.database import Database

__all__ = ["pause", "resume", "start", "status", "stop", "watch"]


@click.command()
@DIR
@click.option("--task", help="Which task, if the server has several.")
@click.option("--rounds", type=int, help="How many rounds; default 1.")
@click.option("--until-accuracy", type=float, help="Stop when the model is this good (0 to 1).")
@click.option("--target", type=int, help="Updates that make a round.")
@click.option("--quorum", type=int, help="Updates that are enough at the deadline.")
@click.option("--deadline", "deadline_s", type=float, help="Seconds for one round.")
@JSON
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


def _steers(name: Literal["stop", "pause", "resume"], done: str, does: str) -> click.Command:
    """A command that says one word to the server; `does` is for people."""

    @click.command(name, help=f"{does}\n\n\b\nExample:\n  midge {name} --dir fleet")
    @DIR
    @JSON
    def steer(folder: Path, as_json: bool) -> None:
        _tell(_ask(folder, Command(cmd=name)), as_json, done)

    return steer


@click.command()
@DIR
@click.option("--without-server", is_flag=True,
              help="In the fleet's folder, for a server that cannot start.")  # fmt: skip
@JSON
def stop(folder: Path, without_server: bool, as_json: bool) -> None:
    """Stop the run; its open round ends without a model.

    \b
    Example:
      midge stop --dir fleet
    """
    command = Command(cmd="stop")
    reply = _stopped_here(folder) if without_server else _ask(folder, command)
    _tell(reply, as_json, "stopped")


def _stopped_here(folder: Path) -> Reply:
    """Write down what a server would; it must not be at work."""
    home = Home.find(folder)
    refusal = f"a server is running for {folder}; say stop without --without-server"
    lock = alone(home.state / "server.lock", refusal=refusal)
    with lock, contextlib.closing(Database(home.database)) as db:
        stop_here(db, home.keys().federation, now_s=time.time())
    return Reply(ok=True, cmd="stop")


pause = _steers("pause", "paused", "Open no further round until `midge resume`.")
resume = _steers("resume", "resumed", "Go on after `midge pause`.")


@click.command()
@DIR
@JSON
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


@click.command()
@DIR
@JSON
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
    operator = Operator.of(home)
    try:
        yield operator, Topics(home.federation())
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
