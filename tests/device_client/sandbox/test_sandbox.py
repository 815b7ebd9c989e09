"""The training process: the same bits, however it dies, whatever it lies, and what it cannot do."""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import Plan, Training, decode_task
from device_client.data import load_samples
from device_client.sample_store import SampleStore
from device_client.sandbox import confinement
from device_client.sandbox.process import COMMAND
from device_client.sandbox.trainer import Sandbox, SandboxSettings
from device_client.trainer import NotLoadedError, Trainer
from tests.fleets import ROOT, TASK, wait_until

HERE = Path(__file__).parent
SOURCES = HERE / "sources.py"
PLAN, WEIGHTS = decode_task(TASK.read_bytes())
ONCE = Training(epochs=2, learning_rate=0.05, clip_norm=1.0)
LONG = Training(epochs=10_000, learning_rate=0.001)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")


@pytest.fixture
def boxes():
    """Makes sandboxes, and ends their processes after the test."""
    made = []

    def make(data="samples", **settings):
        data = data if ":" in data else f"{SOURCES}:{data}"
        made.append(Sandbox(SandboxSettings(data, **({"stall_s": 60.0} | settings))))
        return made[-1]

    yield make
    for each in made:
        each.close()


def status(trainer):
    text = Path(f"/proc/{trainer.pid}/status").read_text()
    return dict(line.split(":", 1) for line in text.splitlines())


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def dies(trainer, how, *, step=2):
    """Train until `step`, then do `how` to the process; return what is said of it."""

    def on_step(progress):
        if progress.step == step:
            os.kill(trainer.pid, how)
        return True

    with pytest.raises(LocalError) as told:
        trainer.train(WEIGHTS, LONG, seed=1, on_step=on_step)
    assert "\n" not in str(told.value)
    return str(told.value)


# ── It trains ───────────────────────────────────────────────────────────────────────────


