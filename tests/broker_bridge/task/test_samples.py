from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.samples import Samples, check_samples, preprocess, read_npz
from broker_bridge.task.taskfile import Standardise, Task, Window
from broker_bridge.wire.weights import TensorSpec

TASK = Task(
    name="small",
    batch_size=4,
    evaluation_batch_size=4,
    inputs=(TensorSpec("motion", "float32", (2,)),),
    label=TensorSpec("y", "int32", ()),
    label_range=(0, 2),
    output=TensorSpec("out", "float32", (3,)),
    weights=(TensorSpec("w", "float32", (2, 3)),),
    trainable_count=1,
    optimiser="sgd",
    loss="sparse_categorical_crossentropy",
    tflite_digest="",
    tflite_bytes=0,
    weights_digest="",
    weights_bytes=0,
)
X = np.arange(6, dtype=np.float32).reshape(3, 2)
Y = np.array([0, 1, 2])


def test_samples_are_cast_where_nothing_is_lost() -> None:
    checked = check_samples(TASK, Samples((X.astype(np.float64),), Y.astype(np.float32)))
    assert checked.inputs[0].dtype == np.float32
    assert checked.labels.dtype == np.int32
    np.testing.assert_array_equal(checked.labels, Y)


def test_labels_in_a_column_fit_a_task_with_plain_labels() -> None:
    assert check_samples(TASK, Samples((X,), Y[:, None])).labels.shape == (3,)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (Samples((X, X), Y), "takes 1 input.*has 2"),
        (Samples((X[:, :1],), Y), r"input 'motion' has samples of shape \[1\].*needs \[2\]"),
        (Samples((X[:2],), Y), "'motion' has 2 rows, and there are 3 labels"),
        (Samples((X[:0],), Y[:0]), "no samples"),
        (Samples((X,), np.array([0, 1, 3])), "row 2: 3 is outside 0 … 2"),
        (Samples((X,), np.array([0, -1, 2])), "row 1: -1 is outside"),
        (Samples((X,), np.array([0.0, 0.5, 2.0])), "row 1: 0.5 does not fit int32"),
        (Samples((np.array([[0, 1], [2, np.nan], [4, 5]]),), Y), "'motion', row 1: nan"),
        (Samples((np.array([[0, 1], [2, 1e300], [4, 5]]),), Y), "row 1: 1e\\+300 does not fit"),
        (Samples((np.array([["a", "b"]] * 3),), Y), "has dtype <U1"),
        (Samples((X,), Y, np.array([1.0, -1.0, 1.0])), "sample_weight, row 1: -1.0 is negative"),
        (Samples((X,), Y, np.zeros(3)), "sample_weight is 0 in every row"),
        (Samples((X,), Y, np.array([1.0, 1.0])), "'sample_weight' has 2 rows"),
        (Samples((np.float32(1),), Y), "single value"),
        (Samples((X,), np.eye(3)), r"\[3\].*needs \[\]: these are one-hot; .* numpy\.argmax"),
        (Samples((X,), np.ones((3, 2))), r"labels \(y\) has samples of shape \[2\].*needs \[\]$"),
    ],
)
def test_what_does_not_fit_is_named(samples: Samples, sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        check_samples(TASK, samples)


def test_an_npz_is_read_by_input_name_or_as_x(tmp_path: Path) -> None:
    for name in ("motion", "x"):
        file = tmp_path / f"{name}.npz"
        np.savez(file, **{name: X, "y": Y, "sample_weight": [1, 2, 0]})
        samples = read_npz(str(file), TASK)
        np.testing.assert_array_equal(samples.inputs[0], X)
        assert samples.weights is not None
        assert samples.weights.tolist() == [1, 2, 0]


def test_an_npz_that_does_not_fit_is_named(tmp_path: Path) -> None:
    missing, wrong, pickled, text = (tmp_path / n for n in ("a.npz", "b.npz", "c.npz", "d.npz"))
    np.savez(wrong, z=X)
    np.savez(pickled, x=np.array([{}], dtype=object), y=Y)
    text.write_text("hello")
    for file, sentence in (
        (missing, "cannot read .*a.npz"),
        (wrong, "b.npz: the data has no array 'x|motion'"),
        (pickled, "c.npz is not an .npz of plain arrays"),
        (text, "d.npz is not an .npz"),
    ):
        with pytest.raises(LocalError, match=sentence):
            read_npz(str(file), TASK)


def test_an_array_saved_alone_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(LocalError, match=r"x\.npy is not an \.npz file: write one with numpy"):
        read_npz(str(tmp_path / "x.npy"), TASK)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_refused_in_one_sentence(tmp_path: Path, save: Any) -> None:
    file = tmp_path / "x.npz"
    save(file, x=X, y=Y)
    whole = file.read_bytes()
    flags = whole.index(b"PK\x01\x02") + 8
    encrypted = whole[:flags] + b"\x01" + whole[flags + 1 :]
    damaged = [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(len(whole))]
    refused = []
    for data in (*damaged, encrypted, whole[:100]):
        file.write_bytes(data)
        try:
            read_npz(str(file), TASK)
        except LocalError as error:
            refused.append(str(error))
    assert len(refused) > 100  # the rest are dates and the like
    assert all(str(file) in sentence for sentence in refused)


def test_preprocessing_runs_in_order() -> None:
    task = msgspec.structs.replace(
        TASK, preprocessing=(Window(samples=2, hop=1), Standardise((1.0, 1.0), (2.0, 2.0)))
    )
    np.testing.assert_allclose(preprocess(task, X)[1], (X[1:3] - 1) / 2)
    assert preprocess(task, X[:1]).shape == (0, 2, 2)
