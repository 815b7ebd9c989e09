"""What both commands do with errors, signals and log lines.

A person never sees a traceback for what they or the network did: one sentence on
standard error and exit code 2. Our own bugs do show theirs.
"""

import logging
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import click

from broker_bridge.errors import MidgeError

__all__ = ["run_command", "show_log", "stop_on_signals"]


def run_command(command: click.Command, name: str) -> NoReturn:
    """Run a click command and leave the process with its exit code."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        click.echo(f"{name}: {_one_line(error)}", err=True)
        code = 2
    except MidgeError as error:
        click.echo(f"{name}: {error}", err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}: interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: click.ClickException) -> str:
    """What was wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).rstrip(".")
    return text if context is None else f"{text}; see `{context.command_path} --help`"


def show_log(level: str) -> None:
    """Print log lines of midge on standard error, plain, as journald likes them."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; a second one ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return stopped
