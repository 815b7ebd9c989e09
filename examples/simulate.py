"""Train an example as a fleet would, but in one process: no broker, no encryption.

    python -m examples.simulate wearables

prints the accuracy of federated averaging (McMahan et al. 2017, weighted by examples),
of each device alone, and of all data pooled, on data that no device trained on.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Training, decode_task
from device_client.data import load_samples
from device_client.trainer import Trainer

Weights = Mapping[str, NDArray[Any]]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fleet:
    """Who trains, and what the result is tested on."""

    devices: tuple[str, ...]
    test: str
    rounds: int
    cohort: int = 0  # devices in each round, drawn at random; 0: all


def _person(number: int) -> str:
    return f"{_HERE}/wearables/source.py:person?id={number}"


def wearables(held_out: str = "9,10") -> Fleet:
    """Eight people train; the other two are strangers to the model."""
    strangers = {int(text) for text in held_out.split(",")}
    devices = tuple(_person(n) for n in range(1, 11) if n not in strangers)
    return Fleet(devices, f"{_HERE}/wearables/source.py:people?ids={held_out}", rounds=20)


def digits() -> Fleet:
    """Ten devices of two shards each: most have never seen most digits."""
    source = f"{_HERE}/digits/source.py"
    return Fleet(tuple(f"{source}:device?id={n}" for n in range(1, 11)), f"{source}:test", 30)


def mnist(split: str = "iid") -> Fleet:
    """A hundred devices, ten in each round; `split` is iid or shards."""
    source = f"{_HERE}/mnist/source.py"
    devices = tuple(f"{source}:device?id={n}&split={split}" for n in range(1, 101))
    return Fleet(devices, f"{source}:test", rounds=50, cohort=10)


def keyboard() -> Fleet:
    """One of Shakespeare's roles on each device, ten in each round."""
    source = f"{_HERE}/keyboard/source.py"
    with np.load(_HERE / "keyboard" / "keyboard.npz", allow_pickle=False) as data:
        roles = len(data["role"])
    devices = tuple(f"{source}:role?id={n}" for n in range(roles))
    return Fleet(devices, f"{source}:test", rounds=30, cohort=10)


def turbines() -> Fleet:
    """Four wind turbines in 2014; tested on 2015."""
    source = f"{_HERE}/turbines/source.py"
    devices = tuple(f"{source}:turbine?id={n}" for n in range(1, 5))
    return Fleet(devices, f"{source}:test", rounds=10)


def aircraft() -> Fleet:
    """A hundred aircraft, twenty in each round; tested on others."""
    source = f"{_HERE}/aircraft/source.py"
    devices = tuple(f"{source}:aircraft?id={n}" for n in range(100))
    return Fleet(devices, f"{source}:test", rounds=30, cohort=20)


FLEETS: dict[str, Callable[..., Fleet]] = {
    "wearables": wearables,
    "digits": digits,
    "mnist": mnist,
    "keyboard": keyboard,
    "turbines": turbines,
    "aircraft": aircraft,
}


def average(updates: Sequence[tuple[Weights, int]]) -> dict[str, NDArray[Any]]:
    """Return the mean of the weights, weighted by examples."""
    total = sum(examples for _, examples in updates)
    return {
        name: sum(w[name].astype(np.float64) * (n / total) for w, n in updates).astype(np.float32)
        for name in updates[0][0]
    }


def federate(
    trainers: Sequence[Trainer],
    weights: Weights,
    settings: Training,
    rounds: int,
    seed: int,
    *,
    cohort: int = 0,
) -> list[Weights]:
    """Return the model after each round; `cohort` devices take part in each, or all."""
    draw = np.random.default_rng(seed)
    models: list[Weights] = []
    for number in range(rounds):
        updates = []
        for place in sorted(draw.permutation(len(trainers))[: cohort or None].tolist()):
            trained = trainers[place].train(weights, settings, seed=seed + 1000 * number + place)
            assert trained is not None
            updates.append((trained.weights, trained.examples))
        weights = average(updates)
        models.append(weights)
    return models


def main() -> None:
    """Parse the command line, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=FLEETS)
    parser.add_argument("--held-out", help="whom to test on, as in 9,10 (wearables)")
    parser.add_argument("--split", choices=["iid", "shards"], help="(mnist)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    choice = given.held_out or given.split
    fleet = FLEETS[given.example](*([choice] if choice else []))
    plan, initial = decode_task((_HERE / given.example / f"{given.example}.task").read_bytes())
    runtime = TaskRuntime(plan)
    samples = [load_samples(spec, plan.task) for spec in fleet.devices]
    test = load_samples(fleet.test, plan.task)
    metric = plan.task.metrics[0]

    def score(weights: Weights) -> float:
        return runtime.evaluate(weights, test).metrics[metric]

    def alone(data: Samples) -> float:
        """Train as many epochs as a device that takes part in its share of the rounds."""
        share = (fleet.cohort or len(fleet.devices)) / len(fleet.devices)
        epochs = max(1, round(settings.epochs * fleet.rounds * share))
        long = msgspec.structs.replace(settings, epochs=epochs)
        trained = Trainer(runtime, data).train(initial, long, seed=given.seed)
        assert trained is not None
        return score(trained.weights)

    settings = plan.task.defaults
    trainers = [Trainer(runtime, data) for data in samples]
    models = federate(trainers, initial, settings, fleet.rounds, given.seed, cohort=fleet.cohort)
    scores = [score(w) for w in models]
    print(f"{given.example}: {len(trainers)} devices, {metric} on {fleet.test.split(':')[-1]}")
    print("federated, by round: " + " ".join(f"{value:.3f}" for value in scores))
    print(f"federated, after round {fleet.rounds}: {scores[-1]:.3f}")
    each = sorted(alone(data) for data in samples[:10])
    print(f"alone ({len(each)} devices): {each[0]:.3f} … mean {np.mean(each):.3f} … {each[-1]:.3f}")
    print(f"pooled: {alone(pooled(samples)):.3f}")


def pooled(parts: Sequence[Samples]) -> Samples:
    """Return all samples together."""
    inputs = zip(*(samples.inputs for samples in parts), strict=True)
    return Samples(tuple(map(np.concatenate, inputs)), np.concatenate([s.labels for s in parts]))


if __name__ == "__main__":
    main()
