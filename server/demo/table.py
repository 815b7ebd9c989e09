"""The closing table: what came of it, what it cost, what the broker could read."""

from typing import Any

from broker_bridge.errors import LocalError
from server import screen
from server.demo.stage import TRAINING, Stage
from server.demo.traffic import Traffic

__all__ = ["result_of", "show"]


def result_of(
    stage: Stage, traffic: Traffic, alone: list[float], pooled: float, readable: int
) -> dict[str, Any]:
    """All figures, as JSON types. Raises LocalError when no round was completed."""
    closed = [s for s in traffic.summaries if s.state == "closed"]
    if not closed:
        raise LocalError(f"no round was completed; see the logs in {stage.folder}")
    people = [f"person-{p}" for p in TRAINING]
    rounds = len(closed)
    return {
        "rounds": rounds,
        "accuracy": {
            "federated": closed[-1].evaluation.get("accuracy", 0.0),
            "alone_mean": sum(alone) / len(alone),
            "alone_best": max(alone),
            "pooled": pooled,
        },
        "bytes_per_device_and_round": {
            "up": sum(traffic.up[p] for p in people) // len(people) // rounds,
            "down": sum(traffic.down[p] for p in people) // len(people) // rounds
            + traffic.retained_bytes // rounds,
            "update_float32": closed[-1].update_bytes,
        },
        "seconds_per_round": {
            "total": sum(s.round_s for s in closed) / rounds,
            "training": sum(s.train_s_max for s in closed) / rounds,
        },
        "broker": {
            "sealed_bytes_seen": sum(len(p) for p in traffic.sealed),
            "plaintext_windows_found": readable,
        },
        "phases_s": stage.phases,
        "held_out_samples": closed[-1].evaluation_examples,
    }


def show(result: dict[str, Any]) -> None:
    """Print it."""
    accuracy, size = result["accuracy"], result["bytes_per_device_and_round"]
    seconds, broker = result["seconds_per_round"], result["broker"]
    found = broker["plaintext_windows_found"]
    seen = screen.human_bytes(broker["sealed_bytes_seen"])
    rows = [
        ["accuracy, federated", f"{accuracy['federated']:.3f}",
         f"8 people, {result['rounds']} rounds, on {result['held_out_samples']} samples of 2 more"],
        ["accuracy, alone", f"{accuracy['alone_mean']:.3f}",
         f"mean of 8 people, each for itself (best {accuracy['alone_best']:.3f})"],
        ["accuracy, pooled", f"{accuracy['pooled']:.3f}", "all 8 people's data in one place"],
        ["up, per device and round", screen.human_bytes(size["up"]),
         f"raw float32 update: {screen.human_bytes(size['update_float32'])}"],
        ["down, per device and round", screen.human_bytes(size["down"]),
         "the model once, and the task once in all"],
        ["time per round", f"{seconds['total']:.2f} s",
         f"of it training {seconds['training']:.2f} s (the slowest device)"],
        ["what the broker could read", "nothing" if not found else f"{found} PIECES",
         f"no piece of task, model or update in {seen} sealed bytes it carried"],
    ]  # fmt: skip
    screen.table(["", "", ""], rows, title="closing table")
