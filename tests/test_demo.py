"""`midge demo` as `make demo` runs it: real broker, ten real devices, a true closing table."""

import json
import subprocess
import sys
from pathlib import Path

MIDGE = str(Path(sys.executable).parent / "midge")


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MIDGE, "demo", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_demo_in_a_pipe_prints_plain_lines_and_learns() -> None:
    done = demo("--rounds", "2", "--accuracy", "0.99")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert [line[:14] for line in lines if line.startswith("round ")] == [
        "round 1 closed",
        "round 2 closed",
    ]
    assert any(line.startswith("what the broker could read  nothing") for line in lines)
    assert any("mutual TLS and ACL" in line for line in lines)


def test_the_demo_on_the_broker_from_pip_says_what_that_lacks() -> None:
    done = demo("--rounds", "4", "--accuracy", "0.75", "--broker", "iotcore", "--json")
    assert done.returncode == 0, done.stderr
    assert "iotcore" in done.stderr
    assert "no ACL" in done.stderr
    result = json.loads(done.stdout)
    accuracy = result["accuracy"]
    assert accuracy["alone_mean"] < accuracy["federated"]
    assert result["rounds"] < 4, "the target should end the run before the last round"
    assert result["broker"]["plaintext_windows_found"] == 0
    sizes = result["bytes_per_device_and_round"]
    assert sizes["up"] < 1.02 * sizes["update_float32"]
    assert result["seconds_per_round"]["training"] <= result["seconds_per_round"]["total"]
