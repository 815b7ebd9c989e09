"""Run many seeds, or one again: `python -m tests.simulation --seeds 10000`, `--replay 17 -v`."""

import argparse
import logging
import sys
import traceback

from tests.simulation.federation import Federation
from tests.simulation.soak import COMMAND, soak
from tests.simulation.weather import Weather


def replay(seed: int, *, verbose: bool) -> int:
    """Run one seed again; with `verbose`, tell all that was said."""
    if not verbose:
        logging.disable()
    federation = Federation(Weather.of(seed))
    if verbose:
        print(federation.weather)
    try:
        outcome = federation.run()
    except Exception:
        traceback.print_exc()
        outcome = None
    if verbose:
        print(*federation.oracle.story, sep="\n")
        for machine in federation.machines:
            print(machine.name, *machine.ended, sep="\n  ")
    print(outcome or f"seed {seed} failed")
    return 0 if outcome else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many to try")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--processes", type=int, help="at once; default: one for each core")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one again")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell what was said")
    given = parser.parse_args()
    if given.replay is not None:
        return replay(given.replay, verbose=given.verbose)
    return soak(given.start, given.seeds, given.processes)


if __name__ == "__main__":
    sys.exit(main())
