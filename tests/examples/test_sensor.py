"""The worked example of a sensor: what it records can be trained on by the device's own command."""

import json
import sys

import numpy as np

from broker_bridge.task.taskfile import decode_task
from device_client.sample_store import SampleStore, read_store
from examples.sensor.record import HOP, ROWS, WindowRecorder
from tests.fleets import DEVICE, ROOT, TASK, run

RECORD = [sys.executable, str(ROOT / "examples" / "sensor" / "record.py")]


def test_what_the_sensor_recorded_is_trained_on(tmp_path):
    store = tmp_path / "samples.db"
    for label in ("1", "4"):
        done = run(*RECORD, str(store), "--label", label, "--hz", "0", "--readings", "1000")
        assert done.returncode == 0, done.stderr
    windows = 2 * ((1000 - ROWS) // HOP + 1)
    assert f"{windows} in {store}" in done.stdout
    done = run(*DEVICE, "try", str(TASK), "--data", f"store:{store}", "--epochs", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == windows
    assert found["curve"][-1] < found["curve"][0]


def test_a_store_larger_than_any_cache_is_trained_on_in_the_locked_process(tmp_path):
    store = tmp_path / "samples.db"
    assert run(*RECORD, str(store), "--hz", "0", "--readings", "100000").returncode == 0
    assert store.stat().st_size > 4_000_000
    done = run(*DEVICE, "try", str(TASK), "--data", f"store:{store}", "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == (100_000 - ROWS) // HOP + 1


def test_a_window_never_holds_two_labels(tmp_path):
    plan, _ = decode_task(TASK.read_bytes())
    path = tmp_path / "samples.db"
    with SampleStore(path, shapes=[(ROWS, 6)]) as store:
        recorder = WindowRecorder(store, label=1)
        for number in range(ROWS + HOP + 10):
            recorder.on_reading([number] * 6)
        recorder.say(2)
        for number in range(ROWS):
            recorder.on_reading([1000 + number] * 6)
        recorder.say(2)
    samples = read_store(path, plan.task)
    assert samples.labels.tolist() == [1, 1, 2]
    raw = np.array([0, HOP, 1000])
    firsts = samples.inputs[0][np.arange(3)][:, 0, 0]
    assert np.argsort(firsts).tolist() == np.argsort(raw).tolist()


def test_a_file_that_is_no_store_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "samples.db"
    path.write_bytes(b"no store" * 1000)
    done = run(*RECORD, str(path), "--hz", "0", "--readings", "10")
    assert done.returncode == 1
    assert "not a sample store" in done.stderr
    assert "Traceback" not in done.stderr
