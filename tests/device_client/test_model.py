"""The newest model on a device, as its programs use it: from Python, once, and over a socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import Standardise, Window, decode_task
from device_client import model as models
from device_client.model import Model
from device_client.prediction import LockedModel
from tests.fleets import DEVICE, ROOT, TASK, Program, run, wait_until


@pytest.fixture(scope="module")
def task():
    return decode_task(TASK.read_bytes())


@pytest.fixture
def folder(tmp_path, task):
    plan, weights = task
    models.keep(tmp_path, "global", plan, weights, version=7, number=12)
    return tmp_path


def moved(weights, by):
    return {name: (array + np.float32(by)).astype(np.float32) for name, array in weights.items()}


def windows(count=3):
    return np.random.default_rng(1).normal(size=(count, 50, 6)).astype(np.float32)


# ── From Python ─────────────────────────────────────────────────────────────────────────


def test_five_lines_of_python_use_the_model(folder, task):
    model = Model.open(folder)
    output = model.predict(windows())
    assert (model.version, model.task, model.kind) == (7, "wearables", "global")
    np.testing.assert_array_equal(output, TaskRuntime(task[0]).infer(task[1], [windows()]))
    assert model.label(output[0]) in model.label_names


def test_a_single_sample_is_one_row(folder):
    model = Model.open(folder)
    np.testing.assert_array_equal(model.predict(windows()[0])[0], model.predict(windows())[0])


def test_a_recording_is_prepared_as_the_task_says(folder, task):
    plan, weights = task
    steps = (Window(samples=50, hop=25), Standardise(mean=(1.0,) * 6, scale=(2.0,) * 6))
    header = msgspec.structs.replace(plan.task, preprocessing=steps)
    models.keep(folder, "global", replace(plan, task=header), weights, version=8, number=13)
    recording = np.random.default_rng(2).normal(size=(120, 6)).astype(np.float32)
    cut = np.stack([recording[start : start + 50] for start in (0, 25, 50)])
    np.testing.assert_array_equal(
        Model.open(folder).predict(recording, raw=True),
        TaskRuntime(plan).infer(weights, [(cut - np.float32(1)) / np.float32(2)]),
    )


def test_the_personal_model_comes_before_the_global_one(folder, task):
    plan, weights = task
    models.keep(folder, "personal", plan, moved(weights, 0.1), version=7, number=12)
    assert Model.open(folder).kind == "personal"
    assert Model.open(folder, kind="global").kind == "global"
    models.discard(folder, "personal")
    assert Model.open(folder).kind == "global"


def test_a_newer_model_is_taken_up(folder, task):
    plan, weights = task
    model = Model.open(folder)
    before = model.predict(windows())
    assert not model.refresh()
    models.keep(folder, "global", plan, moved(weights, 0.1), version=8, number=13)
    assert model.refresh()
    assert model.version == 8
    assert not np.array_equal(model.predict(windows()), before)


def test_whoever_reads_while_models_change_gets_one_or_the_other(folder, task):
    plan, weights = task
    stop = threading.Event()

    def change():
        version = 8
        while not stop.is_set():
            models.keep(folder, "global", plan, weights, version=version, number=version)
            version += 1

    writer = threading.Thread(target=change)
    writer.start()
    try:
        seen = {Model.open(folder).version for _ in range(30)}
    finally:
        stop.set()
        writer.join()
    assert min(seen) >= 7


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([np.zeros((3, 50, 5), np.float32)], "[3, 50, 5]"),
        ([np.zeros((0, 50, 6), np.float32)], "at least one"),
        ([np.full((1, 50, 6), np.nan)], "finite"),
        ([np.full((1, 50, 6), "a")], "finite"),
        ([windows(), windows()], "1 input(s)"),
    ],
)
def test_an_input_that_does_not_fit_is_said(folder, inputs, words):
    with pytest.raises(LocalError) as refusal:
        Model.open(folder).predict(*inputs)
    assert words in str(refusal.value)


def test_before_the_first_round_there_is_none_and_that_is_said(tmp_path):
    with pytest.raises(LocalError, match="no trained model"):
        Model.open(tmp_path)


@pytest.mark.parametrize("length", [0, 20, 5000, -1])
def test_a_damaged_file_is_said_and_counts_as_none(folder, length):
    path = folder / "model" / "global.task"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(LocalError, match="damaged"):
        Model.open(folder)
    assert models.kept(folder, "global") is None


def test_what_is_kept_has_its_version(folder):
    assert models.kept(folder, "global") == 7
    assert models.kept(folder, "personal") is None


# ── Once ────────────────────────────────────────────────────────────────────────────────


def infer(folder, *options):
    np.save(folder / "window.npy", windows())
    return run(
        *DEVICE, "infer", "--dir", str(folder), "--input", str(folder / "window.npy"), *options
    )


def test_infer_answers_what_the_model_says(folder, task):
    done = infer(folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = TaskRuntime(task[0]).infer(task[1], [windows()])
    np.testing.assert_allclose(found["output"], expected, rtol=1e-6)
    assert (found["model"], found["kind"]) == (7, "global")
    assert len(found["label"]) == 3
    plain = infer(folder)
    assert plain.stdout.startswith("model 7 (global)\n")
    assert found["label"][0] in plain.stdout


@pytest.mark.parametrize(
    ("content", "words"), [(b"not numpy", "not an .npy"), (None, "cannot read")]
)
def test_infer_says_what_is_wrong_with_its_input(folder, content, words):
    path = folder / "x.npy"
    if content is not None:
        path.write_bytes(content)
    done = run(*DEVICE, "infer", "--dir", str(folder), "--input", str(path))
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


def test_infer_never_unpickles(folder):
    np.save(folder / "x.npy", np.array([{"a": 1}], dtype=object))
    done = run(*DEVICE, "infer", "--dir", str(folder), "--input", str(folder / "x.npy"))
    assert done.returncode == 2
    assert "not an .npy file of numbers" in done.stderr


# ── In a locked process ─────────────────────────────────────────────────────────────────

ASK = """
import os, sys
from pathlib import Path
from device_client.prediction import LockedModel
with LockedModel(Path(sys.argv[1])) as model:
    print(Path(f"/proc/{model._child}/status").read_text(), flush=True)
