from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Standardise, Task, Window
from broker_bridge.wire.weights import TensorSpec
from device_client.data import load_samples

TASK = Task(
    name="small",
    batch_size=4,
    evaluation_batch_size=4,
    inputs=(TensorSpec("x", "float32", (2,)),),
    label=TensorSpec("y", "int32", ()),
    label_range=(0, 1),
    label_names=("rest", "move"),
    output=TensorSpec("out", "float32", (2,)),
    weights=(TensorSpec("w", "float32", (2, 2)),),
    trainable_count=1,
    optimiser="sgd",
    loss="sparse_categorical_crossentropy",
    tflite_digest="",
    tflite_bytes=0,
    weights_digest="",
    weights_bytes=0,
)
WINDOWED = msgspec.structs.replace(
    TASK,
    inputs=(TensorSpec("x", "float32", (2, 2)),),
    preprocessing=(Window(samples=2, hop=1), Standardise((0.0, 0.0), (2.0, 2.0))),
)
SOURCE = """
import numpy as np
from broker_bridge.task.samples import Samples
X, Y = np.zeros((3, 2)), np.array([0, 1, 0])
def plain(): return X, Y
def weighted(weight=1.0): return X, Y, np.full(3, weight)
def named(): return {"x": X, "y": Y}
def samples(): return Samples((X,), Y)
def room(number): return X + number, Y
def wrong(): return 5
def broken(): raise KeyError("sensor")
def leaves(): raise SystemExit("no sensor")
NOT_A_FUNCTION = 1
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "sensor.py"
    file.write_text(SOURCE)
    return str(file)


@pytest.mark.parametrize("function", ["plain", "weighted?weight=2.5", "named", "samples"])
def test_a_function_may_return_samples_in_any_usual_form(source: str, function: str) -> None:
    samples = load_samples(f"{source}:{function}", TASK)
    assert samples.inputs[0].shape == (3, 2)
    assert samples.labels.dtype == np.int32


def test_arguments_are_passed_to_the_function(source: str) -> None:
    assert load_samples(f"{source}:room?number=3", TASK).inputs[0][0, 0] == 3


def test_a_function_of_an_installed_module_is_found() -> None:
    with pytest.raises(LocalError, match="json:loads cannot be called so"):
        load_samples("json:loads", TASK)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("nonsense", "is not understood: write npz:FILE"),
        ("npz:", "is not understood"),
        ("no.such.module:f", "cannot import 'no.such.module'"),
        ("/no/such/file.py:f", "there is no file"),
        ("{}:missing", "has no function 'missing'"),
        ("{}:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        ("{}:room", "cannot be called so: missing a required argument: 'number'"),
        ("{}:room?floor=1", "cannot be called so"),
        ("{}:wrong", "returned int; return"),
        ("{}:broken", "failed: KeyError: 'sensor'"),
        ("{}:leaves", "failed: SystemExit: no sensor"),
        ("csv:/no/such/folder", "there is no folder"),
    ],
)
def test_a_source_that_fails_is_named(source: str, spec: str, sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        load_samples(spec.format(source), TASK)


def test_a_program_that_leaves_while_it_is_imported_is_named(tmp_path: Path) -> None:
    """It took us with it, and the log said nothing but an exit code."""
    program = tmp_path / "program.py"
    program.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(LocalError, match=r"cannot import .*program\.py.*: SystemExit: 0"):
        load_samples(f"{program}:samples", TASK)


def test_a_folder_of_csv_files_gives_one_sample_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ax,ay,label\n1,2,rest\n3,4,move\n")
    (tmp_path / "b.csv").write_text("ax,ay,label\n5,6,1\n")
    samples = load_samples(f"csv:{tmp_path}", TASK)
    np.testing.assert_array_equal(samples.inputs[0], [[1, 2], [3, 4], [5, 6]])
    assert samples.labels.tolist() == [0, 1, 1]


def test_recordings_are_cut_into_windows_that_never_cross_a_label(tmp_path: Path) -> None:
    rows = ["1,1,rest", "2,2,rest", "3,3,rest", "4,4,move", "5,5,move"]
    (tmp_path / "day.csv").write_text("ax,ay,label\n" + "\n".join(rows) + "\n")
    samples = load_samples(f"csv:{tmp_path}", WINDOWED)
    assert samples.inputs[0][:, 0, 0].tolist() == [0.5, 1.0, 2.0]
    assert samples.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ax,ay,label\n1,2,rest\n1,2\n", "line 3: 2 columns where the header has 3"),
        ("ax,ay,label\n1,two,rest\n", "line 2: could not convert string"),
        ("ax,ay,label\n1,2,jump\n", "line 2: could not convert string"),
        ("ax,label\n1,0\n", "has 1 columns beside the label; the task needs 2"),
        ("ax,ay,label\n", "no rows below its header"),
        ("ax,ay,label\n1,2,7\n", "row 0: 7 is outside 0 … 1"),
    ],
)
def test_a_csv_that_does_not_fit_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(LocalError, match=sentence):
        load_samples(f"csv:{tmp_path}", TASK)


def test_a_folder_without_csv_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"holds no \.csv files"):
        load_samples(f"csv:{tmp_path}", TASK)
