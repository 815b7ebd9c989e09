"""What a sensor records: bounded by bytes and age, whole after a SIGKILL, read from the disk."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Standardise, Training, decode_task
from device_client.data import load_samples
from device_client.sample_store import SampleStore, read_store
from device_client.trainer import Trainer
from tests.fleets import ROOT, TASK, wait_until

SHAPE = (50, 6)
ROW_BYTES = 4 * 50 * 6


@pytest.fixture(scope="module")
def task():
    plan, _ = decode_task(TASK.read_bytes())
    return plan.task


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.db"


def windows(count, seed=1):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, *SHAPE)).astype(np.float32), draw.integers(0, 7, count)


def record(path, x, y, **options):
    with SampleStore(path, shapes=[SHAPE], **options) as store:
        for window, label in zip(x, y, strict=True):
            store.append([window], label)


def test_training_from_a_store_gives_the_bits_of_training_from_memory(path, task):
    x, y = windows(70)
    record(path, x, y)
    plan, weights = decode_task(TASK.read_bytes())
    settings = Training(epochs=2, learning_rate=0.05)
    step = Standardise(mean=(0.5,) * 6, scale=(2.0,) * 6)
    task = msgspec.structs.replace(task, preprocessing=(step,))
    plan = replace(plan, task=task)
    scaled = (x - np.float32(0.5)) / np.float32(2.0)
    results = [
        Trainer(TaskRuntime(plan), samples).train(weights, settings, seed=3).weights
        for samples in (load_samples(f"store:{path}", task), Samples((scaled,), y))
    ]
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])


def test_the_store_is_not_loaded_as_a_whole(path, task):
    x, y = windows(4000)
    record(path, x, y)
    tracemalloc.start()
    samples = read_store(path, task)
    rows = samples.inputs[0][np.array([3999, 0, 17])]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 4000
    assert rows.shape == (3, *SHAPE)
    assert peak < x.nbytes / 2


def test_the_oldest_go_when_there_are_too_many_bytes(path, task):
    x, y = windows(30)
    record(path, x, y, bytes_max=10 * ROW_BYTES + 5)
    samples = read_store(path, task)
    assert len(samples) == 10
    assert list(samples.labels) == list(y[20:])


def test_the_file_stays_bounded_while_samples_come_and_go(path):
    x, y = windows(50)
    with SampleStore(path, shapes=[SHAPE], bytes_max=50 * ROW_BYTES) as store:
        for _ in range(40):
            for window, label in zip(x, y, strict=True):
                store.append([window], label)
        assert len(store) == 50
    assert path.stat().st_size < 4 * 50 * ROW_BYTES


def test_what_is_too_old_goes(path, task):
    x, y = windows(20)
    now = [1000.0]
    with SampleStore(path, shapes=[SHAPE], age_max_s=60, clock=lambda: now[0]) as store:
        for window, label in zip(x, y, strict=True):
            store.append([window], label)
            now[0] += 10
        assert len(store) == 7
    assert list(read_store(path, task).labels) == list(y[13:])


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_by_ten_years_empties_no_store(path, years):
    x, y = windows(50)
    now = [1e9]
    with SampleStore(path, shapes=[SHAPE], age_max_s=3600, clock=lambda: now[0]) as store:
        for window, label in zip(x, y, strict=True):
            store.append([window], label)
        now[0] += years * 365 * 86_400
        for window in x[:5]:
            store.append([window], 0)
        now[0] -= years * 365 * 86_400
        store.append([x[0]], 0)
        assert len(store) >= 50 - 2 * 6


def test_a_reader_sees_one_moment_while_the_sensor_goes_on(path, task):
    x, y = windows(40)
    with SampleStore(path, shapes=[SHAPE], bytes_max=20 * ROW_BYTES) as store:
        for window, label in zip(x[:20], y[:20], strict=True):
            store.append([window], label)
        samples = read_store(path, task)
        before = samples.inputs[0][np.arange(20)]
        for window, label in zip(x[20:], y[20:], strict=True):
            store.append([window], label)
        np.testing.assert_array_equal(samples.inputs[0][np.arange(20)], before)
        assert list(read_store(path, task).labels) == list(y[20:])


def test_what_a_sensor_recorded_is_its_owners_alone(path):
    before = os.umask(0)
    try:
        with SampleStore(path, shapes=[SHAPE]) as store:
            store.append([windows(1)[0][0]], 1)
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("samples.db", "samples.db-wal", "samples.db-shm"), 0o600)


def test_two_threads_may_append(path):
    x, _ = windows(50)
    with SampleStore(path, shapes=[SHAPE]) as store:
        threads = [
            threading.Thread(target=lambda: [store.append([w], 1) for w in x]) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store) == 100


def test_two_inputs_are_kept_apart(path):
    task = msgspec.structs.replace(decode_task(TASK.read_bytes())[0].task, preprocessing=())
    spec = task.inputs[0]
    task = msgspec.structs.replace(
        task,
        inputs=(msgspec.structs.replace(spec, shape=(2,)), msgspec.structs.replace(spec, shape=())),
    )
    with SampleStore(path, shapes=[(2,), ()]) as store:
        store.append([np.array([1, 2]), np.array(3)], 0)
        store.append([np.array([4, 5]), np.array(6)], 1)
    samples = read_store(path, task)
    assert samples.inputs[0][[1, 0]].tolist() == [[4, 5], [1, 2]]
    assert samples.inputs[1][[1, 0]].tolist() == [6, 3]


# ── Bad days ────────────────────────────────────────────────────────────────────────────

SENSOR = """
import sys
import numpy as np
from pathlib import Path
from device_client.sample_store import SampleStore
store = SampleStore(Path(sys.argv[1]), shapes=[(50, 6)])
while True:
    store.append([np.ones((50, 6))], 2)
    print(len(store), flush=True)
