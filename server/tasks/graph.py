"""Build the three functions of a task from a Keras model, its objective and its rule.

    train(x…, y, sample_weight, rows, learning_rate, proximal_mu, clip_norm, r…, w…, o…, a…)
        -> loss[1], sums, counts, w…, o…
    evaluate(x…, y, sample_weight, w…) -> sums, counts
    infer(x…, w…) -> output

State goes in and comes out: the graph holds no weights, except those of frozen layers.
Every scalar has shape [1] (a scalar of rank 0 crashes LiteRT on aarch64), and every
batch is static (much of TensorFlow Lite lowers only then).
"""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Noise, Slot
from broker_bridge.wire.weights import TensorSpec
from server.tasks.advice import refuse_losses_from_data
from server.tasks.gradients import builtin_gradients
from server.tasks.objectives import Objective
from server.tasks.optimisers import Rule
from server.tasks.tracing import NoiseFeed, call, convertible

__all__ = ["Graph", "graph_of", "travelling_shape", "unique_names"]


@dataclass(frozen=True)
class Graph:
    """The traced functions, and what they take: see the task header for each field."""

    functions: dict[str, Any]
    variables: tuple[Any, ...]  # the Keras variables behind `weights`
    weights: tuple[TensorSpec, ...]
    initial: dict[str, Any]
    trainable_count: int
    noise: tuple[Noise, ...]
    slots: tuple[Slot, ...]


