"""What the server does with the mean update: FedAvg, FedAvgM, FedAdam, FedYogi.

An optimiser is `init` + `apply`, as in FedJAX, and reads like the paper: x are the
weights, Δ the mean of the clients' updates, η the server's learning rate. State is a
set of float32 tensors, so it travels and is stored as weights are.

Tensors named in `plain` (batch-norm statistics and whatever else is not trained) are
always averaged plainly, x + Δ; a model's integer tensors stay as they are. Every step is
elementwise IEEE 754 arithmetic, so the same input gives the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.wire.weights import Tensors, TensorSpec

__all__ = ["OPTIMISERS", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "ServerOptimiser", "State"]

State = dict[str, NDArray[Any]]
_F64 = NDArray[np.float64]


class ServerOptimiser(Protocol):
    """An algorithm for the server's step."""

    def init(self, specs: Sequence[TensorSpec]) -> State:
        """The state before the first round."""

    def apply(self, weights: Tensors, mean_delta: Tensors, state: Tensors) -> tuple[State, State]:
        """The next weights and state, both new; `mean_delta` is what ExactSum.mean returns.

        Raises LocalError when a weight is no longer finite.
        """


@dataclass(frozen=True, kw_only=True)
class _Elementwise:
    """One rule for each value of each trained tensor, with `slots` of state beside it."""

    learning_rate: float
    plain: frozenset[str] = field(default_factory=frozenset)
    slots: ClassVar[tuple[str, ...]] = ()

    def _rule(self, delta: _F64, slots: list[_F64]) -> tuple[_F64, list[_F64]]:
        """The step to add to x (before η), and the next slots."""
        return delta, slots

    def _first(self) -> float:
        return 0.0

    def init(self, specs: Sequence[TensorSpec]) -> State:
        """The state before the first round."""
        trained = [s for s in specs if s.dtype == "float32" and s.name not in self.plain]
        return {
            f"{slot}/{spec.name}": np.full(spec.shape, self._first() if slot == "v" else 0, "f4")
            for slot in self.slots
            for spec in trained
        }

    def apply(self, weights: Tensors, mean_delta: Tensors, state: Tensors) -> tuple[State, State]:
        """The next weights and state, both new. Raises LocalError when a weight is not finite."""
        new_weights, new_state = dict(weights), dict(state)
        for name, delta32 in mean_delta.items():
            x, delta = weights[name].astype(np.float64), delta32.astype(np.float64)
            if name in self.plain:
                new_weights[name] = _rounded(name, x + delta)
                continue
            keys = [f"{slot}/{name}" for slot in self.slots]
            step, slots = self._rule(delta, [state[key].astype(np.float64) for key in keys])
            new_weights[name] = _rounded(name, x + self.learning_rate * step)
            for key, slot in zip(keys, slots, strict=True):
                new_state[key] = _rounded(key, slot)
        return new_weights, new_state


def _rounded(name: str, values: _F64) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        result = np.asarray(values, np.float32)  # of a scalar, NumPy would make a scalar
    if not np.isfinite(result).all():
        raise LocalError(
            f"the new model is not finite in {name!r}; lower the server's learning rate"
        )
    return result


@dataclass(frozen=True, kw_only=True)
class FedAvg(_Elementwise):
    """x ← x + η·Δ. With η = 1: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1."""

    learning_rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FedAvgM(_Elementwise):
    """Server momentum, Hsu et al. 2019 (arXiv:1909.06335): v ← β·v + Δ; x ← x + η·v."""

    learning_rate: float = 1.0
    momentum: float = 0.9
    slots: ClassVar[tuple[str, ...]] = ("m",)

    def _rule(self, delta: _F64, slots: list[_F64]) -> tuple[_F64, list[_F64]]:
        m = self.momentum * slots[0] + delta
        return m, [m]


@dataclass(frozen=True, kw_only=True)
class _Adaptive(_Elementwise):
    """Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2: all but the line for v.

    m ← β₁·m + (1-β₁)·Δ;  x ← x + η·m / (√v + τ);  v starts at τ².
    """

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    def _first(self) -> float:
        return self.tau**2

    def _second_moment(self, v: _F64, square: _F64) -> _F64:
        raise NotImplementedError

    def _rule(self, delta: _F64, slots: list[_F64]) -> tuple[_F64, list[_F64]]:
        m = self.beta_1 * slots[0] + (1 - self.beta_1) * delta
        v = self._second_moment(slots[1], np.square(delta))
        return m / (np.sqrt(v) + self.tau), [m, v]


@dataclass(frozen=True, kw_only=True)
class FedAdam(_Adaptive):
    """v ← β₂·v + (1-β₂)·Δ²."""

    def _second_moment(self, v: _F64, square: _F64) -> _F64:
        return self.beta_2 * v + (1 - self.beta_2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(_Adaptive):
    """v ← v - (1-β₂)·Δ²·sign(v - Δ²)."""

    def _second_moment(self, v: _F64, square: _F64) -> _F64:
        towards: _F64 = np.sign(v - square)
        return v - (1 - self.beta_2) * square * towards


OPTIMISERS: Mapping[str, Callable[..., ServerOptimiser]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
"""By the name that a configuration uses."""
