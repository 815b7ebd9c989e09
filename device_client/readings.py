"""What this machine says of itself: power, heat, load, memory, disk, network.

Reads the kernel's files below `root` and, where they are installed, asks `vcgencmd` and
`nmcli`. Nothing here fails: what cannot be read is None, and the owner's rules say what
that means. Takes some milliseconds; the two commands a second at most, each.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from device_client.eligibility import Readings, Rules

__all__ = ["Command", "take_readings"]

# Runs a command and returns what it printed; None where it is not installed or failed.
Command = Callable[[list[str]], str | None]

# vcgencmd get_throttled: bits 0 to 3 are about now, the rest about the past.
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_THROTTLED_NOW = 0b1111
_MAINS = ("Mains", "USB", "USB_C", "USB_PD")


def take_readings(
    folder: Path,
    rules: Rules,
    *,
    samples: int | None = None,
    root: Path = Path("/"),
    command: Command | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> Readings:
    """Read everything once; the commands are run if `rules` need them.

    `folder` is on the disk that matters. `samples`: as many as were counted.
    """
    ask = command or _ask
    supplies = list(_supplies(root))
    network = _default_route(root)
    return Readings(
        clock=now().time(),
        samples=samples,
        mains=_mains(supplies),
        battery=_battery(supplies),
        temperature_c=_temperature_c(root),
        throttled=None if rules.throttled else _throttled(ask),
        load=_load(root),
        memory_bytes=_memory_bytes(root),
        disk_bytes=_disk_bytes(folder),
        network=network,
        metered=None if network is None or rules.metered else _metered(ask, network),
        file_is_there=bool(rules.unless_file) and Path(rules.unless_file).exists(),
    )


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return None


def _number(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_text(path) or "")
    return None


def _supplies(root: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted((root / "sys/class/power_supply").iterdir())


def _mains(supplies: list[Path]) -> bool | None:
    """Whether any supply of mains power is on line; a machine without a battery is on mains."""
    kinds = {supply: _text(supply / "type") for supply in supplies}
    online = [_text(s / "online") == "1" for s, kind in kinds.items() if kind in _MAINS]
    if online:
        return any(online)
    return None if "Battery" in kinds.values() else True


def _battery(supplies: list[Path]) -> float | None:
    """The emptiest battery. A UPS hat has one here, if its driver is the kernel's."""
    levels = [_number(s / "capacity") for s in supplies if _text(s / "type") == "Battery"]
    return min((level / 100 for level in levels if level is not None), default=None)


def _temperature_c(root: Path) -> float | None:
    """The hottest zone."""
    found = []
    with contextlib.suppress(OSError):
        for zone in (root / "sys/class/thermal").iterdir():
            millidegrees = _number(zone / "temp")
            if millidegrees is not None:
                found.append(millidegrees / 1000)
    return max(found, default=None)


def _throttled(ask: Command) -> bool | None:
    said = ask(["vcgencmd", "get_throttled"])
    with contextlib.suppress(ValueError, IndexError):
        return bool(int((said or "").strip().split("=")[1], 16) & _THROTTLED_NOW)
    return None


def _load(root: Path) -> float | None:
    """The mean of the last minute, for each core."""
    with contextlib.suppress(ValueError, IndexError):
        return float((_text(root / "proc/loadavg") or "").split()[0]) / (os.cpu_count() or 1)
    return None


def _memory_bytes(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            with contextlib.suppress(ValueError, IndexError):
                return int(value.split()[0]) * 1024
    return None


def _disk_bytes(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def _default_route(root: Path) -> str | None:
    """The interface of the default route with the lowest metric; IPv4 first."""
    return _route_4(root) or _route_6(root)


def _route_4(root: Path) -> str | None:
    routes = []
    for line in (_text(root / "proc/net/route") or "").splitlines()[1:]:
        with contextlib.suppress(ValueError, IndexError):
            name, to, _, _, _, _, metric, mask = line.split()[:8]
            if int(to, 16) == int(mask, 16) == 0:
                routes.append((int(metric), name))
    return min(routes)[1] if routes else None


def _route_6(root: Path) -> str | None:
    routes = []
    for line in (_text(root / "proc/net/ipv6_route") or "").splitlines():
        with contextlib.suppress(ValueError, IndexError):
            to, bits, _, _, _, metric, _, _, _, name = line.split()
            if name != "lo" and int(to, 16) == int(bits, 16) == 0:
                routes.append((int(metric, 16), name))
    return min(routes)[1] if routes else None


def _metered(ask: Command, network: str) -> bool | None:
    """What NetworkManager knows or guesses: `yes`, `no`, `yes (guessed)` …"""
    said = (ask(["nmcli", "-g", "GENERAL.METERED", "device", "show", network]) or "").strip()
    return {"yes": True, "no": False}.get(said.split(" ")[0])


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1.0, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
