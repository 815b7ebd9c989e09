"""How good a model is on samples the operator holds out, through the task's own .tflite.

Runs in a second thread, so that devices are answered meanwhile. No TensorFlow here.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import read_npz
from broker_bridge.task.taskfile import Plan
from server.events import Evaluated

__all__ = ["Evaluator"]

log = logging.getLogger("midge.server")


class Evaluator:
    """Measures models of one task on one .npz file of samples."""

    def __init__(self, plan: Plan, npz: str) -> None:
        """Raises LocalError when the samples do not fit the task or the model will not load."""
        self._runtime = TaskRuntime(plan)
        self._samples = read_npz(npz, plan.task)

    def start(
        self,
        version: int,
        weights: Mapping[str, NDArray[Any]],
        done: Callable[[Evaluated], None],
    ) -> None:
        """Measure a model in the background, then call `done` from that thread."""

        def work() -> None:
            found = self._runtime.evaluate(weights, self._samples)
            metrics = {"loss": found.loss} | found.metrics
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            done(Evaluated(version, found.examples, finite))

        threading.Thread(target=work, name="midge-evaluation", daemon=True).start()
