"""`midge doctor`: look at the fleet's folder, this machine and the broker, and say what to change.

Looks, and changes nothing: what it writes to try the disk and the broker it removes again.
It may run beside a server at work. It looks with the operator's certificate, and only where
the operator has no right with the server's. See `broker_bridge.checkup` for the levels.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from broker_bridge import checkup
from broker_bridge.checkup import Finding, guarded
from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.link.inspection import Broker, certificate, certificate_dates
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.wire.topics import OPERATOR, SERVER, Topics
from server.config import Broker as BrokerSettings
from server.config import ServerConfig
from server.fleet.home import Home
from server.fleet.machines import certificate_fault, machines
from server.store.database import Database
from server.tasks.files import read_task

__all__ = ["doctor", "examine"]

_ETC = Path("/etc/mosquitto/mosquitto.conf")
_RENEW = "run `midge keys renew-certificates`, then restart the broker and the server"
_ASK_FOR_ANOTHER = "get another from whoever runs the broker, and put it there"
_NEW_FLEET = "its CA is the root of every certificate: make a new fleet with `midge init`"
_REPAIR = "run `midge keys repair`, then restart the broker and the server"


@click.command()
@click.option(
    "--dir", "folder", envvar="MIDGE_DIR",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    default=Path("fleet"), show_default=True, help="The fleet's folder.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def doctor(folder: Path, as_json: bool) -> None:
    """Check this installation and say what to change.

    Exit code: 0 all is well, 1 warnings only, 2 problems.

    \b
    Example:
      midge doctor --dir fleet
    """
    logging.getLogger("broker_bridge").addHandler(logging.NullHandler())  # we tell it ourselves
    findings = list(examine(Home.find(folder), datetime.fromtimestamp(time.time(), UTC)))
    checkup.show(findings, as_json=as_json)
    click.get_current_context().exit(checkup.exit_code(findings))


def examine(home: Home, now: datetime) -> Iterator[Finding]:
    """Every check, in the order in which one would put things right. `now` is UTC."""
    yield from checkup.clock(now, made=_made(home))
    yield from guarded("disk", lambda: checkup.disk(home.state))
    yield from checkup.versions(runtime_needed=False)
    yield from checkup.mosquitto()
    yield from guarded("secrets", lambda: checkup.secrets(_secrets(home)))
    yield from _root_key(home)
    yield from guarded("keys", lambda: _keys(home))
    config: ServerConfig | None = None
    try:
        config = home.config()
        settings = Finding("settings", "ok", f"{home.folder / 'midge.toml'} is understood")
    except MidgeError as error:
        settings = Finding("settings", "problem", str(error), "correct midge.toml")
    yield from _certificates(home, (config or ServerConfig()).broker, now)
    yield from guarded("database", lambda: _database(home))
    yield settings
    if config is not None:
        yield from _tasks(home, config)
        yield from _broker(home, config)


def _made(home: Home) -> datetime | None:
    """When the federation's CA began to be valid."""
    with contextlib.suppress(OSError, LocalError):
        return certificate_dates((home.folder / "ca" / "ca.pem").read_bytes())[0]
    return None


def _secrets(home: Home) -> Iterator[Path]:
    yield home.folder / "offline" / "root.json"
    yield home.folder / "keys" / "server.json"
    yield home.folder / "ca" / "ca-key.pem"
    yield home.broker / "broker-key.pem"
    for who in ("server", "operator"):
        yield home.folder / who / "client-key.pem"
    yield home.database
    yield from sorted((home.folder / "bundles").glob("*.bundle"))
    with contextlib.suppress(LocalError):  # settings that cannot be read are told elsewhere
        yield from sorted(home.login_files(secret=True))


def _root_key(home: Home) -> Iterator[Finding]:
    path = home.folder / "offline" / "root.json"
    if path.exists():
        yield Finding(
            "root key",
            "warning",
            f"{path} is still on this machine",
            "move it to a drawer: who has it can replace the server's identity",
        )
    else:
        yield Finding("root key", "ok", "not on this machine")


def _keys(home: Home) -> Iterator[Finding]:
    keys = home.keys()
    yield Finding("keys", "ok", f"the server of {keys.federation!r} has its keys")
    if home.config().federation != keys.federation:
        yield Finding(
            "keys",
            "problem",
            f"midge.toml names the federation "
            f"{home.config().federation!r}, the keys are for {keys.federation!r}",
            "put the name of the keys into midge.toml",
        )


def _certificates(home: Home, broker: BrokerSettings, now: datetime) -> Iterator[Finding]:
    """Those that midge made, where they are in use, and those of somebody else's broker."""
    looked_at = [("ca", home.folder / "ca" / "ca.pem", _NEW_FLEET)]
    if not broker.ca:
        looked_at.append(("broker", home.broker / "broker.pem", _RENEW))
    for who, name, table in (
        ("server", SERVER, "broker"),
        ("operator", OPERATOR, "broker.operator"),
    ):
        login = broker.login(table).of(name)
        if login.certificate:
            looked_at.append((who, home.folder / login.certificate, _ASK_FOR_ANOTHER))
        elif not login.username:
            looked_at.append((who, home.folder / who / "client.pem", _RENEW))
    for who, path, renew in looked_at:
        yield from guarded(f"cert {who}", lambda w=who, p=path, r=renew: _one(home, w, p, now, r))  # type: ignore[misc]


