"""`midge-device`: the command on the device. Enrol once, then run."""

import contextlib
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import click

from broker_bridge.config import assigned, load_config, overridden
from broker_bridge.console import run_command, show_log, stop_on_signals
from broker_bridge.disk import write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.systemd import unit_file
from device_client import identity as identities
from device_client import model as models
from device_client.config import EXAMPLE, DeviceConfig
from device_client.doctor import doctor
from device_client.enrolment import enrol, forget_bundle
from device_client.holding import held
from device_client.identity import Identity
from device_client.inference import infer, predict
from device_client.journal import Journal
from device_client.options import FOLDER
from device_client.outbox import DamagedOutboxError, Outbox
from device_client.running import judged, work
from device_client.trainer import Progress
from device_client.trial import run_trial

__all__ = ["main"]

_log = logging.getLogger("midge.device")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("midge"), prog_name="midge-device")
def device() -> None:
    """Train on this device's own data, for the federation it is enrolled in.

    \b
    Example:
      midge-device enrol ward-3.bundle --dir ./ward-3
      midge-device run --dir ./ward-3 --data npz:samples.npz
    """


@device.command("enrol")
@click.argument("bundle", type=click.Path(path_type=Path, dir_okay=False))
@FOLDER
@click.option("--wait", "wait_s", default=60.0, show_default=True, help="Seconds to keep trying.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def enrol_command(bundle: Path, folder: Path, wait_s: float, as_json: bool) -> None:
    """Make this device's keys and enrol it with the one-time token in BUNDLE.

    \b
    Example:
      midge-device enrol ward-3.bundle --dir ./ward-3
    """
    found = _enrol(bundle, folder, wait_s)
    _forget(bundle, folder, found)
    if as_json:
        click.echo(json.dumps(_facts(found)))
    else:
        click.echo(f"enrolled as {found.scope}, fingerprint {found.keys.fingerprint}")


@device.command("run")
@FOLDER
@click.option("--bundle", type=click.Path(path_type=Path, dir_okay=False),
              help="Enrol with this bundle first, if not enrolled yet.")  # fmt: skip
@click.option("--data", help="npz:FILE, csv:FOLDER, store:FILE, module:function, FILE.py:function.")
@click.option("--role", type=click.Choice(["train", "evaluate"]), help="Default: train.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False),
              help="Settings file; default: device.toml in the device's folder.")  # fmt: skip
@click.option("--broker", "broker", help="HOST:PORT, if not where the bundle said.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE",
              help="Any setting of device.toml, for this time; repeat for more.")  # fmt: skip
@click.option("--log", help="debug, info, warning or error.")
def run(
    folder: Path,
    bundle: Path | None,
    data: str | None,
    role: str | None,
    config: Path | None,
    broker: str | None,
    assignments: tuple[str, ...],
    log: str | None,
) -> None:
    """Take part in rounds until stopped (SIGTERM or Ctrl-C).

    \b
    Example:
      midge-device run --dir ./ward-3 --data npz:samples.npz
    """
    settings, path = _settings_to_run(
        folder, config, assignments, broker, data=data, role=role, log=log
    )
    show_log(settings.log)
    identity = _identity_to_run(folder, bundle)
    stopped = stop_on_signals()  # from here on: until now there was nothing to end in order
    if not (folder / "device.toml").exists():
        with contextlib.suppress(LocalError):  # it is for reading; a full disk stops nobody
            write_atomic(folder / "device.toml", EXAMPLE.encode())
    with held(folder) as disk:
        work(identity, folder, settings, path, stopped.is_set, disk=disk)


def _settings_to_run(
    folder: Path,
    config: Path | None,
    assignments: tuple[str, ...],
    broker: str | None,
    **options: str | None,
) -> tuple[DeviceConfig, Path]:
    """The settings, whose data source is there, and the file that they are from."""
    path = config or folder / "device.toml"
    settings = load_config(path, DeviceConfig) if config else _settings(path)
    host, port = _host_port(broker)
    settings = overridden(
        assigned(settings, assignments),
        "command line",
        broker_host=host,
        broker_port=port,
        **options,
    )
    if not settings.data:
        raise LocalError(
            "no data source: say --data npz:FILE, csv:FOLDER, store:FILE or module:function, "
            f"or set data in {path}"
        )
    _look_for(settings.data)
    return settings, path


def _identity_to_run(folder: Path, bundle: Path | None) -> Identity:
    """Who this device is; enrolled with the bundle, if it was not before."""
    identity = identities.load(folder)
    if identity is None and bundle is not None and bundle.exists():
        identity = _enrol(bundle, folder, 600.0)
        _log.info("enrolled as %s, fingerprint %s", identity.scope, identity.keys.fingerprint)
    if identity is None:
        also = f", and {bundle} is not there" if bundle is not None else ""
        raise LocalError(
            f"{folder} holds no enrolled device{also}; run "
            f"`midge-device enrol BUNDLE --dir {folder}`"
        )
    if bundle is not None:
        _forget(bundle, folder, identity)
    return identity


def _look_for(source: str) -> None:
    """Find what cannot be right now, not when the first task comes."""
    kind, _, rest = source.partition(":")
    if not rest:
        raise LocalError(
            f"the data source {source!r} is not understood: write npz:FILE, csv:FOLDER, "
            "store:FILE or module:function"
        )
    path = rest if kind in ("npz", "csv") else kind
    if (kind in ("npz", "csv") or path.endswith(".py")) and not Path(path).exists():
        raise LocalError(f"the data source {source!r} is not there; correct the path")


@device.command("status")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Say who this device is and what it is doing.

    \b
    Example:
      midge-device status --dir ./ward-3 --json
    """
    identity = identities.load(folder)
    if identity is None:
        raise LocalError(
            f"{folder} holds no enrolled device; run `midge-device enrol BUNDLE --dir {folder}`"
        )
    journal = Journal(folder)
    memory = journal.memory()
    facts = _facts(identity) | {
        "state": journal.shown(),
        "rounds": {"highest": memory.round, "done": memory.done},
        "outbox": _waiting(folder),
        "model": models.kept(folder, "global"),
    }
    rules = _settings(folder / "device.toml").eligibility
    judge = judged(folder, rules)
    verdicts = [] if judge is None else judge(None)
    facts["eligibility"] = [
        {"rule": v.rule, "reading": v.reading, "holds": v.holds} for v in verdicts
    ]
    if as_json:
        click.echo(json.dumps(facts))
        return
    del facts["eligibility"]
    for name, value in facts.items():
        click.echo(f"{name:12} {value if not isinstance(value, dict) else _brief(value)}")
    for verdict in verdicts:
        click.echo(f"{'may work' if verdict.holds else 'NOT NOW':12} {verdict.sentence}")


def _waiting(folder: Path) -> dict[str, object] | None:
    """What is in the outbox; what is damaged is left there for `run`."""
    try:
        found = Outbox(folder / "outbox").find()
    except DamagedOutboxError as error:
        return {"damaged": f"{error}; `midge-device run` throws it away when it starts"}
    return None if found is None else {"round": found.round, "bytes": found.total_bytes}


def _settings(path: Path) -> DeviceConfig:
    return load_config(path, DeviceConfig) if path.exists() else DeviceConfig()


@device.command("try")
@click.argument("task", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data", required=True, help="The samples to train on, as for `run`.")
@click.option("--test", help="Samples to measure the result on.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: as in the task.")
@click.option("--learning-rate", type=float, help="Default: as in the task.")
@click.option("--seed", default=1, show_default=True, help="Order of samples and noise.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def try_command(
    task: Path,
    data: str,
    test: str | None,
    epochs: int | None,
    learning_rate: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train the file TASK on this machine alone, through the code that runs in rounds.

    \b
    Example:
      midge-device try wearables.task --data npz:samples.npz --epochs 5
    """
    with click.progressbar(
        length=1000, label="training", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def on_step(progress: Progress) -> None:
            bar.update(1000 * progress.step // progress.steps - bar.pos)

        found = run_trial(
            task, data, test=test, epochs=epochs, learning_rate=learning_rate, seed=seed,
            on_step=on_step,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found.facts()))
        return
    for name, value in found.facts().items():
        click.echo(f"{name:12} {value if not isinstance(value, dict) else _brief(value)}")


@device.command("unit")
def unit() -> None:
    """Print the systemd unit that runs this device, sandboxed.

    \b
    Example:
      midge-device unit | sudo tee /etc/systemd/system/midge-device.service
    """
    click.echo(unit_file("device_client", "midge-device.service"), nl=False)


def _brief(value: dict[str, object]) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items() if item not in ("", None))


def _facts(identity: Identity) -> dict[str, object]:
    return {
        "device": identity.device,
        "federation": identity.federation,
        "broker": f"{identity.broker_host}:{identity.broker_port}",
        "fingerprint": identity.keys.fingerprint,
        "software": f"midge {version('midge')}",
    }


def _enrol(bundle: Path, folder: Path, wait_s: float) -> Identity:
    return enrol(
        identities.read_bundle(bundle), folder, software=f"midge {version('midge')}", wait_s=wait_s
    )


def _forget(bundle: Path, folder: Path, identity: Identity) -> None:
    """Erase a bundle that has done its work. A disk that refuses stops nobody."""
    try:
        if forget_bundle(bundle, folder, identity):
            _log.info("%s has done its work, and is erased", bundle)
    except LocalError as error:
        _log.warning("a bundle that has done its work cannot be erased: %s", error)


def _host_port(broker: str | None) -> tuple[str | None, int | None]:
    if broker is None:
        return None, None
    host, _, port = broker.rpartition(":")
    if not host or not port.isdecimal():
        raise click.BadParameter("write HOST:PORT, for example 192.168.1.10:8883")
    return host, int(port)


for command in (doctor, infer, predict):
    device.add_command(command)


def main() -> None:
    """Run `midge-device`."""
    run_command(device, "midge-device")


if __name__ == "__main__":
    main()
