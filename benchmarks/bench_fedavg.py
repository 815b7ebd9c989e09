"""McMahan et al. 2017 (arXiv 1602.05629), Table 2: rounds of FedAvg to 97 % on MNIST.

The 2NN, 100 devices of 600 digits, C = 0.1, E = 1, B = 10; dealt at random, or two shards of
one label each. Local training by the device's trainer on TensorFlow Lite, sums by the server's
aggregation, all in one process. The learning rate is the task's for IID, and half of it for shards
(the paper tuned it for each cell). As in the paper, accuracy is made monotone: the first
round at which the best so far reaches 97 %.

    python -m benchmarks.bench_fedavg [--seeds 3] [--rounds 600] [--split iid|shards|both]
"""

import argparse
import time
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.machine import Spread, header, table
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire.weights import encode
from device_client.data import load_samples
from device_client.trainer import Trainer
from examples.simulate import mnist
from server.aggregation.exact import ExactSum
from server.aggregation.optimisers import FedAvg

TARGET = 0.97
PAPER = {"iid": 87, "shards": 664}
RATES = {"iid": 0.1, "shards": 0.05}


def rounds_to_target(split: str, seed: int, limit: int) -> tuple[int | None, float, float]:
    """Return (round that reached the target, best accuracy, seconds)."""
    plan, weights = decode_task(Path("examples/mnist/mnist.task").read_bytes())
    runtime = TaskRuntime(plan)
    fleet = mnist(split)
    specs = [f"{spec}&seed={seed}" for spec in fleet.devices]
    trainers = [Trainer(runtime, load_samples(spec, plan.task)) for spec in specs]
    test = load_samples(fleet.test, plan.task)
    settings = msgspec.structs.replace(plan.task.defaults, learning_rate=RATES[split])
    optimiser = FedAvg()
    state = optimiser.init(plan.task.weights)
    draw, best, started = np.random.default_rng(seed), 0.0, time.perf_counter()
    for number in range(1, limit + 1):
        total = ExactSum(plan.task.weights, fraction_bits=32)
        for place in draw.permutation(len(trainers))[: fleet.cohort]:
            trained = trainers[place].train(
                weights, settings, seed=seed * 1_000_000 + number * 100 + int(place)
            )
            assert trained is not None
            deltas = {name: trained.weights[name] - weights[name] for name in weights}
            total.add(encode(deltas), trained.examples)
        weights, state = optimiser.apply(weights, total.mean(), state)
        best = max(best, runtime.evaluate(weights, test).metrics["accuracy"])
        if best >= TARGET:
            return number, best, time.perf_counter() - started
    return None, best, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--split", choices=["iid", "shards", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.rounds = 1, 15
    header("FedAvg on MNIST: the 2NN, C = 0.1, E = 1, B = 10, to 97 %")
    rows = []
    for split in ("iid", "shards") if given.split == "both" else (given.split,):
        found = [rounds_to_target(split, seed, given.rounds) for seed in range(1, given.seeds + 1)]
        reached = [float(number) for number, _, _ in found if number is not None]
        rows.append(
            [
                split,
                Spread.of(reached).text() if reached else "not reached",
                ", ".join("-" if number is None else str(number) for number, _, _ in found),
                f"{max(best for _, best, _ in found):.4f}",
                f"{sum(s for _, _, s in found):.0f}",
                str(PAPER[split]),
            ]
        )
    table(["split", "rounds to 97 %", "each seed", "best", "seconds", "McMahan 2017"], rows)


if __name__ == "__main__":
    main()