"""


def test_a_sensor_killed_in_mid_write_leaves_every_sample_it_finished(path, task):
    total = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", SENSOR, str(path)], stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as sensor:  # fmt: skip
            said = [int(sensor.stdout.readline()) for _ in range(20)]
            sensor.send_signal(signal.SIGKILL)
            said += [int(line) for line in sensor.stdout.read().split()]
        assert said[0] == total + 1
        total = len(read_store(path, task))
        assert total in (said[-1], said[-1] + 1)
    assert set(read_store(path, task).labels) == {2}


@pytest.mark.parametrize(
    ("inputs", "label", "words"),
    [
        ([np.ones((50, 5))], 1, "[50, 5]"),
        ([np.full(SHAPE, np.nan)], 1, "NaN"),
        ([np.ones(SHAPE)], float("inf"), "not a finite number"),
        ([np.ones(SHAPE)] * 2, 1, "1 input(s)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(path, inputs, label, words):
    with SampleStore(path, shapes=[SHAPE]) as store:
        store.append([np.ones(SHAPE)], 1)
        with pytest.raises(LocalError) as refusal:
            store.append(inputs, label)
        assert words in str(refusal.value)
        assert len(store) == 1


def test_a_store_for_another_sensor_is_not_mixed_with_this_one(path):
    SampleStore(path, shapes=[SHAPE]).close()
    with pytest.raises(LocalError, match="another file for another sensor"):
        SampleStore(path, shapes=[(50, 3)])


@pytest.mark.parametrize("content", [b"not a database, nor anything else", b"SQLite format 3\0xx"])
def test_a_file_that_is_no_store_is_named(path, task, content):
    path.write_bytes(content * 100)
    for opened in (lambda: read_store(path, task), lambda: SampleStore(path, shapes=[SHAPE])):
        with pytest.raises(LocalError) as refusal:
            opened()
        assert str(path) in str(refusal.value)
    assert path.read_bytes() == content * 100


def test_a_database_of_somebody_else_is_left_alone(path, task):
    with sqlite3.connect(path) as db:
        db.execute("create table mine (x)")
    with pytest.raises(LocalError, match="not a sample store"):
        read_store(path, task)
    with pytest.raises(LocalError, match="not a sample store"):
        SampleStore(path, shapes=[SHAPE])


def test_a_store_without_samples_or_without_a_file_is_said(path, task):
    with pytest.raises(LocalError, match="no sample store"):
        load_samples(f"store:{path}", task)
    SampleStore(path, shapes=[SHAPE]).close()
    with pytest.raises(LocalError, match="no samples yet"):
        load_samples(f"store:{path}", task)


def test_a_label_that_the_task_does_not_know_is_refused_before_training(path, task):
    record(path, windows(3)[0], [1, 99, 2])
    with pytest.raises(LocalError, match="outside"):
        load_samples(f"store:{path}", task)


def test_a_store_that_allows_less_than_one_sample_is_refused(path):
    with pytest.raises(LocalError, match="hold no sample"):
        SampleStore(path, shapes=[SHAPE], bytes_max=100)


def test_a_store_that_another_process_holds_is_waited_for(path):
    """SQLite waits for a writer; a sensor is not told of the moment in between."""
    with SampleStore(path, shapes=[SHAPE]) as store:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("begin immediate")
        thread = threading.Thread(target=lambda: (time.sleep(0.2), other.execute("commit")))
        thread.start()
        store.append([np.ones(SHAPE)], 1)
        thread.join()
        wait_until(lambda: len(store) == 1, "it is there")