"""


def test_the_model_runs_locked_in(folder):
    done = run(sys.executable, "-c", ASK, str(folder))
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert facts["Seccomp"].strip() == "2"
    assert facts["NoNewPrivs"].strip() == "1"


def test_a_model_that_ends_its_process_is_said_and_takes_nobody_along(folder):
    with LockedModel(folder) as model:
        os.kill(model._child, signal.SIGSEGV)
        with pytest.raises(LocalError, match="ended its process"):
            model.predict([windows()])


# ── Over a socket ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def answering(folder):
    path = folder / "p.sock"
    program = Program(
        folder / "predict.log", *DEVICE, "predict", "--dir", str(folder), "--socket", str(path)
    )
    try:
        wait_until(lambda: ask_or_none(path), "it answers")  # the file is there before
        yield folder, path, program
    finally:
        if program.is_running:
            program.kill()


def ask(path, *questions):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(30)
        caller.connect(str(path))
        with caller.makefile("rb") as lines:
            found = []
            for question in questions:
                text = question if isinstance(question, bytes) else json.dumps(question).encode()
                caller.sendall(text + b"\n")
                found.append(json.loads(lines.readline()))
    return found


def test_other_programs_ask_over_a_socket(answering, task):
    _, path, _ = answering
    first, second = ask(path, {"input": windows().tolist()}, {"inputs": [windows()[0].tolist()]})
    expected = TaskRuntime(task[0]).infer(task[1], [windows()])
    np.testing.assert_allclose(first["output"], expected, rtol=1e-4)
    assert (first["ok"], first["model"]) == (True, 7)
    assert second["output"][0] == first["output"][0]


@pytest.mark.parametrize(
    "question",
    [b"nonsense", b"{}", b"[]", b'{"input": "x"}', b'{"input": [[1]]}', b"\xff\xff", b"null",
     b'{"input": [[NaN]]}', b'{"inputs": 5}', b"[" * 5000],
)  # fmt: skip
def test_a_question_that_is_none_is_answered_in_a_sentence(answering, question):
    _, path, program = answering
    bad, good = ask(path, question, {"input": windows(1).tolist()})
    assert bad["ok"] is False
    assert bad["error"]
    assert good["ok"]
    assert "Traceback" not in program.log


def test_a_newer_model_answers_the_next_caller(answering, task):
    folder, path, _ = answering
    models.keep(folder, "global", task[0], moved(task[1], 0.1), version=8, number=13)
    assert ask(path, {"input": windows(1).tolist()})[0]["model"] == 8


def test_only_user_and_group_may_ask(answering):
    _, path, _ = answering
    assert path.stat().st_mode & 0o777 == 0o660


def test_a_second_server_on_one_socket_is_refused_and_a_dead_ones_is_taken_over(answering):
    folder, path, program = answering
    again = (*DEVICE, "predict", "--dir", str(folder), "--socket", str(path))
    done = run(*again)
    assert done.returncode == 2
    assert "answers on" in done.stderr
    assert done.stdout == "", "it says that it answers once it does"
    program.kill()
    assert path.exists()
    second = Program(folder / "second.log", *again)
    try:
        wait_until(lambda: ask_or_none(path), "the second answers")
    finally:
        assert second.terminate() == 0
    assert not path.exists()


def ask_or_none(path):
    try:
        return ask(path, {"input": windows(1).tolist()})
    except OSError:
        return None


def test_the_example_in_the_docstring_is_five_lines_that_run(folder):
    text = models.__doc__.split("\n\n")[1]
    code = "\n".join(line[4:] for line in text.splitlines())
    rest = models.__doc__.split("\n\n")[2]
    code += "\n" + "\n".join(line[4:] for line in rest.splitlines())
    code = code.replace('"/var/lib/midge"', repr(str(folder)))
    setup = "import numpy as np\nwindow = np.zeros((50, 6), np.float32)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 ")