def _one(home: Home, who: str, path: Path, now: datetime, renew: str) -> Iterator[Finding]:
    """One of them: whether it can be used with its key, and for how long."""
    fault = ""
    if who == "ca":
        fault = certificate_fault(path)
        if not fault:
            home.ca_key()  # raises what cannot be made again
    elif renew is _RENEW:
        fault = next(each for each in machines(home.folder) if each.name == who).fault()
    if fault:
        yield Finding(f"cert {who}", "problem", fault, _REPAIR)
    else:
        yield from certificate(f"cert {who}", path, now, renew=renew)


def _database(home: Home) -> Iterator[Finding]:
    if not home.database.exists():
        yield Finding("database", "ok", "none yet: the server makes it when it first starts")
        return
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        count = sum(tx.device_counts().values())
    yield Finding("database", "ok", f"opens, and knows {count} devices")


def _tasks(home: Home, config: ServerConfig) -> Iterator[Finding]:
    paths = [*sorted((home.folder / "tasks").glob("*.task")), *map(Path, config.tasks)]
    if not paths:
        yield Finding(
            "tasks",
            "warning",
            "there is no task to train",
            f"put a file made by `midge task build` into {home.folder / 'tasks'}",
        )
    held_out = config.evaluation.npz
    if held_out and not Path(held_out).is_file():
        yield Finding(
            "tasks",
            "problem",
            f"there are no held-out samples at {held_out}",
            "correct [evaluation] npz in midge.toml",
        )
    for path in paths:
        yield from guarded("tasks", lambda p=path: _task(p))  # type: ignore[misc]


def _task(path: Path) -> Iterator[Finding]:
    plan, _ = read_task(path)
    runtime = TaskRuntime(plan)
    yield Finding(
        "tasks",
        "ok",
        f"{path.name}: {plan.task.name}, {plan.task.parameters:,} "
        f"parameters, loads in {runtime.runtime_name}",
    )


# ── The broker ──────────────────────────────────────────────────────────────────────────


def _broker(home: Home, config: ServerConfig) -> Iterator[Finding]:
    reached = list(guarded("login", lambda: _logins(home, config)))
    if all(finding.level != "problem" for finding in reached):
        operator = Broker(home.access("operator", config), OPERATOR)
        reached += guarded("broker", operator.reach)
    yield from reached
    if any(finding.level == "problem" for finding in reached):
        return
    topics = Topics(config.federation)
    yield from guarded("strangers", operator.strangers_refused)
    if config.broker.says_who and _is_shared(config.broker):
        yield Finding(
            "access rules",
            "warning",
            "the operator has the server's login, so the broker's rules cannot be tried",
            "give it one of its own under [broker.operator] in midge.toml",
        )
    else:
        yield from guarded("access rules", lambda: operator.access_ruled(forbidden=topics.round))
    server = Broker(home.access("server", config), SERVER)
    scratch = topics.down("midge-doctor", "cfg")  # no device can have this name
    yield from guarded("retained", lambda: server.retains(scratch))
    yield from _persistence(home, config)


def _is_shared(broker: BrokerSettings) -> bool:
    """Whether the broker takes the operator for the server."""
    server, operator = (
        broker.login("broker").of(SERVER),
        broker.login("broker.operator").of(OPERATOR),
    )
    return (server.username, server.certificate) == (operator.username, operator.certificate)


def _logins(home: Home, config: ServerConfig) -> Iterator[Finding]:
    """Whether what midge.toml names for a broker of somebody else's is there, and for us alone."""
    for who, table in (("server", "broker"), ("operator", "broker.operator")):
        found = home.access(who, config)
        if config.broker.login(table).says_who:
            shown = found.tls.certificate if found.username is None else repr(found.username)
            yield Finding("login", "ok", f"the {who} is {shown} to {found.host}")
    if config.broker.says_who and not config.broker.devices.says_who:
        yield Finding(
            "login",
            "warning",
            "midge.toml has a login for the server and none for devices",
            "say under [broker.devices] what they show to the broker",
        )


def _persistence(home: Home, config: ServerConfig) -> Iterator[Finding]:
    """What the broker's file says: to try it would take a restart."""
    for path in () if config.broker.says_who else (home.broker / "mosquitto.conf", _ETC):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = path.read_text().splitlines()
            if "persistence true" in (line.strip() for line in lines):
                yield Finding(
                    "persistence",
                    "ok",
                    f"{path} says so; it was not tried, which would take a restart",
                )
            else:
                yield Finding(
                    "persistence",
                    "warning",
                    f"{path} does not switch it on: a restart "
                    "loses what waits for devices, and rounds take longer",
                    "set `persistence true` and a `persistence_location`",
                )
            return
    yield Finding(
        "persistence",
        "ok",
        "cannot be seen from here: the broker's file is elsewhere, "
        "and should say `persistence true`",
    )
