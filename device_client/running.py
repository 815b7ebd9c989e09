"""What `midge-device run` puts together, and runs: link, training process, agent, supervisor."""

import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from broker_bridge.disk import Disk
from broker_bridge.link.base import Link, Message
from broker_bridge.systemd import Supervisor
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Presence
from broker_bridge.wire.topics import Topics
from device_client.access import access_to_work
from device_client.agent import Agent
from device_client.config import DeviceConfig
from device_client.eligibility import Rules, Verdict, judge
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.readings import take_readings
from device_client.sandbox.trainer import Sandbox, SandboxSettings

__all__ = ["judged", "work"]


def work(
    identity: Identity,
    folder: Path,
    settings: DeviceConfig,
    path: Path,
    stopped: Callable[[], bool],
    *,
    disk: Disk,
) -> None:
    """Take part in rounds until `stopped`. Raises LocalError, LinkError.

    `path`: the file that the settings are from. `disk`: what the folder is written with.
    """
    journal = Journal(folder, disk=disk)
    boot = journal.boot()

    def connect(who: Identity) -> Link:
        return _connected(who, folder, settings, path, boot)

    def relink(old: Link, who: Identity) -> Link:
        old.close()
        return connect(who)

    sandbox = Sandbox(SandboxSettings.of(settings))
    agent = Agent(
        identity, connect(identity), journal=journal, load=sandbox.load, role=settings.role,
        boot=boot, draw=random.random, relink=relink, software=f"midge {version('midge')}",
        judged=judged(folder, settings.eligibility), keeps_model=settings.keep_model,
        personal_epochs=settings.personal_epochs,
    )  # fmt: skip
    try:
        turning = Supervisor().watched(stopped, lambda: agent.state.value)
        sandbox.while_waiting = turning  # samples may take long to come
        agent.run(turning)
    finally:
        sandbox.close()
        agent.link.close()


def _connected(who: Identity, folder: Path, settings: DeviceConfig, path: Path, boot: int) -> Link:
    """A link whose will says that the device was lost."""
    lost = Presence(state="lost", boot=boot, role=settings.role)
    topic = Topics(who.federation).state(who.device)
    return access_to_work(folder, who, settings, path).open(
        who.device,
        seed=who.keys.tls_seed,
        will=Message(topic, messages.encode_json(lost), retained=True),
        keepalive_s=settings.keepalive_s,
        protocol=settings.mqtt,
        packet_bytes_max=settings.packet_bytes_max,
        inflight_max=settings.inflight_max,
        publishes_per_s=settings.publishes_per_s,
        wait_s=None,  # a device waits for its broker, however long
    )


def judged(folder: Path, rules: Rules) -> Callable[[int | None], list[Verdict]] | None:
    """What the owner's rules say of this machine now; None where there are no rules."""
    if rules == Rules():
        return None
    return lambda samples: judge(rules, take_readings(folder, rules, samples=samples))
