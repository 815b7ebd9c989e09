import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from broker_bridge.disk import alone
from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import random_bytes
from server.cli import main as midge
from server.fleet.backup import back_up, remove_leftovers, restore
from server.fleet.enrolment import add_device
from server.fleet.home import Home, create
from server.fleet.keys import read_root
from server.fleet.sealed_file import Cost, Writer
from server.store.database import Database
from server.store.highest import HighestRound
from server.store.rows import Round, Run
from tests.fleets import is_refusal, typed

WORDS = "four words nobody guesses"
CHEAP = Cost(passes=1, memory_kib=8)
KEY = b"the key of an open round, 32 b.."


@pytest.fixture
def home(tmp_path):
    made = create(tmp_path / "fleet", federation="demo", hosts=["localhost"], port=8883)
    (made.folder / "tasks" / "my.task").write_bytes(b"a task")
    (made.state / "models").mkdir()
    (made.state / "models" / "000001.weights").write_bytes(b"a model")
    (made.state / "spool").mkdir()
    (made.state / "spool" / "update").write_bytes(b"a sealed update")
    (made.broker / "broker.log").write_text("a log")
    with contextlib.closing(Database(made.database)) as db:
        add_device(made, db, "ward-1", broker=made.config().broker, now=time.time())
        with db.transaction() as tx:
            run = tx.add_run(Run(task_name="my", task_digest=b"", rounds_total=9, target=1,
                                 quorum=1, deadline_s=60.0, started_at=0.0))  # fmt: skip
            tx.open_round(Round(number=7, run_id=run, announcement=b"", round_key=KEY,
                                model_before=1, opened_at=0.0))  # fmt: skip
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def restored(home: Home, now: float = 0.0, *, again: str = "again", **options):
    path = home.folder.parent / f"{again}.backup"
    back_up(home, path, WORDS, now=now, cost=CHEAP)
    return restore(path, home.folder.parent / again, WORDS, now=now, **options)


def test_every_key_setting_task_and_model_comes_back_as_it_was(home):
    before, after = files_of(home.folder), files_of(restored(home).home.folder)
    left_out = {
        "offline/root.json", "bundles/ward-1.bundle", "state/spool/update", "broker/broker.log",
    }  # fmt: skip
    made_anew = {"state/midge.db", "keys/server.json"}
    kept = {n for n in before if not re.search(r"lock|mosquitto.conf|-wal|-shm", n)} - left_out
    assert {n for n in after if not re.search(r"lock|-wal|-shm", n)} == kept
    assert {n: after[n] for n in kept - made_anew} == {n: before[n] for n in kept - made_anew}


def test_the_root_key_never_goes_in(home):
    seed = (home.folder / "offline" / "root.json").read_bytes()
    made = restored(home)
    assert not (made.home.folder / "offline").exists()
    assert all(seed not in data for data in files_of(made.home.folder).values())


def test_the_key_of_an_open_round_does_not_go_in_and_the_run_goes_on(home):
    assert any(KEY in data for data in files_of(home.folder).values())
    made = restored(home)
    assert all(KEY not in data for data in files_of(made.home.folder).values())
    with contextlib.closing(Database(made.home.database)) as db, db.reading() as tx:
        assert tx.current_round() is None
        assert tx.round(7).status == "abandoned"
        assert tx.current_run().status == "open"
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        assert tx.current_round().round_key == KEY  # the fleet itself is as it was


