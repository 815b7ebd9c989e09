"""Storms one after another, for hours: `python -m tests.chaos --minutes 60 --seed 7`."""

import argparse
import tempfile
import time
from pathlib import Path

from tests.chaos.storm import Storm

STORM_S = 60.0  # one storm; then everything is compared, and the next begins from nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first storm")
    chosen = parser.parse_args()
    over_s = time.monotonic() + 60 * chosen.minutes
    seed, kills = chosen.seed, 0
    while seed == chosen.seed or time.monotonic() < over_s:
        kills += one(seed, min(STORM_S, max(10.0, over_s - time.monotonic())))
        seed += 1
    print(f"{seed - chosen.seed} storms, {kills} kills, every bit and every receipt as it must be")


def one(seed: int, duration_s: float) -> int:
    """Run a storm; raises AssertionError and leaves its folder when something is wrong."""
    again = f"python -m tests.chaos --seed {seed} --minutes {duration_s / 60:g}"
    folder = Path(tempfile.mkdtemp(prefix=f"midge-storm-{seed}-"))
    storm = Storm(folder, seed)
    try:
        storm.begin()
        storm.rage(until_s=time.monotonic() + duration_s)
        rounds = storm.calm()
        storm.end()
        storm.check(rounds)
    except BaseException:
        print(f"seed {seed} failed; its folder is {folder}; again: {again}", flush=True)
        raise
    finally:
        storm.end()
    print(f"seed {seed}: {rounds} rounds, killed {dict(storm.kills)}", flush=True)
    return storm.kills.total()


if __name__ == "__main__":
    main()