class _Builder:
    """Holds what the three functions share while they are traced."""

    def __init__(
        self, model: Any, objective: Objective, rule: Rule, inputs: tuple[TensorSpec, ...]
    ) -> None:
        self.model = model
        self.objective = objective
        self.rule = rule
        self.inputs = inputs
        self.trainable = list(model.trainable_variables)
        self.others = list(model.non_trainable_variables)
        self._frozen = [v.numpy() for v in self.others]
        # Filled by `probe`: the places, in `others`, of statistics that training changes.
        self.moving: list[int] = []
        self.noise: tuple[Noise, ...] = ()

    def probe(self, batch_size: int) -> None:
        """Trace once to see which statistics change and which random numbers are wanted."""

        def forward(*inputs: Any) -> Any:
            feed = NoiseFeed()
            before = [tf.convert_to_tensor(v.value) for v in self.others]
            trainable = [tf.convert_to_tensor(v.value) for v in self.trainable]
            with convertible(self.model, feed):
                output, after, _ = call(self.model, trainable, before, list(inputs), training=True)
            self.moving = [
                i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new
            ]
            self.noise = tuple(feed.wanted)
            return output

        tf.function(forward, autograph=False).get_concrete_function(*self._input_specs(batch_size))
        for i in self.moving:
            if self.others[i].dtype != "float32":
                raise LocalError(
                    f"the state {self.others[i].path} is {self.others[i].dtype}: what training "
                    "changes must be float32, so that devices' values can be averaged"
                )

    @property
    def travelling(self) -> list[Any]:
        return [*self.trainable, *(self.others[i] for i in self.moving)]

    def split(self, weights: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return (trainable, all non-trainable): frozen ones as constants."""
        own = [tf.reshape(w, v.shape) for w, v in zip(weights, self.travelling, strict=True)]
        others = [tf.constant(value) for value in self._frozen]
        for place, value in zip(self.moving, own[len(self.trainable) :], strict=True):
            others[place] = value
        return own[: len(self.trainable)], others

    def weight_specs(self) -> dict[str, Any]:
        return _specs("w", [travelling_shape(v) for v in self.travelling])

    def train(self, batch_size: int) -> Any:
        weights = self.weight_specs()
        slots = _specs("o", [s.tensor.shape for s in self.slots()])
        noise = _specs("r", [n.shape for n in self.noise])
        anchors = _specs("a", [travelling_shape(v) for v in self.trainable])
        arguments = self._batch_specs(batch_size) | {
            name: tf.TensorSpec([1], tf.float32, name)
            for name in ("rows", "learning_rate", "proximal_mu", "clip_norm")
        }

        def train(**feed: Any) -> dict[str, Any]:
            with builtin_gradients():
                return self._step(feed)

        arguments = arguments | noise | weights | slots | anchors
        return tf.function(train, autograph=False).get_concrete_function(**arguments)

    def _step(self, feed: dict[str, Any]) -> dict[str, Any]:
        fed = _take(feed, "w")
        weights, others = self.split(fed)
        present = _present(feed)
        with convertible(self.model, NoiseFeed(_take(feed, "r")), present=present):
            output, after, penalties = call(
                self.model, weights, others, _take(feed, "x"), training=True
            )
            sums, counts = self.objective.sums(feed["y"], output, feed["sample_weight"])
            loss = self.objective.batch_loss(feed["y"], output, feed["sample_weight"], present)
        refuse_losses_from_data(self.model, penalties, _take(feed, "x"))
        loss = tf.add_n([loss, *map(tf.reduce_sum, penalties)])
        gradients = _clipped(self._gradients(loss, weights), feed["clip_norm"])
        fed = fed[: len(weights)]
        gradients = [
            tf.reshape(g, w.shape) + (w - a) * feed["proximal_mu"]
            for g, w, a in zip(gradients, fed, _take(feed, "a"), strict=True)
        ]
        moved, slots = self.rule.apply(
            fed, gradients, _take(feed, "o"), feed["learning_rate"], self.trainable
        )
        statistics = [tf.reshape(after[i], travelling_shape(self.others[i])) for i in self.moving]
        new = {f"w{i}": value for i, value in enumerate([*moved, *statistics])}
        new |= {f"o{i}": value for i, value in enumerate(slots)}
        return {"loss": tf.reshape(loss, [1]), "sums": sums, "counts": counts} | new

    def _gradients(self, loss: Any, weights: list[Any]) -> list[Any]:
        gradients = tf.gradients(loss, weights)
        for variable, gradient in zip(self.trainable, gradients, strict=True):
            if gradient is None:
                raise LocalError(
                    f"the loss does not depend on the weight {variable.path}: set "
                    "trainable = False on its layer, or remove it"
                )
        return [tf.convert_to_tensor(g) for g in gradients]  # sparse ones become dense

    def evaluate(self, batch_size: int) -> Any:
        weights = self.weight_specs()

        def evaluate(**feed: Any) -> dict[str, Any]:
            trainable, others = self.split(_take(feed, "w"))
            counted = tf.cast(tf.cast(feed["sample_weight"], tf.bool), tf.float32)
            with convertible(self.model, NoiseFeed(), present=counted):
                output, _, penalties = call(
                    self.model, trainable, others, _take(feed, "x"), training=False
                )
                sums, counts = self.objective.sums(feed["y"], output, feed["sample_weight"])
            if penalties:
                penalty = tf.add_n([tf.reduce_sum(p) for p in penalties]) * counts[0]
                sums = tf.concat([[sums[0] + penalty], sums[1:]], 0)
            return {"sums": sums, "counts": counts}

        arguments = self._batch_specs(batch_size) | weights
        return tf.function(evaluate, autograph=False).get_concrete_function(**arguments)

    def infer(self, batch_size: int) -> Any:
        weights = self.weight_specs()

        def infer(**feed: Any) -> dict[str, Any]:
            trainable, others = self.split(_take(feed, "w"))
            with convertible(self.model, NoiseFeed()):
                output, _, _ = call(self.model, trainable, others, _take(feed, "x"), training=False)
            return {"output": tf.identity(output)}

        inputs = {spec.name: spec for spec in self._input_specs(batch_size)}
        return tf.function(infer, autograph=False).get_concrete_function(**inputs, **weights)

    def slots(self) -> tuple[Slot, ...]:
        """Return the optimiser's tensors, weight by weight, then the step counter."""
        paths = unique_names([v.path for v in self.trainable])
        slots = [
            Slot(TensorSpec(f"{path}/{name}", "float32", travelling_shape(v)), self.rule.initial)
            for path, v in zip(paths, self.trainable, strict=True)
            for name in self.rule.slots
        ]
        if self.rule.counts_steps:
            slots.append(Slot(TensorSpec("steps", "float32", (1,))))
        return tuple(slots)

    def _input_specs(self, batch_size: int) -> list[Any]:
        return [
            tf.TensorSpec([batch_size, *spec.shape], spec.dtype, f"x{i}")
            for i, spec in enumerate(self.inputs)
        ]

    def _batch_specs(self, batch_size: int) -> dict[str, Any]:
        label = self.objective.label
        specs = {spec.name: spec for spec in self._input_specs(batch_size)}
        specs["y"] = tf.TensorSpec([batch_size, *label.shape], label.dtype, "y")
        specs["sample_weight"] = tf.TensorSpec([batch_size], tf.float32, "sample_weight")
        return specs


def graph_of(
    model: Any,
    objective: Objective,
    rule: Rule,
    inputs: tuple[TensorSpec, ...],
    *,
    batch_size: int,
    evaluation_batch_size: int,
) -> Graph:
    """Trace the three functions. Raises LocalError for a model that cannot be trained."""
    builder = _Builder(model, objective, rule, inputs)
    builder.probe(batch_size)
    functions = {
        "train": builder.train(batch_size),
        "evaluate": builder.evaluate(evaluation_batch_size),
        "infer": builder.infer(evaluation_batch_size),
    }
    _refuse_frozen_randomness(functions["train"])
    variables = tuple(builder.travelling)
    names = unique_names([v.path for v in variables])
    initial = {
        name: v.numpy().reshape(travelling_shape(v))
        for name, v in zip(names, variables, strict=True)
    }
    specs = tuple(TensorSpec(name, "float32", a.shape) for name, a in initial.items())
    return Graph(
        functions,
        variables,
        specs,
        initial,
        len(builder.trainable),
        builder.noise,
        builder.slots(),
    )


def _refuse_frozen_randomness(function: Any) -> None:
    definition = function.graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    for node in nodes:
        if node.op.startswith(("Random", "StatelessRandom", "Multinomial")):
            raise LocalError(
                f"{node.op} in {node.name.rpartition('/')[0] or 'the model'} would draw the same "
                "numbers on every device, at every start: use keras.random instead of tf.random"
            )


def unique_names(names: list[str]) -> list[str]:
    """Number what a user-written layer named twice."""
    return [
        name if names.count(name) == 1 else f"{name}_{names[:place].count(name)}"
        for place, name in enumerate(names)
    ]


def _take(feed: dict[str, Any], letter: str) -> list[Any]:
    """Return the arguments letter0, letter1, … in order."""
    found: list[Any] = []
    while f"{letter}{len(found)}" in feed:
        found.append(feed[f"{letter}{len(found)}"])
    return found


def travelling_shape(variable: Any) -> tuple[int, ...]:
    """Return the shape in which `variable` travels: a scalar as [1]."""
    return tuple(variable.shape) or (1,)


def _specs(letter: str, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    return {
        f"{letter}{i}": tf.TensorSpec(shape, tf.float32, f"{letter}{i}")
        for i, shape in enumerate(shapes)
    }


def _present(feed: dict[str, Any]) -> Any:
    """Return [batch]: 1 for the first `rows` rows, 0 for those that fill up a short batch."""
    size = feed["sample_weight"].shape[0]
    counting = tf.range(size, dtype=tf.float32)
    return tf.minimum(tf.maximum(feed["rows"] - counting, 0.0), 1.0)


def _square_sum(x: Any) -> Any:
    """Return Σ x², rows first: the device adds one by one, and loses digits over a million."""
    x = tf.reshape(x * x, [-1, x.shape[-1] if x.shape.rank else 1])
    return tf.reduce_sum(tf.reduce_sum(x, axis=1))


def _clipped(gradients: list[Any], bound: Any) -> list[Any]:
    """Scale `gradients` to a global norm of at most `bound` [1]; 0 means no bound."""
    norm = tf.sqrt(tf.add_n([_square_sum(g) for g in gradients]))
    scale = tf.minimum(bound / tf.maximum(norm, 1e-12), 1.0)
    on = tf.cast(tf.cast(bound, tf.bool), tf.float32)
    scale = scale * on + (1.0 - on)
    return [g * scale for g in gradients]
