"""What a task says beyond its model: names, batch size, training defaults. No TensorFlow here.

A model file may hold `options = TaskOptions(…)` beside its `model()` function; the
command line overrides single fields.
"""

from dataclasses import dataclass
from typing import Any

from broker_bridge.task.taskfile import Preprocessing
from broker_bridge.wire.weights import TensorSpec

__all__ = ["TaskOptions"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Everything about a task that a compiled Keras model does not say. None: as compiled."""

    name: str
    description: str = ""
    licence: str = ""
    batch_size: int = 16
    evaluation_batch_size: int = 64
    epochs: int = 1
    learning_rate: float | None = None
    proximal_mu: float = 0.0
    clip_norm: float | None = None
    keep_optimiser_state: bool = False
    loss: Any = None  # a name, function or keras.losses.Loss
    optimiser: Any = None  # a name or keras.optimizers.Optimizer
    metrics: tuple[Any, ...] | None = None
    label: TensorSpec | None = None  # one sample's label, where the loss does not tell
    label_names: tuple[str, ...] = ()
    preprocessing: tuple[Preprocessing, ...] = ()
