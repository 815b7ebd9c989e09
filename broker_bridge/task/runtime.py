"""Run a task's graph: one training step, evaluation, inference. The only TensorFlow Lite file.

Promises exact inputs to the graph (padding, weights, noise, order of tensors) and the
same numbers for the same seed. It holds no state between calls and no samples.
One process can use one runtime: which one is a matter of the Python version, or of `prefer`.
"""

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, Task, Training, weights_of

__all__ = ["RUNTIMES", "Evaluation", "State", "Step", "TaskRuntime", "draw_noise", "warm_up"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

_MODULES = {
    "tflite-runtime": "tflite_runtime.interpreter",
    "ai-edge-litert": "ai_edge_litert.interpreter",
}
RUNTIMES = tuple(_MODULES)


@dataclass(frozen=True)
class State:
    """What a training step reads and returns: weights and optimiser state, in task order."""

    weights: tuple[Floats, ...]
    slots: tuple[Floats, ...]


@dataclass(frozen=True)
class Step:
    """The result of one step: the new state, the loss that was minimised (penalties included),
    and for loss and each metric the weighted sum over the batch, and the sum of the weights.
    """

    state: State
    loss: float
    sums: Floats
    counts: Floats


@dataclass(frozen=True)
class Evaluation:
    """How a model did on `examples` samples: the mean loss, and each metric by name."""

    examples: int
    loss: float
    metrics: dict[str, float]


class TaskRuntime:
    """A loaded task. Not safe for use by two threads at once."""

    def __init__(self, plan: Plan, *, num_threads: int = 1, prefer: str | None = None) -> None:
        """Load `plan`. `prefer`: `tflite-runtime` or `ai-edge-litert`; None picks by Python.

        Raises LocalError when no runtime is installed or the model does not load.
        """
        self.plan = plan
        self.task = plan.task
        self._num_threads = num_threads
        name, self._module = _load_module(prefer)
        self.runtime_name = f"{name} {_version(name)}"
        self._runners = self._load(delegates=True)

    def fresh_state(self, weights: Mapping[str, Array]) -> State:
        """Return the state a round starts from: `weights`, and a fresh optimiser.

        Raises PeerError `wrong_shape` when these are not the task's weights.
        """
        slots = tuple(
            np.full(slot.tensor.shape, slot.initial, np.float32)
            for slot in self.task.optimiser_state
        )
        return State(tuple(weights_of(self.task, weights)), slots)

    def train_step(
        self,
        state: State,
        inputs: Sequence[Array],
        labels: Array,
        sample_weight: Array | None,
        settings: Training,
        anchor: Sequence[Floats],
        seed: int,
    ) -> Step:
        """Train one batch of at most `batch_size` rows.

        `anchor` holds the weights the round started from (FedProx); `seed` draws the
        dropout masks. Rows missing from a short batch count nowhere: not in the loss,
        not in batch statistics.
        """
        task = self.task
        feed = self._batch(inputs, labels, sample_weight, task.batch_size)
        feed["rows"] = _scalar(len(labels))
        feed["learning_rate"] = _scalar(settings.learning_rate)
        feed["proximal_mu"] = _scalar(settings.proximal_mu)
        feed["clip_norm"] = _scalar(settings.clip_norm)
        feed.update(_named("r", draw_noise(task, seed)))
        feed.update(_named("w", state.weights))
        feed.update(_named("o", state.slots))
        feed.update(_named("a", anchor[: task.trainable_count]))
        out = self._run("train", feed)
        new = State(
            tuple(out[f"w{i}"] for i in range(len(task.weights))),
            tuple(out[f"o{i}"] for i in range(len(task.optimiser_state))),
        )
        return Step(new, float(out["loss"][0]), out["sums"], out["counts"])

    def evaluate(
        self,
        weights: Mapping[str, Array],
        samples: Samples,
        on_batch: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Return loss and metrics of `weights` on `samples`, as a weighted mean.

        `on_batch` is called after each batch.
        """
        task = self.task
        state = _named("w", weights_of(task, weights))
        sums = np.zeros(1 + len(task.metrics), np.float64)
        counts = np.zeros_like(sums)
        for part in _parts(len(samples), task.evaluation_batch_size):
            rows = None if samples.weights is None else samples.weights[part]
            inputs = [array[part] for array in samples.inputs]
            feed = self._batch(inputs, samples.labels[part], rows, task.evaluation_batch_size)
            out = self._run("evaluate", feed | state)
            sums += out["sums"]
            counts += out["counts"]
            on_batch()
        means = [float(s / c) if c > 0 else 0.0 for s, c in zip(sums, counts, strict=True)]
        return Evaluation(len(samples), means[0], dict(zip(task.metrics, means[1:], strict=True)))

    def infer(self, weights: Mapping[str, Array], inputs: Sequence[Array]) -> Array:
        """Return the model's outputs [rows, …] for `inputs`."""
        task = self.task
        state = _named("w", weights_of(task, weights))
        outputs = []
        for part in _parts(len(inputs[0]), task.evaluation_batch_size):
            rows = [_padded(array[part], task.evaluation_batch_size) for array in inputs]
            out = self._run("infer", _named("x", rows) | state)
            outputs.append(out["output"][: part.stop - part.start])
        return np.concatenate(outputs)

    def _batch(
        self, inputs: Sequence[Array], labels: Array, sample_weight: Array | None, size: int
    ) -> dict[str, Array]:
        rows = len(labels)
        weight = np.zeros(size, np.float32)
        weight[:rows] = 1.0 if sample_weight is None else sample_weight
        feed = _named("x", [_padded(array, size) for array in inputs])
        feed["y"] = _padded(labels, size)
        feed["sample_weight"] = weight
        return feed

    def _run(self, signature: str, feed: dict[str, Array]) -> dict[str, Array]:
        try:
            return self._runners[signature](**feed)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "gather index out of bounds" in str(error):
                raise LocalError(
                    f"the data has a token or index beyond those that the task "
                    f"{self.task.name!r} knows; look for it in the inputs and labels"
                ) from None
            if "delegate" not in str(error):
                raise
        # LiteRT's XNNPACK refuses some sums and products that its own kernels can do.
        self._runners = self._load(delegates=False)
        return self._runners[signature](**feed)  # type: ignore[no-any-return]

    def _load(self, *, delegates: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"num_threads": self._num_threads}
        if not delegates:
            kinds = self._module.OpResolverType
            options["experimental_op_resolver_type"] = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = self._module.Interpreter(model_content=self.plan.tflite, **options)
            return {
                name: self._interpreter.get_signature_runner(name)
                for name in ("train", "evaluate", "infer")
            }
        except (RuntimeError, ValueError) as error:
            if delegates and "delegate" in str(error):
                return self._load(delegates=False)
            raise LocalError(
                f"the task {self.task.name!r} does not load in {self.runtime_name}: "
                f"{str(error).splitlines()[0]}; build it again with this version of midge"
            ) from None


def draw_noise(task: Task, seed: int) -> list[Floats]:
    """Return the random tensors that one training step is fed. `seed`: 0 … 2**64-1.

    PCG64 gives the same numbers on every machine; the C library's generator does not.
    """
    if not task.noise:
        return []
    draw = np.random.Generator(np.random.PCG64(seed))
    return [
        draw.random(noise.shape, np.float32)
        if noise.kind == "uniform"
        else draw.standard_normal(noise.shape, np.float32)
        for noise in task.noise
    ]


def warm_up(model: bytes, *, num_threads: int = 1, prefer: str | None = None) -> None:
    """Load and run `model`, so that the runtime looks at the machine now.

    A process that gives up its rights does this before. Raises LocalError when no runtime
    is installed.
    """
    name, module = _load_module(prefer)
    _version(name)
    interpreter = module.Interpreter(model_content=model, num_threads=num_threads)
    interpreter.allocate_tensors()
    interpreter.invoke()
    for name in interpreter.get_signature_list():
        interpreter.get_signature_runner(name)


@functools.cache
def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _load_module(prefer: str | None) -> tuple[str, Any]:
    first = "tflite-runtime" if sys.version_info < (3, 12) else "ai-edge-litert"
    names = [prefer] if prefer else [first, *(name for name in _MODULES if name != first)]
    for name in names:
        try:
            module = importlib.import_module(_MODULES[name])
        except ImportError:
            continue
        if name == "tflite-runtime" and int(np.__version__.split(".")[0]) >= 2:
            raise LocalError(
                f"tflite-runtime needs numpy 1, and numpy {np.__version__} is installed: "
                "pip install 'numpy<2'"
            )
        return name, module
    raise LocalError(
        f"no TensorFlow Lite runtime is installed: pip install {names[0]} "
        "(or midge with its extra: pip install 'midge[device]')"
    )


def _scalar(value: float) -> Floats:
    return np.array([value], np.float32)


def _named(letter: str, arrays: Sequence[Array]) -> dict[str, Array]:
    return {f"{letter}{i}": array for i, array in enumerate(arrays)}


def _padded(array: Array, size: int) -> Array:
    """Repeat rows until there are `size`: values that the model might see anyway."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    return array.take(np.arange(size) % len(array), axis=0)


def _parts(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
