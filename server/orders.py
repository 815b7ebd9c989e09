"""What an operator asks for, and what is answered. Pure."""

from broker_bridge.wire.messages import Command, Reply
from server.events import Respond, Rules, Run

__all__ = ["answer", "ordered_run", "out_of_turn", "refusal"]

_ROUNDS_UNTIL = 1000  # of a run that ends when the model is good, if nobody says how many
_WITHOUT_A_RUN = {
    "stop": "no run is open; there is nothing to stop",
    "pause": 'no run is open; send {"cmd":"start"} first',
    "resume": 'no run is open; send {"cmd":"start"} first',
}


def out_of_turn(command: Command, run: Run | None) -> str | None:
    """Why nothing comes of a command while `run` is open, or while none is; None: something may."""
    if run is None:
        return _WITHOUT_A_RUN.get(command.cmd)
    if command.cmd == "start":
        return (
            f"run {run.id} of task {run.task!r} is open; "
            'wait for it to end or send {"cmd":"stop"}'
        )
    return None


def ordered_run(command: Command, rules: Rules) -> Run | str:
    """The run that a `start` asks for, or why it cannot be: a sentence for a person."""
    target = command.target or rules.target
    quorum = command.quorum or rules.quorum
    if quorum < rules.quorum:
        return f"the quorum {quorum} is below this server's {rules.quorum}"
    if target and quorum > target:
        return f"the quorum {quorum} is more than the target {target}"
    return Run(
        id=0,
        task=command.task or "",
        rounds=command.rounds or (1 if command.until is None else _ROUNDS_UNTIL),
        until=command.until,
        target=target,
        quorum=quorum,
        deadline_s=command.deadline_s or rules.deadline_s,
    )


def answer(command: Command, *, status: dict[str, object] | None = None) -> Respond:
    """It is done."""
    return Respond(Reply(ok=True, cmd=command.cmd, id=command.id, status=status))


def refusal(command: Command, sentence: str) -> Respond:
    """It is not done, and what to do instead."""
    return Respond(Reply(ok=False, cmd=command.cmd, id=command.id, error=sentence))
