"""What both commands do with errors and signals, in processes of their own."""

import signal
import subprocess
import sys

import pytest

from tests.fleets import GIVE_UP_S, ROOT, run

COMMAND = """
import click
from broker_bridge.console import run_command, show_log, stop_on_signals
from broker_bridge.errors import LinkError, LocalError, PeerError

@click.command()
@click.option("--number", type=int)
def it(number):
    BODY

run_command(it, "midge-test")
"""


def ran(body, *arguments, **options):
    return run(sys.executable, "-c", COMMAND.replace("BODY", body), *arguments, **options)


@pytest.mark.parametrize("error", ["LocalError", "LinkError"])
def test_an_error_of_ours_is_one_sentence_and_exit_code_2(error):
    done = ran(f"raise {error}('the disk is full; make room')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "midge-test: the disk is full; make room\n"


def test_a_usage_error_is_one_sentence_that_says_where_the_help_is():
    done = ran("pass", "--number", "three")
    assert done.returncode == 2
    assert done.stderr.startswith("midge-test: Invalid value for '--number'")
    assert done.stderr.endswith("see `midge-test --help`\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_bug_of_ours_shows_its_traceback():
    done = ran("raise ZeroDivisionError")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_success_is_exit_code_0_and_silence():
    done = ran("pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_is_exit_code_0():
    done = ran("pass", "--help")
    assert done.returncode == 0
    assert "--number" in done.stdout


def test_a_reader_that_leaves_gets_no_traceback():
    command = COMMAND.replace("BODY", "\n    [click.echo('x' * 1000) for _ in range(9999)]")
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=ROOT) as process:  # fmt: skip
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_a_second_one_ends_the_process(number):
    body = "stopped = stop_on_signals(); click.echo('up'); stopped.wait(); click.echo('asked')"
    body += "\n    import time; time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", COMMAND.replace("BODY", body)], stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"asked\n"
        process.send_signal(number)
        assert process.wait(GIVE_UP_S) == -number
