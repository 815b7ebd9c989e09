"""The demo from beginning to end."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from broker_bridge.errors import LinkError
from broker_bridge.link.local_broker import Engine
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Command, RoundSummary, Until
from broker_bridge.wire.topics import Topics
from server import screen
from server.demo import table
from server.demo.comparison import baselines, readable
from server.demo.stage import (
    Stage,
    examples,
    set_up,
    start_broker_and_server,
    start_people,
    wait,
)
from server.demo.traffic import Traffic

__all__ = ["run_demo"]


def run_demo(
    *,
    rounds: int,
    accuracy: float,
    keep: Path | None,
    engine: Engine | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Run the demo and print its table. Raises LocalError when a part will not start."""
    task_path = examples() / "wearables.task"
    with ExitStack() as stack:
        where = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="midge-demo-")))
        view = screen.progress(plain=plain or as_json, quiet=as_json)
        stage = set_up(where, stack, view.line)
        traffic = Traffic(Topics("demo"))
        eye = start_broker_and_server(stage, task_path, engine)
        stack.callback(eye.close)
        start_people(stage, eye, traffic)
        with stage.phase("rounds"), view:
            reason = _rounds(stage, eye, traffic, view, rounds=rounds, accuracy=accuracy)
        view.line(reason)
        with stage.phase("baselines"):
            view.line("training each person alone, and all pooled in one place, to compare")
            alone, pooled = baselines(task_path, epochs=_epochs(task_path, traffic))
        with stage.phase("looking for plaintext"):
            found = readable(stage.home, task_path, traffic.sealed)
        result = table.result_of(stage, traffic, alone, pooled, found)
    if as_json:
        print(json.dumps(result))
    else:
        table.show(result)


def _rounds(
    stage: Stage,
    eye: PahoLink,
    traffic: Traffic,
    view: screen.Progress,
    *,
    rounds: int,
    accuracy: float,
) -> str:
    """Start a run as any operator would, show it, and say why it ended."""
    command = Command(
        cmd="start", id="demo", task="wearables", rounds=rounds, until=Until(accuracy=accuracy)
    )
    wait(stage, eye, traffic, lambda: traffic.server_online, "the server")
    data = messages.encode_json(command)
    view.line(f"mosquitto_pub -t {traffic.topics.ctl} -m '{data.decode()}'")
    eye.publish(traffic.topics.ctl, data)
    shown, quiet_since = 0, time.monotonic()
    while True:
        if traffic.look(eye, 0.1):
            quiet_since = time.monotonic()
        if time.monotonic() - quiet_since > 120:
            raise LinkError(f"nothing happened for two minutes; see the logs in {stage.folder}")
        last = traffic.summaries[-1] if traffic.summaries else None
        _show(view, traffic, last, rounds)
        if last is None or len(traffic.summaries) == shown:
            continue
        shown = len(traffic.summaries)
        view.line(screen.summary_line(last))
        if last.evaluation.get("accuracy", 0.0) >= accuracy:
            return f"the model reached accuracy {accuracy:g} on people it has never seen"
        if last.state == "abandoned" or last.round >= rounds:
            return f"{last.round} rounds are done; accuracy {accuracy:g} was not reached"


def _show(view: screen.Progress, traffic: Traffic, last: RoundSummary | None, rounds: int) -> None:
    view.show(
        round_number=(last.round + 1) if last else 1,
        rounds=rounds,
        joined=len(traffic.joined),
        training=len(traffic.joined - traffic.sealed_by),
        uploaded=len(traffic.done),
        accuracy=(last.evaluation.get("accuracy") if last else None),
        sent_bytes=traffic.bytes_total,
    )


def _epochs(task_path: Path, traffic: Traffic) -> int:
    """As many epochs as the federation trained, so that all have seen their data as often."""
    plan, _ = decode_task(task_path.read_bytes())
    return plan.task.defaults.epochs * len(traffic.summaries)
