"""`midge-device doctor`: look at this device, its data and its broker, and say what to change.

Looks, and changes nothing but what every start of `run` does (PEM files are written again).
It may run beside `midge-device run`, whose connection it leaves alone (unless the broker makes
the user name the client id; then it cuts it off once). The samples are loaded as `run` would
load them, and go nowhere. `broker_bridge.checkup` says what the levels mean.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
from msgspec import UNSET

from broker_bridge import checkup
from broker_bridge.checkup import Finding, guarded
from broker_bridge.config import load_config
from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.link.access import Access
from broker_bridge.link.inspection import Broker, certificate, certificate_dates
from broker_bridge.task.taskfile import Plan, decode_plan
from broker_bridge.wire.enrolment import SYSTEM_CA
from broker_bridge.wire.topics import Topics
from device_client import identity as identities
from device_client.access import access_to_work
from device_client.config import DeviceConfig
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.options import FOLDER
from device_client.outbox import DamagedOutboxError, Outbox
from device_client.sandbox.trainer import Sandbox, SandboxSettings

__all__ = ["doctor", "examine"]

_DAY_S = 86_400.0
_REPLACE = (
    "if it is renewed no more by itself, on the server: `midge device replace NAME`; here, in "
    "a new folder: `midge-device enrol NAME.bundle`"
)
_ASK_FOR_ANOTHER = (
    "get another from whoever runs the broker, and name it under [broker] in device.toml"
)
_ENROL = "on the server: `midge device add NAME`; here: `midge-device enrol NAME.bundle`"


@click.command()
@FOLDER
@click.option("--data", help="The samples, as for `run`; default: as in device.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def doctor(folder: Path, data: str | None, as_json: bool) -> None:
    """Check this device and say what to change.

    Exit code: 0 all is well, 1 warnings only, 2 problems.

    \b
    Example:
      midge-device doctor --dir ./ward-3 --data npz:samples.npz
    """
    if not folder.is_dir():
        raise LocalError(f"there is no folder {folder}; say --dir, or enrol this device")
    logging.getLogger("broker_bridge").addHandler(logging.NullHandler())  # we tell it ourselves
    now = datetime.fromtimestamp(time.time(), UTC)
    findings = list(examine(folder, now, data=data))
    checkup.show(findings, as_json=as_json)
    click.get_current_context().exit(checkup.exit_code(findings))


def examine(folder: Path, now: datetime, *, data: str | None = None) -> Iterator[Finding]:
    """Every check, in the order in which one would put things right. `now` is UTC."""
    identity: Identity | None = None
    broken: list[Finding] = []
    try:
        identity = identities.load(folder)
    except MidgeError as error:
        broken = [Finding("enrolment", "problem", str(error), _ENROL)]
    yield from _clock(now, identity)
    yield from guarded("disk", lambda: checkup.disk(folder))
    yield from checkup.versions(runtime_needed=True)
    yield from guarded("secrets", lambda: checkup.secrets(_secrets(folder)))
    try:
        settings = _settings(folder)
        yield Finding("settings", "ok", "understood")
    except MidgeError as error:
        settings = None
        yield Finding("settings", "problem", str(error), "correct device.toml")
    yield from broken or _enrolment(folder, identity)
    yield from guarded("rounds", lambda: _rounds(folder))
    if settings is not None:
        sandbox = Sandbox(SandboxSettings.of(settings, data or ""))
        source = data or settings.data
        yield from guarded("sandbox", lambda: _sandbox(sandbox))
        yield from guarded("data", lambda: _data(folder, source, sandbox))
    if identity is not None:
        yield from _broker(folder, identity, settings or DeviceConfig(), now)


def _clock(now: datetime, identity: Identity | None) -> Iterator[Finding]:
    """A clock that is behind what the server said harms nothing here, and every log."""
    if identity is not None and now.timestamp() < identity.floor_s - _DAY_S:
        said = datetime.fromtimestamp(identity.floor_s, UTC)
        yield Finding(
            "clock",
            "warning",
            f"it says {now:%Y-%m-%d}, and the server spoke on {said:%Y-%m-%d}",
            "set it, for the logs: `sudo timedatectl set-ntp true`; rounds go on all the same",
        )
    else:
        yield from checkup.clock(now, made=_made(identity))


def _made(identity: Identity | None) -> datetime | None:
    """When the federation's CA began to be valid, or this device's certificate of it."""
    if identity is not None:
        is_ours = identity.broker is UNSET and identity.ca_pem != SYSTEM_CA
        with contextlib.suppress(LocalError):
            pem = identity.ca_pem if is_ours else identity.certificate_pem
            return certificate_dates(pem.encode())[0]
    return None


def _secrets(folder: Path) -> Iterator[Path]:
    yield folder / "identity.json"
    yield folder / "enrolling.json"
    yield folder / "tls" / "device.key"
    yield folder / "tls-bootstrap" / "device.key"
    yield folder / "device.bundle"
    yield folder / "outbox" / "update.sealed"


def _settings(folder: Path) -> DeviceConfig:
    path = folder / "device.toml"
    return load_config(path, DeviceConfig) if path.exists() else DeviceConfig()


def _enrolment(folder: Path, identity: Identity | None) -> Iterator[Finding]:
    if identity is not None:
        yield Finding(
            "enrolment", "ok", f"{identity.scope}, fingerprint {identity.keys.fingerprint}"
        )
    elif (folder / "enrolling.json").exists():
        yield Finding(
            "enrolment",
            "problem",
            "begun and never answered",
            "run `midge-device enrol` again with the same bundle",
        )
    else:
        yield Finding("enrolment", "problem", f"{folder} holds no enrolled device", _ENROL)


def _rounds(folder: Path) -> Iterator[Finding]:
    memory = Journal(folder).memory()
    state = "done" if memory.done else "not done"
    seen = f"the highest seen is {memory.round} ({state})" if memory.round else "none seen yet"
    yield Finding("rounds", "ok", seen)
    if not (folder / "outbox").is_dir():
        return
    try:
        waiting = Outbox(folder / "outbox").find()
    except DamagedOutboxError as error:
        advice = "nothing: `midge-device run` throws it away when it starts, and trains again"
        yield Finding("outbox", "warning", str(error), advice)
        return
    yield Finding(
        "outbox",
        "ok",
        "empty"
        if waiting is None
        else f"an update of round {waiting.round}, {waiting.total_bytes:,} bytes, waits",
    )


def _sandbox(sandbox: Sandbox) -> Iterator[Finding]:
    held = sandbox.examine()
    memory = f"at most {held.memory_bytes // 1_000_000:,} MB" if held.memory_bytes else "no limit"
    if held.missing:
        yield Finding(
            "sandbox",
            "warning",
            f"a task's model is not locked in: {held.missing}",
            "use a kernel with CONFIG_SECCOMP_FILTER, or take tasks only from whom you trust "
            "with this machine",
        )
    else:
        yield Finding("sandbox", "ok", f"a task's model is locked in by seccomp; {memory}")


def _data(folder: Path, source: str, sandbox: Sandbox) -> Iterator[Finding]:
    if not source:
        yield Finding(
            "data",
            "warning",
            "device.toml names no data source",
            "set data there, or start `midge-device run` with --data",
        )
        return
    plan = _cached_task(folder)
    if plan is None:
        yield Finding("data", "ok", f"{source}; no task was fetched yet, so it was not tried")
        return
    with contextlib.closing(sandbox):
        trainer = sandbox.load(plan)
    yield Finding(
        "data",
        "ok",
        f"{len(trainer)} samples fit the task {plan.task.name!r}, which "
        f"loads in {trainer.runtime_name}",
    )


def _cached_task(folder: Path) -> Plan | None:
    """The task that was fetched last."""
    with disk_errors(folder / "tasks"):
        found = sorted((folder / "tasks").glob("*.plan"), key=lambda path: path.stat().st_mtime)
        return decode_plan(found[-1].read_bytes()) if found else None


def _broker(
    folder: Path, identity: Identity, settings: DeviceConfig, now: datetime
) -> Iterator[Finding]:
    try:
        access = access_to_work(folder, identity, settings, folder / "device.toml")
    except LocalError as error:
        said, _, advice = str(error).partition("; ")
        yield Finding("login", "problem", said, advice or "correct [broker] in device.toml")
        return
    yield from _shown(identity, access, now)
    broker = Broker(access, identity.device)
    reached = list(guarded("broker", broker.reach))
    yield from reached
    if any(finding.level == "problem" for finding in reached):
        return
    round_topic = Topics(identity.federation).round
    yield from guarded("access rules", lambda: broker.access_ruled(forbidden=round_topic))


def _shown(identity: Identity, access: Access, now: datetime) -> Iterator[Finding]:
    """What this device and the broker show to each other."""
    if access.username is not None:
        yield Finding("login", "ok", f"this device is {access.username!r} to {access.host}")
    floor = datetime.fromtimestamp(identity.floor_s, UTC)
    for name, path, own in (
        ("ca", access.tls.ca, identity.ca_pem),
        ("device", access.tls.certificate, identity.certificate_pem),
    ):
        if path is not None:
            with disk_errors(path):
                renew = _REPLACE if path.read_text() == own else _ASK_FOR_ANOTHER
            yield from certificate(f"cert {name}", path, max(now, floor), renew=renew)
