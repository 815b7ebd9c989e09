"""Bytes on the wire: one update, and one idle day; midge and Flower counted the same way.

Each device's connection goes through a counting relay (wiretap.py): bytes said (MQTT or
HTTP), the same in TLS records, the same in IPv4 packets with their acknowledgements.
Everything a device sends and receives for a round is counted, not the update alone.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence

from benchmarks.fleet import DENSE100K, Fleet, one_sample
from benchmarks.flower import Flower, FlowerMissingError, install
from benchmarks.machine import Spread, header, is_quick, table
from benchmarks.wiretap import Count, Wiretap
from device_client import identity as identities

RAW_BYTES = 400_000
DAY_S = 86_400
UPDATE_TARGET = 1.01
IDLE_TARGET_BYTES = 10_000


def midge_tap(fleet: Fleet, device: str, stack: contextlib.ExitStack) -> Wiretap:
    """Put a relay between one enrolled device and the broker."""
    folder = fleet.folder / device
    identity = identities.load(folder)
    assert identity is not None
    tls = identities.tls_files(folder, identity)
    assert tls.certificate is not None
    assert tls.key is not None
    return stack.enter_context(
        Wiretap(
            fleet.port,
            certificate=fleet.home.broker / "broker.pem",
            key=fleet.home.broker / "broker-key.pem",
            trust=tls.ca,
            client=(tls.certificate, tls.key),
        )
    )


def flower_tap(flower: Flower, stack: contextlib.ExitStack) -> Wiretap:
    """Put a relay between one SuperNode and the SuperLink."""
    return stack.enter_context(
        Wiretap(
            flower.port,
            certificate=flower.folder / "server.pem",
            key=flower.folder / "server.key",
            trust=flower.ca,
        )
    )


def midge_update(fleet: Fleet, tap: Wiretap, rounds: int) -> list[Count]:
    """Count each of some rounds of the one device, after one that fetched the task."""
    fleet.rounds(1, task="dense100k")
    counts = []
    for _ in range(rounds):
        time.sleep(1.0)  # the last acknowledgements of the round before
        before, since_s = tap.count(), time.monotonic()
        fleet.rounds(1, task="dense100k")
        time.sleep(1.0)
        counts.append(tap.count() - before)
    for up in (True, False):
        parts = tap.bytes_by_topic(since_s=since_s, up=up).most_common()
        print(f"  one round {'up' if up else 'down'}, MQTT bytes:",
              ", ".join(f"{name} {size:,}" for name, size in parts))  # fmt: skip
    print(flush=True)
    return counts


def flower_update(flower: Flower, tap: Wiretap, rounds: int) -> list[Count]:
    """Count from the end of each round to the end of the next."""
    seen = []
    flower.rounds(rounds + 1, on_round=lambda: seen.append(tap.count()))
    return [after - before for before, after in itertools.pairwise(seen)]


def update_row(name: str, counts: Sequence[Count]) -> list[str]:
    def ratio(values: Sequence[int]) -> str:
        return Spread.of([value / RAW_BYTES for value in values]).text(digits=4)

    return [
        name,
        ratio([c.up_bytes for c in counts]),
        ratio([c.down_bytes for c in counts]),
        ratio([c.tcp_up_bytes for c in counts]),
        f"{Spread.of([c.ip_bytes / RAW_BYTES for c in counts]).median:.3f}",
    ]


def idle_row(name: str, count: Count, lasted_s: float) -> list[str]:
    hours = lasted_s / 3600
    return [
        name,
        f"{count.said_bytes / hours:,.0f}",
        *(f"{size * DAY_S / lasted_s / 1000:,.1f} kB"
          for size in (count.said_bytes, count.tcp_bytes, count.ip_bytes)),
    ]  # fmt: skip


def main() -> None:
    """Print both tables."""
    header("Bytes on the wire, one device, 100,000 parameters (400,000 bytes of float32)")
    rounds, periods = (2, 1) if is_quick() else (10, 5)
    updates, idles, notes = [], [], []
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(Fleet(DENSE100K))
        fleet.enrol("device")
        tap = midge_tap(fleet, "device", stack)
        data = one_sample(fleet.folder)
        fleet.run_device("device", "--data", data, "--broker", f"127.0.0.1:{tap.port}")
        updates.append(update_row("midge", midge_update(fleet, tap, rounds)))
        taps = {"midge": tap}
        try:
            version = install()
            flower = stack.enter_context(Flower(nodes=1, encrypted=True, start_nodes=False))
            other = taps[f"Flower {version}"] = flower_tap(flower, stack)
            flower.start_node(0, other.port)
            found = flower_update(flower, other, 2 if is_quick() else 5)
            updates.append(update_row(f"Flower {version}", found))
        except FlowerMissingError as error:
            notes.append(f"  Flower skipped: {error}\n")
        time.sleep(5.0)  # let what belongs to the last round pass
        # Whole keep-alives, so that the count does not depend on where the window starts.
        wait_for_pings(tap, 1)
        since_s = time.monotonic()
        before = {name: each.count() for name, each in taps.items()}
        wait_for_pings(tap, periods)
        lasted_s = time.monotonic() - since_s
        idles = [idle_row(n, t.count() - before[n], lasted_s) for n, t in taps.items()]
        notes.append(pings(tap, since_s, lasted_s))
    print("  Every byte of one round, as a multiple of the raw float32 update:\n")
    table(["", "said, up", "said, down", "TLS, up", "IP, both ways"], updates)
    print(f"  target: MQTT up ≤ {UPDATE_TARGET}\n")
    print(f"  Idle, both ways, over {lasted_s:.0f} s:\n")
    table(["", "said: bytes an hour", "said a day", "with TLS", "with TCP and IPv4"], idles)
    print(f"  target: MQTT ≤ {IDLE_TARGET_BYTES / 1000:.0f} kB a day")
    print("\n".join(notes), flush=True)


def wait_for_pings(tap: Wiretap, count: int) -> None:
    """Return a second after `count` more keep-alives were asked for."""
    seen, give_up = len(tap.packets), time.monotonic() + 150.0 * count
    while sum(p.kind == "PINGREQ" for p in tap.packets[seen:]) < count:
        if time.monotonic() > give_up:
            raise RuntimeError("the device sends no keep-alives")
        time.sleep(0.05)
    time.sleep(1.0)


def pings(tap: Wiretap, since_s: float, lasted_s: float) -> str:
    """Say what passed while midge was idle."""
    idle = [p for p in tap.packets if p.at_s >= since_s]
    asked = [p for p in idle if p.kind == "PINGREQ"]
    size = sum(p.size_bytes for p in idle)
    other = len(idle) - len(asked) - sum(p.kind == "PINGRESP" for p in idle)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(asked)]
    rhythm = f", {Spread.of(gaps).median:.1f} s apart" if gaps else ""
    return (
        f"  midge: {len(asked)} PINGREQ{rhythm}, {other} packets of another kind, "
        f"{size} MQTT bytes in {lasted_s:.0f} s\n"
    )


if __name__ == "__main__":
    main()
