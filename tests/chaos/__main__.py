"""Storms one after another, for hours: `python -m tests.chaos --minutes 60 --seed 7`.

Before them the broker is away for five minutes, real ones: too long for the default tests.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.storm import Storm

STORM_S = 60.0  # one storm; then everything is compared, and the next begins from nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first storm")
    parser.add_argument("--outage-s", type=float, default=300.0, help="0: no outage")
    chosen = parser.parse_args()
    if chosen.outage_s:
        run(
            chosen.seed,
            lambda storm: storm.outage(chosen.outage_s),
            f"--outage-s {chosen.outage_s:g}",
        )
    over_s = time.monotonic() + 60 * chosen.minutes
    seed, kills = chosen.seed, 0
    while seed == chosen.seed or time.monotonic() < over_s:
        kills += one(seed, min(STORM_S, max(10.0, over_s - time.monotonic())))
        seed += 1
    print(f"{seed - chosen.seed} storms, {kills} kills, every bit and every receipt as it must be")


def one(seed: int, duration_s: float) -> int:
    """Rage for so long; returns the number of kills."""
    return run(
        seed,
        lambda storm: storm.rage(until_s=time.monotonic() + duration_s),
        f"--minutes {duration_s / 60:g} --outage-s 0",
    )


def run(seed: int, trouble: Callable[[Storm], None], options: str) -> int:
    """Run a federation through trouble; returns the number of kills.

    Raises AssertionError and leaves its folder when something is wrong.
    """
    again = f"python -m tests.chaos --seed {seed} {options}"
    folder = Path(tempfile.mkdtemp(prefix=f"midge-storm-{seed}-"))
    storm = Storm(folder, seed)
    try:
        storm.begin()
        trouble(storm)
        rounds = storm.calm()
        storm.end()
        storm.check(rounds)
    except BaseException:
        print(f"seed {seed} failed; its folder is {folder}; again: {again}", flush=True)
        raise
    finally:
        storm.end()
    print(f"seed {seed} {options}: {rounds} rounds, killed {dict(storm.kills)}", flush=True)
    return storm.kills.total()


if __name__ == "__main__":
    main()
