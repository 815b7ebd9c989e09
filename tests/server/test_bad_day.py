"""One bad day of an operator: each mistake and mishap gets one sentence, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from server.cli import main
from server.fleet.home import create
from tests.fleets import MIDGE, ROOT, TASK, is_refusal, run, typed, wait_until

OTHER_TASK = ROOT / "examples" / "digits" / "digits.task"


@pytest.fixture
def home(tmp_path):
    return create(tmp_path / "fleet", federation="demo", hosts=["localhost"], port=1)


def midge(home, *arguments):
    return typed(main, *arguments, "--dir", str(home.folder))


# ── The folder ──────────────────────────────────────────────────────────────────────────

COMMANDS = ["server", "broker", "status", "stop --without-server", "device add w", "keys repair",
            "doctor"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fleet_of_another_user_is_not_touched_and_he_is_named(home, command):
    """Root could write there, and the server could not read what he wrote."""
    folder, owner = home.folder, "nobody"
    if os.geteuid():
        folder, owner = Path("/"), "root"
    else:
        os.chown(folder, 65534, -1)
    before = sorted(home.folder.rglob("*"))
    done = typed(main, *command.split(), "--dir", str(folder))
    is_refusal(done, f"{folder} belongs to the user {owner}", f"sudo -u {owner} midge")
    assert sorted(home.folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["init", "restore"])
def test_no_fleet_is_made_in_a_folder_of_another_user_where_no_command_could_use_it(
    home, tmp_path, command
):
    """The root of a volume in a container, for example: anybody may write, root owns it."""
    backup, folder, owner = tmp_path / "fleet.backup", tmp_path / "volume", "nobody"
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("a long enough passphrase")
    said = ("--passphrase-file", str(passphrase))
    assert typed(main, "backup", str(backup), "--dir", str(home.folder), *said).returncode == 0
    folder.mkdir()
    if os.geteuid():
        folder, owner = Path("/"), "root"
    else:
        os.chown(folder, 65534, -1)
    arguments = [str(folder)] if command == "init" else [str(backup), str(folder), *said]
    done = typed(main, command, *arguments)
    is_refusal(done, f"{folder} belongs to the user {owner}", f"{folder / 'fleet'} for example")
    assert not (folder / "keys").exists()


def test_a_folder_that_lost_its_settings_is_not_called_empty(home):
    (home.folder / "midge.toml").unlink()
    is_refusal(midge(home, "status"), "has keys and no midge.toml", "put that file back")


@pytest.mark.parametrize("command", ["server", "status", "watch", "start"])
def test_settings_that_name_another_federation_than_the_keys_are_refused(home, command):
    path = home.folder / "midge.toml"
    path.write_text(path.read_text().replace('"demo"', '"other"'))
    is_refusal(midge(home, command), "'other'", "the keys are for 'demo'", "midge.toml")


@pytest.mark.parametrize("text", ["next_years_setting = 1", "[next_years_table]\nx = 1"])
def test_settings_of_a_newer_midge_are_named_and_not_passed_over(home, text):
    path = home.folder / "midge.toml"
    path.write_text(f"{text}\n" if text[0] == "[" else f"{text}\n{path.read_text()}")
    for command in ("server", "status", "broker"):
        is_refusal(midge(home, command), "midge.toml", "'next_years_", "allowed are")


# ── Words to the server, in each state ──────────────────────────────────────────────────


def phase(fleet):
    return fleet.status()["phase"]


def test_stop_pause_and_resume_are_answered_in_every_state(fleet):
    said = fleet.midge
    for word in ("stop", "pause", "resume"):
        is_refusal(said(word), "no run is open")
    assert said("start", "--target", "2", "--quorum", "2").returncode == 0
    assert phase(fleet) == "gathering"
    is_refusal(said("start"), "run 1", "is open")
    assert said("resume").returncode == 0
    assert phase(fleet) == "gathering"
    for _ in range(2):
        assert said("pause").returncode == 0
        assert phase(fleet) == "paused"
    is_refusal(said("start"), "run 1", "is open")
    assert fleet.server.terminate() == 0
    fleet.start_server()
    assert phase(fleet) == "paused"
    assert said("resume").returncode == 0
    assert phase(fleet) == "gathering"
    assert said("pause").returncode == 0
    assert json.loads(said("stop", "--json").stdout)["ok"]
    for word in ("stop", "pause", "resume"):
        is_refusal(said(word), "no run is open")
    assert fleet.server.is_running


def test_a_second_server_is_refused_and_the_first_one_goes_on(fleet):
    done = run(*MIDGE, "server", "--dir", str(fleet.home.folder))
    is_refusal(done, "a server is running for", "stop it first")
    assert phase(fleet) == "idle"


# ── A task file that is replaced ────────────────────────────────────────────────────────


def test_a_task_that_is_replaced_in_mid_run_is_trained_to_its_end_as_it_was(fleet):
    fleet.enrol("ann")
    fleet.device("ann")
    assert fleet.midge("start", "--target", "1", "--rounds", "2").returncode == 0
    wait_until(lambda: fleet.status()["model_version"] >= 1, "the run is open")
    shutil.copy(OTHER_TASK, fleet.home.folder / "tasks" / TASK.name)
    wait_until(lambda: phase(fleet) == "idle", "the run ends")
    assert fleet.status()["detail"] == "run 1 done: 2 rounds are done"


def test_a_server_that_restarts_with_another_task_of_that_name_says_so_and_loses_nothing(fleets):
    fleet = fleets().start()
    assert fleet.midge("start", "--target", "1", "--rounds", "2").returncode == 0
    assert fleet.server.terminate() == 0
    path = fleet.home.folder / "tasks" / TASK.name
    shutil.copy(OTHER_TASK, path)
    refused = fleet.midge("server")
    refused.stderr = refused.stderr.splitlines()[-1] + "\n"  # its log is there, too
    is_refusal(
        refused,
        "'wearables' was changed while run 1 was open",
        "put the old file back",
        "midge stop --without-server",
    )
    shutil.copy(TASK, path)
    fleet.start_server()
    assert fleet.status()["run"]["id"] == 1
    assert fleet.server.terminate() == 0
    shutil.copy(OTHER_TASK, path)  # or the run is given up, without the server
    assert fleet.midge("stop", "--without-server").returncode == 0
    fleet.start_server()
    assert phase(fleet) == "idle"
    assert fleet.midge("start", "--task", "wearables", "--target", "1").returncode == 0
