"""A writing process killed from outside, at moments that nobody chose.

test_crashes.py tries every call of ours; these kills also fall inside SQLite's own.
"""

import signal
import subprocess
import sys
from pathlib import Path

from server.store.database import Database

ROOT = Path(__file__).parents[3]

WRITER = """
import sys
from server.store.database import Database
db = Database(sys.argv[1])
with db.reading() as tx:
    number = int(tx.meta("left") or 0)
while True:
    number += 1
    with db.transaction() as tx:
        tx.set_meta("left", str(number))
        for page in range(20):
            tx.set_meta(f"page-{page}", str(number) * 400)
        tx.set_meta("right", str(number))
    print(number, flush=True)
    if number % 10 == 0:
        db.checkpoint()
"""


def test_a_killed_writer_loses_no_commit_and_tears_none(tmp_path: Path) -> None:
    path = tmp_path / "midge.db"
    for kill in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(1 + kill * 3)][-1]
        child.send_signal(signal.SIGKILL)
        child.communicate()
        database = Database(path)
        with database.transaction() as tx:
            found = int(tx.meta("left") or 0)
            assert found >= said
            assert tx.meta("right") == str(found)
            pages = {tx.meta(f"page-{page}") for page in range(20)}
            assert pages == {str(found) * 400}
        database.close()
