"""Which numbers an input may hold: those that every table it looks up has a row for.

A number beyond is refused before training, with its row; in TensorFlow Lite it would stop
the step, or, below zero, count from the table's end. Found in the traced graph, so through
nested models and layers of the user's own. An input that is looked up only in part (one
column of several) has no range: the other columns may hold anything.
"""

from typing import Any

import tensorflow as tf

__all__ = ["token_ranges"]

# Ops whose output holds the numbers of this input, all of them, and no others.
_SAME = {"Cast": 0, "Reshape": 0, "Identity": 0, "ExpandDims": 0, "Squeeze": 0, "Transpose": 0}
_OR_FROM_THE_END = {"SelectV2": 2, "Select": 2}  # Keras: where(i < 0, i + rows, i)
_FROM = _SAME | _OR_FROM_THE_END


def token_ranges(function: Any, count: int) -> tuple[tuple[float, float] | None, ...]:
    """Return for each input x0 … of a traced `function` its range, inclusive, or None."""
    rows: dict[str, int] = {}
    for op in function.graph.get_operations():
        if op.type != "GatherV2":
            continue
        axis = tf.get_static_value(op.inputs[2])
        size = None if axis is None else op.inputs[0].shape[int(axis)]
        name = _origin(op.inputs[1].op)
        if size is not None:
            rows[name] = min(size, rows.get(name, size))
    names = [f"x{i}" for i in range(count)]
    return tuple((0.0, rows[name] - 1.0) if name in rows else None for name in names)


def _origin(op: Any) -> str:
    """Return the name of the op that the numbers come from, unchanged."""
    while op.type in _FROM:
        op = op.inputs[_FROM[op.type]].op
    return str(op.name)
