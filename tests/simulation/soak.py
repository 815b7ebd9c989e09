"""Many seeds, on every core; what fails is printed with the command that replays it."""

import logging
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.federation import Federation, Outcome
from tests.simulation.weather import Weather

__all__ = ["COMMAND", "soak", "try_seed"]

COMMAND = "python -m tests.simulation"
AT_ONCE = 25


def try_seed(seed: int) -> Outcome | str:
    """How a seed ended, or what went wrong."""
    logging.disable()
    try:
        return Federation(Weather.of(seed)).run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def soak(start: int, count: int, processes: int) -> int:
    """Try `count` seeds; print what failed and how fast it went; return the exit code."""
    began, failed, ended, receipts, points = time.monotonic(), [], 0, 0, 0
    with ProcessPoolExecutor(processes) as pool:
        seeds = range(start, start + count)
        for done, (seed, found) in enumerate(
            zip(seeds, pool.map(try_seed, seeds, chunksize=AT_ONCE), strict=True), start=1
        ):
            if isinstance(found, str):
                failed.append(seed)
                print(f"seed {seed} failed: {found}\n  replay it: {COMMAND} --replay {seed} -v")
            else:
                ended, receipts = ended + found.ended, receipts + found.receipts
                points += found.points
            if done % 1000 == 0 or done == count:
                rate = done / (time.monotonic() - began)
                print(
                    f"{done} seeds, {len(failed)} failed, {rate:.1f} seeds per second", flush=True
                )
    print(f"{ended} processes ended at one of {points} points; {receipts} receipts were honoured")
    return 1 if failed else 0
