"""Simulated devices: the same code, the same keys, one seed and one story."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from device_client.participant import State
from device_client.simulation.fate import Fate

ROOT = Path(__file__).parents[2]
NAMES = [f"sim-{i:05d}" for i in range(1000)]


def test_the_same_seed_cuts_the_same_devices_in_the_same_places() -> None:
    story = [Fate(seed=7, drop=0.3).cut_at(name, 4) for name in NAMES]
    assert story == [Fate(seed=7, drop=0.3).cut_at(name, 4) for name in NAMES]
    assert story != [Fate(seed=8, drop=0.3).cut_at(name, 4) for name in NAMES]
    assert story != [Fate(seed=7, drop=0.3).cut_at(name, 5) for name in NAMES]


def test_the_shares_that_were_asked_for_are_drawn() -> None:
    fate = Fate(seed=1, drop=0.1, slow=0.05, slow_s=99.0)
    cut = [fate.cut_at(name, 1) for name in NAMES]
    assert 60 <= sum(state is not None for state in cut) <= 140
    assert {State.JOINING, State.FETCHING, State.TRAINING, State.UPLOADING} <= set(cut)
    slow = [name for name in NAMES if fate.train_for_s(name, 1) == 99.0]
    assert 25 <= len(slow) <= 80
    assert all(fate.train_for_s(name, 2) == 99.0 for name in slow)


def test_with_no_drop_and_no_slow_nobody_is_touched() -> None:
    assert all(Fate(seed=3).cut_at(name, 1) is None for name in NAMES)
    assert all(Fate(seed=3).train_for_s(name, 1) < 1.0 for name in NAMES)


@pytest.mark.parametrize("more", [[], ["--plain"]], ids=["tls", "plain"])
def test_fifty_devices_of_which_some_drop_out_and_some_are_slow(
    tmp_path: Path, more: list[str]
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "server.cli", "simulate", "--devices", "50", "--drop", "0.3",
            "--slow", "0.1", "--seed", "7", "--slow-s", "2", "--away-s", "1", "--train-s", "0.1",
            "--rounds", "2", "--cohort", "20", "--dir", str(tmp_path / "fleet"), "--json", *more,
        ],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [r["state"] for r in found["rounds"]] == ["closed", "closed"]
    assert all(r["accepted"] >= 20 for r in found["rounds"])
    assert found["cuts"] > 0
    assert found["rejected_by_devices"] == {}
    assert {"bad_signature", "bad_seal"}.isdisjoint(found["rejected_by_server"])
