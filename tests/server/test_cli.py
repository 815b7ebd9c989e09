"""`midge`, as a person types it: what it answers, and what it says to mistakes."""

import json
import os
import threading

import click
import numpy as np
import pytest

from server.cli import main, midge
from tests.fleets import (
    MIDGE,
    TASK,
    TOPICS,
    Fleet,
    commands_in,
    is_refusal,
    run,
    typed,
    wait_until,
    write_samples,
)


def said(*arguments, **environment):
    return typed(main, *(str(a) for a in arguments), **environment)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A fleet whose broker and server run, with one device that is here."""
    fleet = Fleet(tmp_path_factory.mktemp("served"))
    try:
        fleet.start()
        fleet.enrol("ann")
        fleet.device("ann")
        wait_until(lambda: fleet.state_of("ann").get("state") == "ready", "a device")
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def alone(tmp_path):
    """A fleet of which nothing runs."""
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.stop()


# ── Help ────────────────────────────────────────────────────────────────────────────────

ALL = list(commands_in(midge))


@pytest.mark.parametrize(("path", "command"), ALL, ids=["-".join(p) or "midge" for p, _ in ALL])
def test_every_command_has_help_with_an_example(path, command):
    with click.Context(command, info_name=" ".join(("midge", *path))) as context:
        text = command.get_help(context)
    example = text.partition("Example:")[2]
    assert " ".join(("midge", *path)) in example, text


def test_the_commands_that_were_promised_are_there():
    names = {" ".join(path) for path, _ in ALL}
    assert {
        "init", "broker", "server", "device add", "device accept", "device list", "device show",
        "device rotate", "device suspend", "device resume", "device revoke", "device replace",
        "device remove", "keys replace-operator", "start", "stop", "pause",
        "resume", "status", "watch", "model list", "model export", "demo",
    } <= names  # fmt: skip


# ── Mistakes before anything runs ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense", "midge --help"]),
        (["init"], ["FOLDER", "midge init --help"]),
        (["init", "{}/new", "--federation", "Ward 3"], ["'Ward 3'", "a-z, 0-9"]),
        (["init", "{}/new", "--port", "70000"], ["70000", "65535"]),
        (["init", "{}"], ["not empty"]),
        (["broker", "--dir", "{}/nowhere"], ["nowhere", "midge init"]),
        (["server", "--dir", "{}/nowhere"], ["nowhere", "midge init"]),
        (["status", "--dir", "{}/nowhere"], ["nowhere", "midge init"]),
        (["broker", "--port", "0", "--dir", "{}/fleet"], ["--port", "65535"]),
        (["server", "--broker", "localhost", "--dir", "{}/fleet"], ["'localhost'", "HOST:PORT"]),
        (["server", "--log", "loud", "--dir", "{}/fleet"], ["log", "debug, info, warning, error"]),
        (["server", "--task", "no.task", "--dir", "{}/fleet"], ["no.task", "correct the path"]),
        (["device", "add", "Ward_3", "--dir", "{}/fleet"], ["'Ward_3'", "a-z, 0-9"]),
        (["device", "add", "midge-server", "--dir", "{}/fleet"], ["midge-server"]),
        (["device", "add", "w", "--hours", "nan", "--dir", "{}/fleet"], ["nan hours"]),
        (["device", "add", "w", "--hours", "1e30", "--dir", "{}/fleet"], ["hours", "8760"]),
        (["start", "--rounds", "0", "--dir", "{}/fleet"], ["rounds"]),
        (["start", "--deadline", "nan", "--dir", "{}/fleet"], ["deadline_s"]),
        (["start", "--until-accuracy", "80", "--dir", "{}/fleet"], ["accuracy"]),
        (["model", "export", "-o", "m.npz", "--dir", "{}/fleet"], ["no such model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_gets_one_sentence(alone, arguments, words):
    is_refusal(said(*(a.format(alone.folder) for a in arguments)), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[broker\n", ["midge.toml", "TOML", "line 1"]),
        ("rouns = 3\n", ["midge.toml", "'rouns'", "rounds"]),
        ("[rounds]\ndeadline = 3\n", ["'rounds.deadline'", "deadline_s"]),
        ("[broker]\nport = 0\n", ["broker.port", ">= 1"]),
        ('[broker]\nport = "8883"\n', ["broker.port", "int"]),
        ("[rounds]\ndeadline_s = nan\n", ["rounds.deadline_s"]),
        ('[aggregation]\noptimiser = "sgd"\n', ["'sgd'", "fedavg, fedavgm, fedadam, fedyogi"]),
    ],
)
def test_settings_that_are_wrong_are_named(alone, text, words):
    (alone.home.folder / "midge.toml").write_text(text)
    is_refusal(alone.midge("device", "add", "ward-3"), *words)


def test_a_port_that_is_taken_is_named(served):
    is_refusal(served.midge("broker"), str(served.port), "cannot be used")


def test_a_second_server_on_one_fleet_is_refused(served):
    is_refusal(served.midge("server"), "a server is running")
    assert served.server.is_running


def test_a_device_that_is_enrolled_is_not_added_again(served):
    is_refusal(served.midge("device", "add", "ann"), "'ann' is enrolled already")


def test_an_unknown_task_is_named_with_those_that_are_known(served):
    is_refusal(served.midge("start", "--task", "nonsense"), "'nonsense'", "wearables")


@pytest.mark.parametrize("command", ["stop", "pause", "resume"])
def test_without_a_run_there_is_nothing_to_do(served, command):
    is_refusal(served.midge(command), "no run is open")


def test_a_start_while_a_run_is_open_is_refused(served):
    assert served.midge("start", "--target", "9", "--quorum", "9").returncode == 0
    try:
        is_refusal(served.midge("start"), "is open", '"stop"')
    finally:
        assert served.midge("stop").returncode == 0


def test_a_broker_or_server_that_is_not_there_is_named(fleets):
    """At the same time, as each waits for a while before it gives up."""
    dark, silent = fleets(), fleets()
    silent.broker.start()
    asked = {
        "no broker for the server": (dark, "server"),
        "no broker for status": (dark, "status"),
        "no broker for watch": (dark, "watch"),
        "no server": (silent, "status"),
        "no server for a script": (silent, "status --json"),
        "no server to stop": (silent, "stop"),
    }
    results = {}

    def ask(name):
        fleet, command = asked[name]
        results[name] = run(*MIDGE, *command.split(), "--dir", str(fleet.home.folder))

    threads = [threading.Thread(target=ask, args=(name,)) for name in asked]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    is_refusal(_last_line(results.pop("no broker for the server")), f"localhost:{dark.port}")
    is_refusal(results.pop("no server"), "midge server")
    assert results["no server for a script"].stdout == ""
    is_refusal(results.pop("no server for a script"), "midge server")
    is_refusal(results.pop("no server to stop"), "midge server", "may carry out this stop then")
    for done in results.values():
        is_refusal(done, f"localhost:{dark.port}")


def _last_line(done):
    """A server writes its log on standard error too; its last words are the sentence."""
    done.stderr = done.stderr.splitlines()[-1] + "\n"
    return done


# ── Answers ─────────────────────────────────────────────────────────────────────────────


def test_init_says_what_the_root_key_is_for_and_where_it_belongs(tmp_path):
    said = typed(main, "init", str(tmp_path / "fleet")).stdout
    for words in ("root.json", "midge keys rotate", "drawers", "stolen", "lost", "next:"):
        assert words in said
    assert (tmp_path / "fleet" / "offline" / "root.json").stat().st_mode & 0o777 == 0o600


def test_init_makes_a_fleet_whose_settings_load(tmp_path):
    done = said("init", tmp_path / "new", "--federation", "ward", "--port", "18883", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["federation"] == "ward"
    assert json.loads(said("device", "list", "--dir", tmp_path / "new", "--json").stdout) == []
    assert json.loads(said("model", "list", "--dir", tmp_path / "new", "--json").stdout) == []


def test_the_folder_can_come_from_the_environment(alone):
    done = run(*MIDGE, "device", "list", "--json",
               env=os.environ | {"MIDGE_DIR": str(alone.home.folder)})  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_json_is_json_for_every_command_that_offers_it(served):
    wait_until(lambda: served.status()["phase"] == "idle", "no run is open")
    listener = served.listen(TOPICS.metrics)
    answers = {
        "device list": ["device", "list"],
        "device add": ["device", "add", "new-one"],
        "status": ["status"],
        "start": ["start", "--task", "wearables", "--rounds", "1"],
    }
    found = {}
    for name, command in answers.items():
        done = served.midge(*command, "--json")
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    assert found["device list"][0]["device"] == "ann"
    assert found["device add"]["device"] == "new-one"
    assert found["status"]["phase"] == "idle"
    assert found["start"]["ok"]
    listener.wait(lambda m: not m.retained and b'"state":"closed"' in m.payload, "this run's round")
    models = json.loads(served.midge("model", "list", "--json").stdout)
    assert [m["version"] for m in models][-2:] == [2, 1]
    offering = {" ".join(p) for p, c in ALL if any("--json" in o.opts for o in c.params)}
    life = {name for name in map(" ".join, dict(ALL)) if name.startswith("device ")}
    steering = {"init", "stop", "pause", "resume", "watch", "demo", "model list"}
    assert {*answers, *life, *steering} <= offering


def test_people_get_plain_words_in_a_pipe(served):
    text = served.midge("status").stdout
    assert "phase" in text
    assert "\x1b" not in text
    assert "ann" in served.midge("device", "list").stdout


def test_a_model_is_exported_as_arrays(served, tmp_path):
    if not served.model_files():
        served.midge("start", "--task", "wearables")
        wait_until(lambda: "000002.weights" in served.model_files(), "a model")
    done = served.midge("model", "export", "--version", "1", "-o", str(tmp_path / "m.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "m.npz", allow_pickle=False) as found:
        assert "wearables/conv1d/kernel" in found.files
    is_refusal(served.midge("model", "export", "-o", str(tmp_path / "m.txt")), ".npz")


def test_watch_shows_presence_and_ends_in_order(served, tmp_path):
    log = tmp_path / "watch.log"
    watching = served._run(log, *MIDGE, "watch", "--json", "--dir", str(served.home.folder))
    watching.wait_for(TOPICS.state("ann"))
    assert watching.terminate() == 0
    for line in log.read_text().splitlines():
        assert set(json.loads(line)) == {"topic", "message"}


def test_the_broker_command_runs_until_it_is_stopped(alone):
    log = alone.folder / "broker.log"
    broker = alone._run(log, *MIDGE, "broker", "--dir", str(alone.home.folder))
    broker.wait_for("mosquitto listens on")
    assert broker.terminate() == 0


def test_a_settings_file_of_a_task_that_is_not_there_is_named(alone):
    path = alone.home.folder / "midge.toml"
    path.write_text(f'tasks = ["/no/such.task"]\n{path.read_text()}')
    is_refusal(alone.midge("server"), "/no/such.task")


def test_a_task_that_is_damaged_is_refused_at_the_start(fleets):
    fleet = fleets()
    data = TASK.read_bytes()
    (fleet.home.folder / "tasks" / "cut.task").write_bytes(data[: len(data) // 2])
    fleet.start()
    is_refusal(fleet.midge("start", "--task", "cut"), "cut.task", "bytes")
    assert fleet.server.is_running


def test_held_out_samples_that_do_not_fit_the_task_are_refused_at_the_start(fleets, tmp_path):
    source = write_samples(tmp_path / "wrong.npz", seed=1, labels=9)
    fleet = fleets(settings="")
    path = fleet.home.folder / "midge.toml"
    path.write_text(path.read_text() + f'npz = "{source.removeprefix("npz:")}"\n')
    fleet.start()
    is_refusal(fleet.midge("start", "--task", "wearables"), "wrong.npz", "is outside 0")
    assert fleet.server.is_running
    assert fleet.status()["phase"] == "idle"
