"""Record labelled windows from a motion sensor, for as long as it runs.

    python examples/sensor/record.py samples.db --label 3          # a made-up sensor
    midge-device run --dir ./ward-3 --data store:samples.db

Replace `MadeUpSensor` by yours: whatever calls `recorder.on_reading` once for each reading
will do. The label is what somebody says the wearer is doing now: a button, a schedule, a
form. Nothing here talks to the network.
"""

import argparse
import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from broker_bridge.errors import MidgeError
from device_client.sample_store import SampleStore

ROWS, CHANNELS = 50, 6  # two seconds at 25 Hz, as the task `wearables` wants them
HOP = 25  # a window begins every second

Reading = Sequence[float]


class WindowRecorder:
    """Cuts a stream of readings into overlapping windows of one label."""

    def __init__(self, store: SampleStore, *, label: int) -> None:
        self._store = store
        self._label = label
        self._rows: list[Reading] = []
        self.windows = 0

    def say(self, label: int) -> None:
        """From now on it is this. A window never holds two labels."""
        if label != self._label:
            self._label = label
            self._rows.clear()

    def on_reading(self, reading: Reading) -> None:
        """The sensor's callback: six numbers, 25 times a second."""
        self._rows.append(reading)
        if len(self._rows) == ROWS:
            self._store.append([np.array(self._rows)], self._label)
            self.windows += 1
            del self._rows[:HOP]


class MadeUpSensor:
    """Calls back 25 times a second with a wave and some noise."""

    def __init__(self, on_reading: Callable[[Reading], None], *, hz: float = 25.0) -> None:
        self._on_reading = on_reading
        self._hz = hz

    def run(self, readings: int | None = None) -> None:
        """Go on for ever, or for so many readings."""
        number = 0
        while readings is None or number < readings:
            angle = 2 * math.pi * number / 25
            self._on_reading([math.sin(angle + k) + random.gauss(0, 0.1) for k in range(CHANNELS)])
            number += 1
            if self._hz:
                time.sleep(1 / self._hz)


def main() -> None:
    """Record until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the file to record into; made if it is not there")
    parser.add_argument("--label", type=int, default=0, help="what the wearer is doing, 0 to 6")
    parser.add_argument("--megabytes", type=float, default=200.0, help="the most to keep")
    parser.add_argument("--days", type=float, default=30.0, help="how long to keep it")
    parser.add_argument("--readings", type=int, help="stop after so many; default: never")
    parser.add_argument("--hz", type=float, default=25.0, help="readings a second; 0: at once")
    said = parser.parse_args()
    try:
        with SampleStore(
            said.store, shapes=[(ROWS, CHANNELS)], bytes_max=int(said.megabytes * 1e6),
            age_max_s=said.days * 86_400,
        ) as store:  # fmt: skip
            recorder = WindowRecorder(store, label=said.label)
            with contextlib.suppress(KeyboardInterrupt):
                MadeUpSensor(recorder.on_reading, hz=said.hz).run(said.readings)
            print(f"{recorder.windows} windows recorded, {len(store)} in {said.store}")
    except MidgeError as error:
        raise SystemExit(f"record: {error}") from None


if __name__ == "__main__":
    main()
