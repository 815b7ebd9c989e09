"""The server's half: FedAvg, and the time at which each round's mean was ready."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """Flower's own FedAvg that also writes down when it had aggregated."""

    def __init__(self, log: Path, nodes: int) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=nodes,
            min_available_nodes=nodes,
        )
        self._log = log

    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        with self._log.open("a") as file:
            file.write(f"{server_round} {time.monotonic()}\n")
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    draw = np.random.default_rng(1)
    arrays = [draw.standard_normal(int(config["parameters"])).astype(np.float32)]
    strategy = TimedFedAvg(Path(str(config["log"])), int(config["nodes"]))
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=int(config["rounds"]))
