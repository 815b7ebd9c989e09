"""What a task cost the devices that trained it: their own word, read from the broker.

A device keeps its figures in its retained state, from its last training until it stops.
Asks as an operator does, and leaves nothing behind. No TensorFlow here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Plan
from broker_bridge.wire.messages import Measured, Presence
from server.fleet.home import Home
from server.operator import Operator

__all__ = ["figures", "read_devices", "why_none"]

_AWAY = {"lost", "sleeping", "init"}


def read_devices(folder: Path, *, device: str | None = None) -> dict[str, Presence]:
    """Return the connected devices of the fleet in `folder`, or the one called `device`.

    Raises LocalError when that one is not connected, LinkError when the broker is not there.
    """
    operator = Operator.of(Home.find(folder))
    try:
        found = operator.devices()
    finally:
        operator.close()
    connected = {name: said for name, said in found.items() if said.state not in _AWAY}
    if device is None:
        return connected
    if device not in connected:
        raise LocalError(
            f"the device {device!r} is not connected; see who is with `midge status --dir {folder}`"
        )
    return {device: connected[device]}


def figures(devices: Mapping[str, Presence], plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what training `plan` cost each of `devices`, by name; who did not is left out."""
    return {
        name: {
            "machine": _printable(measured.machine),
            "runtime": _printable(measured.runtime),
            "step_ms": round(1000 * measured.step_s, 3),
            "peak_mb": round(measured.memory_bytes / 1e6, 1),
        }
        for name, presence in sorted(devices.items())
        if isinstance(measured := presence.measured, Measured) and _is_of(measured, plan)
    }


def why_none(devices: Mapping[str, Presence], plan: Plan) -> str:
    """Say in a sentence why there are no figures."""
    if not devices:
        return "no device is connected"
    found = [said.measured for said in devices.values() if isinstance(said.measured, Measured)]
    others = sorted({_printable(each.task) for each in found})
    if plan.task.name in others:
        return f"the connected devices last trained another version of {plan.task.name!r}"
    last = f"; the last training was of {', '.join(map(repr, others))}" if others else ""
    return (
        f"none of the {len(devices)} connected devices has trained {plan.task.name!r} "
        f"since it started{last}"
    )


def _is_of(measured: Measured, plan: Plan) -> bool:
    return measured.digest == plan.digest.hex()[:16]


def _printable(text: str) -> str:
    """A device wrote it: nothing in it may move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