def test_the_result_has_the_same_bits_as_in_this_process(boxes):
    trainer = boxes().load(PLAN)
    here = Trainer(TaskRuntime(PLAN), load_samples(f"{SOURCES}:samples", PLAN.task))
    seen = []
    there = trainer.train(WEIGHTS, ONCE, seed=7, on_step=lambda p: not seen.append(p))
    expected = here.train(WEIGHTS, ONCE, seed=7)
    assert list(there.weights) == list(expected.weights)
    for name in WEIGHTS:
        np.testing.assert_array_equal(there.weights[name], expected.weights[name])
    told = ("loss", "metrics", "examples", "steps", "runtime")
    assert [getattr(there, n) for n in told] == [getattr(expected, n) for n in told]
    assert [(p.step, p.steps) for p in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    assert trainer.evaluate(there.weights) == here.evaluate(expected.weights)
    assert there.peak_bytes > 10_000_000


def test_one_process_serves_round_after_round(boxes):
    trainer = boxes().load(PLAN)
    first = trainer.pid
    a, b = (trainer.train(WEIGHTS, ONCE, seed=seed) for seed in (1, 2))
    again = trainer.train(WEIGHTS, ONCE, seed=1)
    assert trainer.pid == first
    assert any((a.weights[n] != b.weights[n]).any() for n in WEIGHTS)
    assert all((a.weights[n] == again.weights[n]).all() for n in WEIGHTS)


def test_kept_optimiser_state_goes_there_and_back(boxes):
    task = msgspec.structs.replace(PLAN.task, keep_optimiser_state=True)
    keeping = Plan(task, PLAN.tflite, PLAN.digest)
    trainer = boxes().load(keeping)
    here = Trainer(TaskRuntime(keeping), load_samples(f"{SOURCES}:samples", task))
    kept = [each.train(WEIGHTS, ONCE, seed=1).optimiser_state for each in (trainer, here)]
    after = [
        each.train(WEIGHTS, ONCE, seed=2, optimiser_state=state).weights
        for each, state in zip((trainer, here), kept, strict=True)
    ]
    assert kept[0]
    for name in kept[1]:
        np.testing.assert_array_equal(kept[0][name], kept[1][name])
    for name in WEIGHTS:
        np.testing.assert_array_equal(after[0][name], after[1][name])


@pytest.mark.parametrize("threads", [2, 4])
def test_more_threads_can_be_started_behind_the_locked_door(boxes, threads):
    trainer = boxes(threads=threads).load(PLAN)
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4


def test_training_stops_between_steps(boxes):
    trainer = boxes().load(PLAN)
    seen = []

    def two_steps(progress):
        seen.append(progress)
        return progress.step < 2

    assert trainer.train(WEIGHTS, LONG, seed=1, on_step=two_steps) is None
    assert len(seen) == 2
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4  # by the same process


def test_training_goes_no_further_while_a_step_is_looked_at(boxes):
    trainer = boxes().load(PLAN)
    first, go_on, seen = threading.Event(), threading.Event(), []

    def pause(progress):
        seen.append(progress.step)
        first.set()
        go_on.wait()
        return progress.step < 2

    thread = threading.Thread(
        target=trainer.train, args=(WEIGHTS, LONG), kwargs={"seed": 1, "on_step": pause}
    )
    thread.start()
    first.wait()
    # It sleeps: it is one message ahead, and waits to be read.
    wait_until(lambda: status(trainer)["State"].strip().startswith("S"), "it pauses")
    before = cpu_ticks(trainer)
    for _ in range(20):
        wait_until(lambda: True, "a look")
        assert cpu_ticks(trainer) == before
    go_on.set()
    thread.join()
    assert seen == [1, 2]


def cpu_ticks(trainer):
    fields = Path(f"/proc/{trainer.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_process_without_work_ends_by_itself_and_the_next_round_starts_another(boxes):
    trainer = boxes(idle_s=0.5).load(PLAN)
    first = trainer.train(WEIGHTS, ONCE, seed=1)
    wait_until(lambda: trainer.pid is None, "it ends")
    again = trainer.train(WEIGHTS, ONCE, seed=1)
    assert all((first.weights[n] == again.weights[n]).all() for n in WEIGHTS)


def test_a_process_may_be_started_before_the_model_is_here(boxes):
    trainer = boxes(idle_s=0.1).load(PLAN)
    wait_until(lambda: trainer.pid is None, "it ends")
    trainer.warm()
    pid = trainer.pid
    assert pid is not None
    trainer.warm()
    assert trainer.pid == pid


def test_a_round_begins_with_samples_that_are_not_old(tmp_path):
    """A sensor goes on while rounds do: each new process sees what it recorded meanwhile."""
    path = tmp_path / "samples.db"
    box = Sandbox(SandboxSettings(f"store:{path}", fresh_s=0.0))
    with SampleStore(path, shapes=[(50, 6)]) as store:
        try:
            record(store, 40)
            trainer = box.load(PLAN)
            first = trainer.train(WEIGHTS, ONCE, seed=1).examples
            record(store, 40)
            second = trainer.train(WEIGHTS, ONCE, seed=1).examples
        finally:
            box.close()
    assert (first, second) == (40, 80)


def record(store, count):
    for _ in range(count):
        store.append([np.ones((50, 6))], 1)


def test_another_task_ends_the_process_of_the_one_before(boxes):
    box = boxes()
    first = box.load(PLAN).pid
    box.load(PLAN)
    assert not is_there(first)


def test_data_that_does_not_fit_is_one_sentence_from_there(boxes, tmp_path):
    for data, words in (
        (f"npz:{tmp_path}/no.npz", "no.npz"),
        ("samples?rows=0", "no samples"),
        ("environment?name=MIDGE_NOT_SET", "is not set"),
        ("nothing", "no function 'nothing'"),
    ):
        with pytest.raises(LocalError, match=words) as told:
            boxes(data).load(PLAN)
        assert "\n" not in str(told.value)


def test_a_plan_that_does_not_load_and_weights_of_another_task_are_refused_there(boxes):
    box = boxes()
    with pytest.raises(PeerError, match="digest in the header"):
        box.load(Plan(PLAN.task, b"\0" * PLAN.task.tflite_bytes, PLAN.digest))
    with pytest.raises(PeerError, match="expected"):
        box.load(PLAN).train({}, ONCE, seed=1)


# ── It dies ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("how", "words"),
    [(signal.SIGKILL, "memory runs out"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGABRT, "SIGABRT")],
)
def test_a_process_that_is_killed_in_training_is_one_sentence_and_the_next_works(boxes, how, words):
    trainer = boxes().load(PLAN)
    pid = trainer.pid
    assert words in dies(trainer, how)
    assert not is_there(pid)
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4


def test_a_process_that_is_killed_between_rounds_is_not_missed(boxes):
    trainer = boxes().load(PLAN)
    os.kill(trainer.pid, signal.SIGKILL)
    wait_until(lambda: trainer.pid is None, "it is gone")
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4


def test_a_process_that_hangs_is_ended(boxes):
    trainer = boxes().load(PLAN)
    pid, trainer._process._stall_s = trainer.pid, 1.5  # to start may take longer
    assert "no sign of life for 1.5 s" in dies(trainer, signal.SIGSTOP)
    assert not is_there(pid)


def test_a_process_that_hangs_does_not_hold_up_whoever_stops_it(boxes):
    trainer = boxes(stall_s=600.0, stop_grace_s=0.2).load(PLAN)
    pid, hangs = trainer.pid, threading.Event()

    def on_step(progress):
        os.kill(pid, signal.SIGSTOP)
        hangs.set()
        return True

    found = []
    thread = threading.Thread(
        target=lambda: found.append(trainer.train(WEIGHTS, LONG, seed=1, on_step=on_step))
    )
    thread.start()
    hangs.wait()
    trainer.interrupt()
    thread.join()
    assert found == [None]
    assert not is_there(pid)
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4


def test_whoever_waits_for_slow_samples_says_that_it_is_alive_and_may_give_up(boxes):
    box, asked = boxes("slow"), []

    def while_waiting():
        asked.append(True)
        return len(asked) == 3

    box.while_waiting = while_waiting
    with pytest.raises(NotLoadedError, match="the device is stopping"):
        box.load(PLAN)
    assert len(asked) == 3


def test_a_data_source_that_takes_too_long_is_named(boxes):
    with pytest.raises(LocalError, match=r"if the data source .*sources.py:slow takes that long"):
        boxes("slow", stall_s=1.0).load(PLAN)


def test_a_data_source_that_is_still_at_work_when_the_round_is_over_is_named(boxes, caplog):
    box = boxes("slow")
    box.while_waiting = lambda: True
    with pytest.raises(NotLoadedError):
        box.load(PLAN)
    (said,) = caplog.messages
    assert f"the data source {SOURCES}:slow was still at work" in said


def test_an_evaluation_stops_between_batches(boxes):
    trainer = boxes("samples?rows=30000").load(PLAN)
    pid, told = trainer.pid, []

    def evaluate():
        with pytest.raises(LocalError, match="stopped"):
            trainer.evaluate(WEIGHTS)
        told.append(True)

    thread = threading.Thread(target=evaluate)
    busy = cpu_ticks(trainer) + 3
    thread.start()
    wait_until(lambda: cpu_ticks(trainer) >= busy, "it works")
    trainer.interrupt()
    thread.join()
    assert told
    assert trainer.pid == pid
    assert trainer.train(WEIGHTS, ONCE, seed=1, on_step=lambda _: False) is None


def test_a_process_ends_with_the_agent_however_that_ends():
    code = f"""
import sys, time
from pathlib import Path
from broker_bridge.task.taskfile import decode_task
from device_client.sandbox.process import COMMAND
from device_client.sandbox.trainer import Sandbox, SandboxSettings
plan, weights = decode_task(Path({str(TASK)!r}).read_bytes())
print(Sandbox(SandboxSettings({f"{SOURCES}:samples"!r})).load(plan).pid, flush=True)
time.sleep(600)
"""
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    pid = int(agent.stdout.readline())
    assert is_there(pid)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    wait_until(lambda: not is_there(pid), "it ends too")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is only reserved")
def test_memory_that_is_only_reserved_is_nobodys():
    before = confinement.reserved_bytes()
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as reserved:
        assert confinement.reserved_bytes() - before > 60 << 20
        reserved[: 32 << 20] = b"x" * (32 << 20)
        assert 20 << 20 < confinement.reserved_bytes() - before < 40 << 20


def test_libraries_that_reserve_more_than_training_may_take_are_no_obstacle(boxes):
    reserve = "kept = mmap.mmap(-1, 300_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"
    run = "runpy.run_module('device_client.sandbox.child', run_name='__main__')"
    command = (sys.executable, "-P", "-c", f"import mmap, runpy; {reserve}; {run}")
    trainer = boxes(command=command, memory_bytes=250_000_000).load(PLAN)
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps > 0


def test_samples_that_do_not_fit_the_memory_are_named(boxes):
    with pytest.raises(LocalError, match="set memory_mb higher"):
        boxes("greedy?megabytes=500", memory_bytes=250_000_000).load(PLAN)


def test_a_task_that_ends_its_process_again_and_again_has_to_wait(boxes):
    now = [0.0]
    box = Sandbox(SandboxSettings(f"{SOURCES}:samples", stall_s=60.0), clock=lambda: now[0])
    trainer = box.load(PLAN)
    for _ in range(3):
        dies(trainer, signal.SIGKILL)
    with pytest.raises(LocalError, match="3 times in a row; it is tried again in 60 s"):
        trainer.train(WEIGHTS, ONCE, seed=1)
    assert trainer.pid is None
    with pytest.raises(LocalError, match="tried again"):
        box.load(PLAN)  # the same task, announced again
    now[0] = 61.0
    trainer = box.load(PLAN)
    dies(trainer, signal.SIGKILL)
    now[0] = 130.0
    with pytest.raises(LocalError, match="4 times in a row; it is tried again in 51 s"):
        trainer.train(WEIGHTS, ONCE, seed=1)
    now[0] = 200.0
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4
    dies(trainer, signal.SIGKILL)
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4  # counted anew
    box.close()


# ── It lies ─────────────────────────────────────────────────────────────────────────────

LIES = [
    "a head that is too long", "a blob that is too long", "no message", "deeply nested",
    "another message", "an unknown field", "steps that were not", "steps without end",
    "done too early", "weights that are no number", "weights of another shape",
    "a tensor too few", "no weights", "weights and more", "an optimiser of its own",
    "more optimiser than there is", "metrics of another task", "no loss",
]  # fmt: skip


def stranger(how, **settings):
    command = (sys.executable, str(HERE / "stranger.py"), how)
    return {"command": command, "stop_grace_s": 0.2} | settings


@pytest.mark.parametrize("how", LIES)
def test_an_answer_that_cannot_be_is_refused_and_its_process_ended(boxes, how):
    trainer = boxes(**stranger(how)).load(PLAN)
    pid = trainer.pid
    with pytest.raises(LocalError, match="answered nonsense") as told:
        trainer.train(WEIGHTS, Training(epochs=1), seed=1)
    assert "\n" not in str(told.value)
    assert not is_there(pid)


def test_the_same_process_is_believed_when_it_tells_the_truth(boxes):
    trainer = boxes(**stranger("the truth")).load(PLAN)
    assert trainer.train(WEIGHTS, Training(epochs=1), seed=1).examples == 48
    assert trainer.runtime_name == "a runtime ERROR a line of its own"


@pytest.mark.parametrize("how", ["no samples", "too many samples"])
def test_samples_that_cannot_be_are_refused(boxes, how):
    with pytest.raises(LocalError, match="answered nonsense"):
        boxes(**stranger(how)).load(PLAN)


def test_an_answer_that_is_cut_short_is_an_end(boxes):
    trainer = boxes(**stranger("cut short", idle_s=0.1)).load(PLAN)
    with pytest.raises(LocalError, match="ended by itself"):
        trainer.train(WEIGHTS, Training(epochs=1), seed=1)


@pytest.mark.parametrize("how", ["mute", "a letter a second"])
def test_a_process_that_does_not_come_to_the_point_is_ended(boxes, how):
    with pytest.raises(LocalError, match="no sign of life"):
        boxes(**stranger(how, stall_s=2.0)).load(PLAN).train(WEIGHTS, ONCE, seed=1)


# ── What it cannot do ───────────────────────────────────────────────────────────────────


def test_the_kernel_holds_it(boxes):
    trainer = boxes(memory_bytes=400_000_000).load(PLAN)
    found = status(trainer)
    assert found["Seccomp"].strip() == "2"
    assert found["NoNewPrivs"].strip() == "1"
    limits = Path(f"/proc/{trainer.pid}/limits").read_text()
    for name, value in (
        ("Max file size", 0), ("Max core file size", 0), ("Max open files", 1),
        ("Max processes", 0),
    ):  # fmt: skip
        line = next(each for each in limits.splitlines() if each.startswith(name))
        assert line.removeprefix(name).split()[:2] == [str(value)] * 2
    data = re.search(r"Max data size +(\d+) +(\d+)", limits)
    assert data is not None
    assert data[1] == data[2]
    # And what libraries had reserved by then: tens of megabytes, or 240 on a Pi.
    assert 400_000_000 <= int(data[1]) < 700_000_000
    opened = Path(f"/proc/{trainer.pid}/fd")
    targets = sorted(os.readlink(each).split(":")[0] for each in opened.iterdir())
    assert targets == ["/dev/null"] * 3 + [f"/proc/{trainer.pid}/status", "socket"]
    adjusted = Path(f"/proc/{trainer.pid}/oom_score_adj").read_text()
    assert int(adjusted) == 1000


def test_it_has_neither_keys_nor_network_code(boxes, capfd):
    command = (sys.executable, "-X", "importtime", *COMMAND[1:])
    boxes(command=command).load(PLAN)
    told = re.findall(r"^import time:.*\|(.*)$", capfd.readouterr().err, re.M)
    imported = {name.strip().split(".")[0] for name in told}
    assert {"device_client", "numpy"} <= imported
    assert not imported & {"paho", "nacl", "ssl", "cryptography", "urllib3", "http"}


def test_the_data_source_sees_the_environment_and_the_model_does_not(boxes, monkeypatch):
    monkeypatch.setenv("MIDGE_TEST_SECRET", "swordfish")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/nobody")
    trainer = boxes("environment?name=MIDGE_TEST_SECRET").load(PLAN)
    assert Path(f"/proc/{trainer.pid}/environ").read_bytes().strip(b"\0") == b""
    with pytest.raises(LocalError, match="is not set"):
        boxes("environment?name=NOTIFY_SOCKET").load(PLAN)


def test_code_behind_the_locked_door_is_refused_everything(boxes, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDGE_TEST_SECRET", "swordfish")
    identity, report = tmp_path / "identity.json", tmp_path / "report"
    identity.write_text("the device's keys")
    trainer = boxes(f"hostile?report={report}&identity={identity}", memory_bytes=500_000_000).load(
        PLAN
    )
    wait_until(lambda: report.read_bytes()[0], "it has tried everything")
    found = json.loads(report.read_bytes().strip(b"\0"))
    assert found == {
        "read the identity": "PermissionError",
        "write a file": "PermissionError",
        "write to a file that was open": "OSError",
        "remove a file": "PermissionError",
        "list a folder": "PermissionError",
        "look whether a file is there": "PermissionError",
        "start a thread": "RuntimeError",
        "start a program": "PermissionError",
        "memory that is written and run": "PermissionError",
        "memory that is shared": "PermissionError",
        "raise the limit of memory": "ValueError",
        "read the environment": "KeyError",
        "take all memory": "MemoryError",
    }
    assert identity.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "identity.json", "report", "report.log",
    ]  # fmt: skip
    assert trainer.train(WEIGHTS, ONCE, seed=1).steps == 4


@pytest.mark.parametrize(
    "act",
    [
        "socket", "unix socket", "program", "process", "debugger", "memory of the agent",
        "signal to the agent", "file in memory",
    ],
)  # fmt: skip
def test_what_training_never_does_ends_the_process_at_once(boxes, tmp_path, act):
    box = boxes(f"hostile?report={tmp_path}/report&identity={tmp_path}/x&act={act}")
    with pytest.raises(LocalError, match=r"ended by the sandbox \(SIGSYS\)"):
        box.load(PLAN).train(WEIGHTS, LONG, seed=1)
    assert (tmp_path / "report").read_bytes().strip(b"\0") == b""


# ── Where the kernel lacks something ────────────────────────────────────────────────────

OLD_KERNEL = """
import ctypes, os, struct, sys
from device_client.sandbox import confinement, seccomp
# A filter of our own, which refuses what an older kernel or a container refuses: filters.
number = struct.pack("=HBBI", 0x20, 0, 0, 0)
asked = struct.pack("=HBBI", 0x15, 0, 1, confinement._SECCOMP_CALL[os.uname().machine])
code = number + asked + b"".join(
    struct.pack("=HBBI", 0x06, 0, 0, answer) for answer in (0x50000 | 38, seccomp.ALLOW)
)
confinement._prctl(38, 1)
given = confinement._Filter(len(code) // 8, code)
done = ctypes.CDLL(None).prctl(22, 2, ctypes.byref(given), 0, 0)
assert done == 0
from device_client.cli import main
sys.argv[0] = "midge-device"
main()
"""


def test_where_the_kernel_takes_no_filter_training_works_and_the_lack_is_said(tmp_path):
    command = [sys.executable, "-c", OLD_KERNEL]
    trial = ["try", str(TASK), "--data", f"{SOURCES}:samples", "--epochs", "1", "--json"]
    done = subprocess.run([*command, *trial], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 48
    looked = subprocess.run(
        [*command, "doctor", "--dir", str(tmp_path), "--json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    checks = {each["check"]: each for each in json.loads(looked.stdout)["checks"]}
    assert checks["sandbox"]["level"] == "warning"
    assert "the kernel takes no seccomp filter" in checks["sandbox"]["found"]


def test_where_the_kernel_takes_a_filter_doctor_says_that_it_holds(tmp_path):
    looked = subprocess.run(
        [sys.executable, "-m", "device_client.cli", "doctor", "--dir", str(tmp_path), "--json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    checks = {each["check"]: each for each in json.loads(looked.stdout)["checks"]}
    assert checks["sandbox"]["level"] == "ok"
    assert "locked in by seccomp" in checks["sandbox"]["found"]


def test_the_lack_is_logged_once(boxes, caplog):
    box = boxes(**stranger("the truth"))
    caplog.set_level("INFO", logger="midge.device")
    for _ in range(2):
        box.load(PLAN)
    assert len([each for each in caplog.records if "process of its own" in each.message]) == 1