def test_what_is_restored_is_for_its_owner_alone(home):
    folder = restored(home).home.folder
    for path in (folder, *folder.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        if path.name != "midge.toml":
            assert path.stat().st_mode & 0o777 == wanted, path
    assert (folder.parent / "again.backup").stat().st_mode & 0o777 == 0o600


# ── Numbers only grow (decision 0080) ───────────────────────────────────────────────────


def next_numbers(home: Home) -> tuple[int, int]:
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        return tx.highest_round() + 1, tx.highest_model() + 1


def test_rounds_and_models_after_a_restore_are_above_all_that_can_have_been(home):
    made = restored(home, now=1_800_000_000.0)
    assert made.above == 1_800_000_000_000
    assert next_numbers(made.home) == (made.above + 1, made.above + 1)


def test_the_same_backup_restored_again_later_is_above_the_first_restore(home):
    path = home.folder.parent / "a.backup"
    back_up(home, path, WORDS, now=1.8e9, cost=CHEAP)
    first = restore(path, home.folder.parent / "first", WORDS, now=1.8e9 + 60)
    second = restore(path, home.folder.parent / "second", WORDS, now=1.8e9 + 120)
    rounds_between = 59_999  # a thousand rounds a second, for a minute
    assert next_numbers(second.home)[0] > next_numbers(first.home)[0] + rounds_between


def test_the_file_of_the_highest_round_stays_out_and_no_restored_fleet_is_below_it(home):
    path = home.state / "highest-round"
    HighestRound(path).note(9)  # the database's log with rounds 8 and 9 is lost
    made = restored(home, now=0.0)  # and the clock as well
    assert not (made.home.state / path.name).exists()  # it would be older than what it tells of
    assert next_numbers(made.home)[0] > 9
    shutil.copy(made.home.database, home.database)  # by hand, into the folder of before
    assert next_numbers(home)[0] > HighestRound(path).known


def test_a_clock_that_was_never_set_still_lets_the_numbers_grow(home):
    first = restored(home, now=0.0)
    assert first.above == 1_000_007
    second = restored(first.home, now=0.0, again="and-again")
    assert second.above == 2_000_007


def test_whoever_knows_better_than_the_clock_can_say_so(home):
    made = restored(home, now=0.0, above=5_000_000_000_000)
    assert next_numbers(made.home)[0] == 5_000_000_000_001


def test_the_next_fleet_key_and_the_next_identity_are_above_all_that_can_have_been(home):
    root = read_root(home.folder / "offline" / "root.json")
    before = home.keys()
    lost = home.next_epoch()  # somebody was revoked, and the server's keys were rotated, since
    rotated = before.with_next_identity(root, random_bytes, now=0.0)
    made = restored(home, now=1.8e9).home
    after = made.keys()
    assert after.fleet_epoch > max(lost.fleet_epoch, 1_800_000_000)
    assert after.fleet_key not in (before.fleet_key, lost.fleet_key)
    assert (after.sign_seed, after.kem_seed, after.identity) == (
        before.sign_seed, before.kem_seed, before.identity,
    )  # fmt: skip
    again = after.with_next_identity(root, random_bytes, now=0.0)
    assert again.said.sequence > max(rotated.said.sequence, 1_800_000_000)
    assert made.next_epoch().fleet_epoch == after.fleet_epoch + 1
    later = after.restored(random_bytes, now=1.8e9 - 1e6)  # a clock that went back
    assert later.fleet_epoch > after.fleet_epoch


def test_a_token_that_may_have_been_used_since_is_void(home):
    now = time.time()
    made = restored(home, now=now)
    assert made.tokens_void == 1
    with contextlib.closing(Database(made.home.database)) as db, db.reading() as tx:
        assert tx.token("ward-1").expires_at <= now


# ── One sentence for each mistake ───────────────────────────────────────────────────────


def test_a_backup_is_not_written_over_another_file(home, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(LocalError, match="is there already"):
        back_up(home, tmp_path / "mine", WORDS, now=0.0, cost=CHEAP)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_with_something_in_it_is_not_touched(home, tmp_path):
    back_up(home, tmp_path / "a.backup", WORDS, now=0.0, cost=CHEAP)
    before = files_of(home.folder)
    with pytest.raises(LocalError, match="is not empty"):
        restore(tmp_path / "a.backup", home.folder, WORDS, now=0.0)
    assert files_of(home.folder) == before


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("what", ["other words", "cut short", "altered at the end"])
def test_what_cannot_be_opened_leaves_nothing_behind(home, tmp_path, what, made_before):
    path, folder = tmp_path / "a.backup", tmp_path / "again"
    back_up(home, path, WORDS, now=0.0, cost=CHEAP)
    data = path.read_bytes()
    if what == "cut short":
        path.write_bytes(data[: 39 + 65_552])
    if what == "altered at the end":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if made_before:
        folder.mkdir()
    words = "four other words here" if what == "other words" else WORDS
    with pytest.raises(LocalError, match="wrong" if what == "other words" else "altered or cut"):
        restore(path, folder, words, now=0.0)
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize("name", ["../outside", "keys/../../outside", "etc/passwd", "/etc/x"])
def test_a_name_that_no_backup_has_is_refused(tmp_path, name):
    with (tmp_path / "a.backup").open("wb") as out:
        sealed = Writer(out, WORDS, cost=CHEAP)
        with tarfile.open(mode="w|", fileobj=sealed) as tar:
            tar.addfile(tarfile.TarInfo(name))
        sealed.finish()
    with pytest.raises(LocalError, match="the backup holds"):
        restore(tmp_path / "a.backup", tmp_path / "again", WORDS, now=0.0)
    assert not (tmp_path / "outside").exists()


def test_a_full_or_missing_disk_leaves_no_half_a_backup(home, tmp_path):
    with pytest.raises(LocalError, match="no such file or folder"):
        back_up(home, tmp_path / "nowhere" / "a.backup", WORDS, now=0.0, cost=CHEAP)
    with pytest.raises(LocalError, match="at least 12"):
        back_up(home, tmp_path / "a.backup", "short", now=0.0, cost=CHEAP)
    assert [p.name for p in tmp_path.iterdir()] == ["fleet"]
    assert {p.name for p in home.state.iterdir()} <= {
        "midge.db", "midge.db-wal", "midge.db-shm", "models", "spool",
    }  # fmt: skip


def killed_in_mid_backup(home, path):
    """Make a backup in a process that gets SIGKILL when it reads the first of the keys."""
    child = os.fork()
    if child == 0:

        def strike(event, args):
            if event == "open" and str(args[0]).endswith("ca-key.pem"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        try:
            back_up(home, path, WORDS, now=0.0, cost=CHEAP)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_what_a_killed_backup_left_behind_goes_with_the_next_one(home, tmp_path):
    killed_in_mid_backup(home, tmp_path / "a.backup")
    assert (home.state / "backup" / "midge.db").exists()
    back_up(home, tmp_path / "b.backup", WORDS, now=0.0, cost=CHEAP)
    assert not (home.state / "backup").exists()
    assert not (tmp_path / "a.backup").exists()


def test_what_a_killed_backup_left_behind_goes_when_the_server_starts(home, tmp_path):
    killed_in_mid_backup(home, tmp_path / "a.backup")
    with alone(home.folder / "keys" / "backup.lock"):  # as if one were being made
        remove_leftovers(home)
        assert (home.state / "backup").exists()
    done = typed(midge, "server", "--task", "no.task", "--dir", str(home.folder))
    is_refusal(done, "no.task")
    assert not (home.state / "backup").exists()


def test_a_fleet_whose_server_has_never_run_can_be_backed_up(tmp_path):
    new = create(tmp_path / "new", federation="demo", hosts=["localhost"], port=8883)
    assert restored(new).home.keys().federation == "demo"


# ── The commands ────────────────────────────────────────────────────────────────────────


def test_the_commands_say_what_they_did_and_mistakes_are_one_sentence(home, tmp_path):
    words, path = tmp_path / "words", str(tmp_path / "a.backup")
    words.write_text(WORDS + "\n")
    fleet = ("--dir", str(home.folder), "--passphrase-file", str(words))
    done = typed(midge, "backup", path, *fleet)
    assert done.returncode == 0, done.stderr
    assert "0 devices, up to round 7" in done.stdout
    is_refusal(typed(midge, "backup", path, *fleet), "is there already")
    again = typed(midge, "restore", path, str(tmp_path / "b"), "--passphrase-file", str(words))
    assert again.returncode == 0, again.stderr
    assert "restored the fleet 'demo'" in again.stdout
    assert "revoke again what was revoked" in again.stdout
    words.write_text("some other words\n")
    wrong = typed(midge, "restore", path, str(tmp_path / "c"), "--passphrase-file", str(words))
    is_refusal(wrong, "the passphrase is wrong, or")
    words.write_bytes(b"\xff\xfe")
    is_refusal(typed(midge, "backup", path + "2", *fleet), "is no text")


def test_whoever_is_asked_for_a_passphrase_is_asked_twice_and_does_not_see_it(home, tmp_path):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "backup", str(tmp_path / "a.backup"), "--dir",
         str(home.folder)],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    said = b""
    for question in (b"Passphrase: ", b"confirmation: "):
        while not said.endswith(question):
            said += os.read(leader, 1)
        os.write(leader, WORDS.encode() + b"\n")
    with contextlib.suppress(OSError):  # what a terminal says when its last user went
        while part := os.read(leader, 1024):
            said += part
    assert process.wait(60) == 0, said
    os.close(leader)
    assert WORDS.encode() not in said
    assert (tmp_path / "a.backup").exists()
