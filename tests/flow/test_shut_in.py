"""Everything works in the units' sandbox: training in both runtimes, and a whole round.

`tests.shut_in` puts the units' restrictions on real processes; see there for which.
"""

import shutil
import sys

import pytest

from broker_bridge.link.local_broker import find_mosquitto
from tests.fleets import DEVICE, MIDGE, ROOT, TASK, TOPICS, Fleet, Program, run, write_samples

UNITS = {
    "device": "device_client/midge-device.service",
    "server": "server/midge-server.service",
    "broker": "broker_bridge/link/mosquitto-dropin.conf",
}
SHUT_IN = (sys.executable, "-m", "tests.shut_in")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("systemd-analyze") is None,
    reason="needs Linux, and systemd-analyze for the names of system calls",
)

# Each prints what it got. The first three are refused, the others are needed.
PROBES = {
    "memory that is written and run": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "another root": "import os; os.chroot('/')",
    "a namespace": "import ctypes; c = ctypes.CDLL(None); print(c.unshare(0x40000000)); exit(1)",
    "a thread": "import threading as t; a = t.Thread(); a.start(); a.join()",
    "a process": "import subprocess; subprocess.run(['true'], check=True)",
    "a lower priority": "import os; os.nice(1)",
    "a limit": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (60, 60))",
}
REFUSED = ("memory that is written and run", "another root", "a namespace")


@pytest.mark.parametrize("what", PROBES)
@pytest.mark.parametrize("who", ["device", "server"])
def test_the_sandbox_refuses_what_it_should_and_no_more(who, what):
    done = run(*SHUT_IN, UNITS[who], sys.executable, "-c", PROBES[what])
    assert (done.returncode == 0) == (what not in REFUSED), done.stderr


def test_a_process_in_the_sandbox_can_shut_itself_in_further():
    unit = UNITS["device"]
    done = run(*SHUT_IN, unit, *SHUT_IN, unit, sys.executable, "-c", PROBES["a thread"])
    assert done.returncode == 0, done.stderr


TRAIN = """
import sys
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import read_npz
from broker_bridge.task.taskfile import Training, decode_task
from broker_bridge.wire.envelope import sha256
from device_client.trainer import Trainer
plan, model = decode_task(open(sys.argv[1], 'rb').read())
runtime = TaskRuntime(plan, prefer=sys.argv[3])
trained = Trainer(runtime, read_npz(sys.argv[2], plan.task)).train(
    model, Training(epochs=2, learning_rate=0.05), seed=1)
print(sha256(b''.join(trained.weights[n].tobytes() for n in sorted(model))).hex())
"""


@pytest.mark.parametrize("runtime", ["tflite-runtime", "ai-edge-litert"])
def test_training_in_the_sandbox_gives_the_same_bits(tmp_path, runtime):
    module = {"tflite-runtime": "tflite_runtime", "ai-edge-litert": "ai_edge_litert"}[runtime]
    pytest.importorskip(module, reason=f"{runtime} is not installed")
    samples = write_samples(tmp_path / "samples.npz", seed=1).removeprefix("npz:")
    command = (sys.executable, "-c", TRAIN, str(TASK), samples, runtime)
    free, shut_in = run(*command), run(*SHUT_IN, UNITS["device"], *command)
    assert free.returncode == 0, free.stderr
    assert shut_in.returncode == 0, shut_in.stderr
    assert shut_in.stdout == free.stdout


class ShutInFleet(Fleet):
    """A fleet whose processes are all shut in, the broker too."""

    def start(self):
        self.broker.start()  # once as it is, to have its configuration written
        self.broker.stop()
        conf = str(self.home.broker / "mosquitto.conf")
        self.mosquitto = Program(
            self.folder / "mosquitto.log", *SHUT_IN, UNITS["broker"], str(find_mosquitto()),
            "-c", conf,
        )  # fmt: skip
        self.programs.append(self.mosquitto)
        self.mosquitto.wait_for("running")
        self.start_server()
        return self

    def _run(self, log, *command):
        who = "device" if DEVICE[-1] in command else "server"
        assert DEVICE[-1] in command or MIDGE[-1] in command
        return super()._run(log, *SHUT_IN, str(ROOT / UNITS[who]), *command)


def test_a_federation_trains_with_server_device_and_broker_shut_in(tmp_path):
    fleet = ShutInFleet(tmp_path, settings='log = "debug"')
    try:
        fleet.start()
        watching = fleet.listen(TOPICS.metrics, "midge/v1/+/dev/+/state")
        fleet.midge("device", "add", "ann")
        fleet.device("ann", "--bundle", str(fleet.home.bundle("ann")))
        watching.wait_for_json(TOPICS.state("ann"), state="ready")
        fleet.start_run(task="wearables", rounds=2)
        closed = watching.wait_for_json(TOPICS.metrics, round=2, state="closed")
        assert closed["accepted"] == 1
        assert fleet.status()["model_version"] == 3
        for program in fleet.programs:
            assert program.terminate() == 0, program.log
            assert "Operation not permitted" not in program.log
    finally:
        fleet.stop()
