"""A model of this device's own: trained on from the global one, and kept only while it is better.

It learns from most of the samples, and does better only if it does so on the rest, which it has
not seen: by accuracy where the task has that, else by loss. What is sent in rounds is never
trained from it.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.taskfile import Training
from device_client.trainer import LocalTrainer, Progress

__all__ = ["better"]

log = logging.getLogger("midge.device")

Array = NDArray[Any]


def better(
    trainer: LocalTrainer,
    model: Mapping[str, Array],
    training: Training,
    *,
    version: int,
    seed: int,
    on_step: Callable[[Progress], bool],
) -> dict[str, Array] | None:
    """Train global model `version` on from here; its new weights, or None if they do no better.

    None also when `on_step` answered False. Raises LocalError.
    """
    before = trainer.evaluate(model, part="rest")
    trained = trainer.train(model, training, seed=seed, on_step=on_step, part="most")
    if trained is None:
        return None
    after = trainer.evaluate(trained.weights, part="rest")
    found = _is_better(after, before)
    log.info(
        "model %d trained on for this device: %s of %d samples held out, %s before: %s",
        version, _score(after), after.examples, _score(before), "kept" if found else "not kept",
    )  # fmt: skip
    return trained.weights if found else None


def _score(found: Evaluation) -> str:
    accuracy = found.metrics.get("accuracy")
    return f"loss {found.loss:.4f}" if accuracy is None else f"accuracy {accuracy:.3f}"


def _is_better(after: Evaluation, before: Evaluation) -> bool:
    """Strictly: a tie is no reason to differ from everybody else."""
    if not math.isfinite(after.loss):
        return False
    pair = after.metrics.get("accuracy"), before.metrics.get("accuracy")
    if pair[0] is not None and pair[1] is not None and pair[0] != pair[1]:
        return pair[0] > pair[1]
    return after.loss < before.loss
