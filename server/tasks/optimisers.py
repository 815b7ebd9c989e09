"""Update rules as pure functions: (weights, gradients, state, rate) -> (weights, state).

The rules and hyperparameters are those of the Keras optimisers of the same name, so a
task trains to the numbers of `model.fit`. Adam: arXiv 1412.6980. AdamW: arXiv
1711.05101. Adagrad: JMLR 12 (2011). RMSprop: Hinton's lecture 6e. Momentum in
Nesterov's form: Sutskever et al. 2013.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from broker_bridge.errors import LocalError

__all__ = ["Rule", "rule_of"]

# gradient, weight, rate, its slots, step number -> change of the weight, new slots
Update = Callable[[Any, Any, Any, list[Any], Any], tuple[Any, list[Any]]]


@dataclass(frozen=True)
class Rule:
    """One optimiser: how many slots of state each weight has, and what a step does."""

    name: str
    slots: tuple[str, ...]
    update: Update
    initial: float = 0.0
    counts_steps: bool = False
    weight_decay: float = 0.0
    decays: Callable[[Any], bool] = lambda _variable: True  # this Keras variable
    clip_norm: float = 0.0  # a default for the task: the device may be told another

    def apply(
        self,
        weights: list[Any],
        gradients: list[Any],
        state: list[Any],
        rate: Any,
        variables: list[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Return the new weights and state. `state`: slot by slot for each weight, then steps.

        `variables` are the Keras variables behind `weights`: each has its constraint, and says
        whether it decays.
        """
        steps = state[-1] + 1.0 if self.counts_steps else None
        new_weights, new_state = [], []
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            own = state[index * len(self.slots) : (index + 1) * len(self.slots)]
            if self.weight_decay and self.decays(variables[index]):
                weight = weight - weight * self.weight_decay * rate
            change, slots = self.update(gradient, weight, rate, own, steps)
            new_weights.append(_constrained(weight + change, variables[index]))
            new_state.extend(slots)
        return new_weights, [*new_state, steps] if self.counts_steps else new_state


def _constrained(weight: Any, variable: Any) -> Any:
    """Return `weight` within the bounds that its layer sets, as Keras does after each step."""
    if variable.constraint is None:
        return weight
    within = variable.constraint(tf.reshape(weight, variable.shape))
    return tf.reshape(within, weight.shape)


def rule_of(optimiser: Any) -> Rule:
    """Return the rule of a Keras optimiser.

    Raises LocalError, with what to use instead, for one that a device cannot follow.
    """
    config = optimiser.get_config()
    _refuse_extras(config)
    kind = type(optimiser).__name__
    if kind not in _RULES:
        raise LocalError(
            f"the optimiser {kind} is not supported on devices: use one of {', '.join(_RULES)}"
        )
    name, slots, update, initial, counts = _RULES[kind](config)
    return Rule(
        name,
        slots,
        update,
        initial=initial,
        counts_steps=counts,
        weight_decay=float(config.get("weight_decay") or 0.0),
        decays=optimiser._use_weight_decay,
        clip_norm=float(config.get("global_clipnorm") or 0.0),
    )


def _refuse_extras(config: dict[str, Any]) -> None:
    if not isinstance(config.get("learning_rate"), int | float):
        raise LocalError(
            "the learning rate is a schedule: give a number, and change it from round to "
            "round with the `learning_rate` of the round"
        )
    for option, advice in {
        "clipnorm": "use global_clipnorm",
        "clipvalue": "use global_clipnorm",
        "use_ema": "average on the server instead",
        "loss_scale_factor": "training is float32, which needs none",
        "gradient_accumulation_steps": "use a larger batch",
    }.items():
        if config.get(option):
            raise LocalError(f"the optimiser's {option} is not supported on devices: {advice}")


Parts = tuple[str, tuple[str, ...], Update, float, bool]


def _sgd(config: dict[str, Any]) -> Parts:
    momentum, nesterov = float(config["momentum"]), bool(config["nesterov"])

    def plain(g: Any, _w: Any, rate: Any, _slots: list[Any], _t: Any) -> Any:
        return -(g * rate), []

    def heavy(g: Any, _w: Any, rate: Any, slots: list[Any], _t: Any) -> Any:
        step = g * rate
        velocity = slots[0] * momentum - step
        change = velocity * momentum - step if nesterov else velocity
        return change, [velocity]

    if not momentum:
        return "sgd", (), plain, 0.0, False
    return "nesterov" if nesterov else "momentum", ("velocity",), heavy, 0.0, False


def _adam(config: dict[str, Any]) -> Parts:
    beta1, beta2 = float(config["beta_1"]), float(config["beta_2"])
    epsilon, amsgrad = float(config["epsilon"]), bool(config["amsgrad"])

    def update(g: Any, _w: Any, rate: Any, slots: list[Any], t: Any) -> Any:
        mean, square, *highest = slots
        power1, power2 = tf.pow(tf.constant([beta1]), t), tf.pow(tf.constant([beta2]), t)
        alpha = rate * tf.sqrt(1.0 - power2) / (1.0 - power1)
        mean = mean + (g - mean) * (1.0 - beta1)
        square = square + (g * g - square) * (1.0 - beta2)
        if amsgrad:
            highest = [tf.maximum(highest[0], square)]
        scale = tf.sqrt(highest[0] if amsgrad else square) + epsilon
        return -(mean * alpha / scale), [mean, square, *highest]

    slots = ("mean", "square", "highest") if amsgrad else ("mean", "square")
    return "adam", slots, update, 0.0, True


def _adamw(config: dict[str, Any]) -> Parts:
    """Adam, and the weight decay that every rule here can have."""
    return ("adamw", *_adam(config)[1:])


def _rmsprop(config: dict[str, Any]) -> Parts:
    rho, momentum = float(config["rho"]), float(config["momentum"])
    epsilon, centered = float(config["epsilon"]), bool(config["centered"])

    def update(g: Any, _w: Any, rate: Any, slots: list[Any], _t: Any) -> Any:
        own = dict(zip(names, slots, strict=True))
        own["square"] = own["square"] * rho + g * g * (1.0 - rho)
        spread = own["square"]
        if centered:
            own["mean"] = own["mean"] * rho + g * (1.0 - rho)
            spread = spread - own["mean"] * own["mean"]
        change = -(g * rate / tf.sqrt(spread + epsilon))
        if momentum:
            own["velocity"] = own["velocity"] * momentum - change
            change = -own["velocity"]
        return change, [own[name] for name in names]

    wanted = {"square": True, "mean": centered, "velocity": bool(momentum)}
    names = tuple(name for name, yes in wanted.items() if yes)
    return "rmsprop", names, update, 0.0, False


def _adagrad(config: dict[str, Any]) -> Parts:
    epsilon = float(config["epsilon"])

    def update(g: Any, _w: Any, rate: Any, slots: list[Any], _t: Any) -> Any:
        total = slots[0] + g * g
        return -(g * rate / tf.sqrt(total + epsilon)), [total]

    return "adagrad", ("total",), update, float(config["initial_accumulator_value"]), False


_RULES = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
}
