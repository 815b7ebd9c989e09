"""Train jobs in a device's Python, one after the other: `python -m tests.pi.steps RUNTIME FOLDER…`.

Runs where pytest and TensorFlow are not: it imports what a device has. Each folder is as
`server.tasks.worker` reads and leaves it.
"""

import sys
from pathlib import Path

from server.tasks import worker


def main(runtime: str, *folders: str) -> None:
    for each in folders:
        worker.main(Path(each), runtime, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
