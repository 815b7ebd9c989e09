"""Is it good enough? A new model, until somebody has measured it. Pure.

The server measures it, if it has held-out data; else the devices that hold theirs out, and each
example counts alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from broker_bridge.wire.messages import Report, Until

__all__ = ["Measured", "Measuring", "good_enough"]

_ROLL_CALL_S = 5.0  # in which devices say that they are there, after we or the broker came back


@dataclass(frozen=True)
class Measured:
    """What was found; without metrics, nobody measured."""

    metrics: Mapping[str, float]
    examples: int = 0
    by: str = ""  # server or devices

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())


class Measuring:
    """One model, and what devices reported of it so far."""

    def __init__(
        self, version: int, *, by_server: bool, now_s: float, wait_s: float, examples_max: int
    ) -> None:
        """`wait_s`: for reports, at most. `examples_max`: what one report counts at most."""
        self.version = version
        self.by_server = by_server
        self._began_s = now_s
        self._wait_s = wait_s
        self._examples_max = examples_max
        self._reports: dict[str, Report] = {}

    def take(self, device: str, report: Report) -> None:
        """A device that holds its data out measured it."""
        examples = min(report.examples, self._examples_max)
        self._reports[device] = msgspec.structs.replace(report, examples=examples)

    def forget(self, device: str) -> None:
        """Its report counts no more."""
        self._reports.pop(device, None)

    def is_over(self, now_s: float, *, evaluators: int) -> bool:
        """Whether to wait no more. Nobody is waited for who does not show up: after a restart all
        are unknown at first. `evaluators`: how many devices are here that measure.
        """
        somebody = self.by_server or evaluators > 0
        wait_s = self._wait_s if somebody else min(self._wait_s, _ROLL_CALL_S)
        return now_s >= self._began_s + wait_s

    def has_all(self, devices: list[str]) -> bool:
        """Whether all of these reported."""
        return set(devices) <= set(self._reports)

    def by_devices(self) -> Measured | None:
        """The means over all examples that devices reported on; None where none did."""
        reports = self._reports.values()
        if not reports:
            return None
        examples = sum(r.examples for r in reports)
        names = set.intersection(*(set(r.metrics) for r in reports))
        means = {
            # Shares first: a sum of products could leave the range of a float.
            name: sum(r.metrics[name] * (r.examples / examples) for r in reports)
            for name in sorted(names)
        }
        return Measured(means, examples, "devices")


def good_enough(until: Until | None, metrics: Mapping[str, float]) -> bool:
    """Whether the run may end. Nobody measured: no. NaN: no."""
    if until is None or not metrics:
        return False
    # Written so that NaN, of which every comparison is false, is never good enough.
    if until.accuracy is not None and not metrics.get("accuracy", 0.0) >= until.accuracy:
        return False
    return until.loss is None or metrics.get("loss", float("inf")) <= until.loss
