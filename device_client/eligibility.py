"""Whether this device should work now: the owner's rules over what the machine says of itself.

Pure: readings come in, verdicts come out (`device_client.readings` takes them). A rule that
is not set always holds. A rule that is set and whose reading is not to be had does not hold:
an owner who asked for mains power did not ask for "mains power, if that can be told".

The idea is from Bonawitz et al. 2019 (arXiv:1902.01046, §2.1), where phones train while
idle, charging and on an unmetered network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import time
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Readings", "Rules", "Verdict", "hours_between", "judge", "reason_against"]

_MB = 1_000_000


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table `[eligibility]` of device.toml. What is left out does not matter."""

    mains: bool = False
    battery_min: Annotated[float, Meta(ge=0, le=1)] = 0.0
    temperature_max_c: Annotated[float, Meta(ge=0, le=150)] = 0.0
    throttled: bool = True
    load_max: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    memory_min_mb: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    disk_min_mb: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    metered: bool = True
    networks: tuple[str, ...] = ()
    hours: tuple[str, ...] = ()
    samples_min: Annotated[int, Meta(ge=0)] = 0
    unless_file: str = ""

    def __post_init__(self) -> None:
        for span in self.hours:
            hours_between(span)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the machine says of itself. None: it does not say."""

    clock: time
    samples: int | None = None  # None: no task was loaded yet, so nobody counted
    mains: bool | None = None
    battery: float | None = None  # fraction of full
    temperature_c: float | None = None
    throttled: bool | None = None
    load: float | None = None  # processes that want to run, for each core
    memory_bytes: int | None = None  # that could be had
    disk_bytes: int | None = None  # free, where the device's folder is
    network: str | None = None  # the interface of the default route
    metered: bool | None = None
    file_is_there: bool = False


@dataclass(frozen=True)
class Verdict:
    """One rule, what it looked at, and what came of it."""

    rule: str
    reading: str
    holds: bool
    network: bool = False  # about the way to the broker, so it holds back an upload, too

    @property
    def sentence(self) -> str:
        """For a person: `temperature is 78 °C, and at most 70 °C is allowed`."""
        return f"{self.reading}; the rule is: {self.rule}"


def judge(rules: Rules, readings: Readings) -> list[Verdict]:
    """Every rule that is set, with its reading and verdict, in the order of the settings."""
    return [*_power(rules, readings), *_machine(rules, readings), *_rest(rules, readings)]


def reason_against(verdicts: Sequence[Verdict]) -> str:
    """Why not to work now, for a person; empty when nothing is against it."""
    return "; ".join(verdict.sentence for verdict in verdicts if not verdict.holds)


def hours_between(span: str) -> tuple[time, time]:
    """The two ends of `22:00-06:00`. Raises ValueError with a sentence."""
    start, dash, end = span.partition("-")
    try:
        if not dash:
            raise ValueError(span)
        return time.fromisoformat(start.strip()), time.fromisoformat(end.strip())
    except ValueError:
        raise ValueError(f"hours are written like 22:00-06:00, not {span!r}") from None


def _power(rules: Rules, readings: Readings) -> Iterator[Verdict]:
    if rules.mains:
        said = {True: "on mains power", False: "on battery", None: "the power source is unknown"}
        yield Verdict("mains power only", said[readings.mains], readings.mains is True)
    if rules.battery_min:
        level = readings.battery
        # A device without a battery cannot run it down.
        holds = readings.mains is True if level is None else level >= rules.battery_min
        said_level = "no battery is known" if level is None else f"the battery is at {level:.0%}"
        yield Verdict(f"battery at {rules.battery_min:.0%} or more", said_level, holds)


def _machine(rules: Rules, readings: Readings) -> Iterator[Verdict]:
    if rules.temperature_max_c:
        yield _at_most("temperature", readings.temperature_c, rules.temperature_max_c, " °C")
    if not rules.throttled:
        said = {
            True: "the processor is throttled (heat, or a weak power supply)",
            False: "the processor is not throttled",
            None: "whether the processor is throttled is unknown",
        }
        yield Verdict("not while throttled", said[readings.throttled], readings.throttled is False)
    if rules.load_max:
        yield _at_most("load of each core", readings.load, rules.load_max, "")
    if rules.memory_min_mb:
        yield _at_least("free memory", readings.memory_bytes, rules.memory_min_mb)
    if rules.disk_min_mb:
        yield _at_least("free disk", readings.disk_bytes, rules.disk_min_mb)


def _rest(rules: Rules, readings: Readings) -> Iterator[Verdict]:
    if not rules.metered:
        said = {
            True: "the network is metered",
            False: "the network is not metered",
            None: "whether the network is metered is unknown",
        }
        holds = readings.metered is False
        yield Verdict("unmetered networks only", said[readings.metered], holds, network=True)
    if rules.networks:
        name = readings.network
        rule = f"only over {', '.join(rules.networks)}"
        said_name = "there is no network" if name is None else f"the network is {name}"
        yield Verdict(rule, said_name, name in rules.networks, network=True)
    if rules.hours:
        holds = any(_within(readings.clock, *hours_between(span)) for span in rules.hours)
        yield Verdict(f"only at {', '.join(rules.hours)}", f"it is {readings.clock:%H:%M}", holds)
    if rules.samples_min:
        count = readings.samples
        said_count = "no task was loaded yet" if count is None else f"there are {count} samples"
        holds = count is None or count >= rules.samples_min
        yield Verdict(f"{rules.samples_min} samples or more", said_count, holds)
    if rules.unless_file:
        there = readings.file_is_there
        said_file = f"{rules.unless_file} is {'there' if there else 'not there'}"
        yield Verdict(f"not while {rules.unless_file} is there", said_file, not there)


def _within(now: time, start: time, end: time) -> bool:
    """Hours may go past midnight; the end does not belong to them."""
    return start <= now < end if start <= end else now >= start or now < end


def _at_most(what: str, found: float | None, most: float, unit: str) -> Verdict:
    rule = f"{what} at most {most:g}{unit}"
    if found is None:
        return Verdict(rule, f"the {what} is unknown", False)
    return Verdict(rule, f"the {what} is {found:.3g}{unit}", found <= most)


def _at_least(what: str, found_bytes: int | None, least_mb: float) -> Verdict:
    rule = f"{what} at least {least_mb:g} MB"
    if found_bytes is None:
        return Verdict(rule, f"the {what} is unknown", False)
    return Verdict(rule, f"the {what} is {found_bytes / _MB:.0f} MB", found_bytes / _MB >= least_mb)
