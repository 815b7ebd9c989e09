"""The database through its front door: real SQLite files, and the rules it keeps."""

import resource
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateIndex, CreateTable

from broker_bridge.errors import LocalError, PeerError
from server.store import schema
from server.store.database import Database
from server.store.fleet_queries import REQUESTS_KEPT_MAX
from server.store.rows import Certificate, Device, Model, Receipt, Round, Run, Token
from server.store.transaction import Transaction

SECRET = b"\x5ethis is secret, all 32 bytes of"

DEVICE = Device(
    name="pi-1",
    sign_public=b"s" * 32,
    kem_public=b"k" * 32,
    tls_public=b"t" * 32,
    psk=SECRET,
    software="midge 0.1",
    enrolled_at=1000.5,
)
RUN = Run(
    task_name="wearables",
    task_digest=b"d" * 32,
    rounds_total=10,
    until_json='{"accuracy":0.8}',
    target=8,
    quorum=4,
    deadline_s=60.0,
    started_at=1.0,
)
ROUND = Round(
    number=1,
    run_id=1,
    announcement=b"signed \x00 bytes",
    round_key=SECRET,
    model_before=0,
    opened_at=2.0,
)
RECEIPT = Receipt(upload=b"upload-1", round=1, device="pi-1", init=b"signed", examples=120, at=3.0)
MODEL = Model(
    version=0, task_digest=b"d" * 32, digest=b"m" * 32, size_bytes=1234, round=0, created_at=1.0
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "midge.db"


@pytest.fixture
def db(path: Path) -> Iterator[Database]:
    database = Database(path)
    yield database
    database.close()


@pytest.fixture
def tx(db: Database) -> Iterator[Transaction]:
    """A transaction in which a run has its first round open, with two devices."""
    with db.transaction() as tx:
        tx.add_device(DEVICE)
        tx.add_device(replace(DEVICE, name="pi-2"))
        tx.add_run(RUN)
        tx.open_round(ROUND)
        yield tx


# ── All or nothing ──────────────────────────────────────────────────────────────────────


def test_what_was_committed_is_there_after_a_restart(path: Path) -> None:
    first = Database(path)
    with first.transaction() as tx:
        tx.add_device(DEVICE)
    first.close()
    with Database(path).reading() as tx:
        assert tx.device("pi-1") == DEVICE


def test_a_block_that_raises_changes_nothing(db: Database) -> None:
    def half_done() -> None:
        with db.transaction() as tx:
            tx.add_device(DEVICE)
            tx.set_meta("key", "value")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_done()
    with db.reading() as tx:
        assert tx.device("pi-1") is None
        assert tx.meta("key") is None


def test_a_reader_sees_one_moment_and_holds_up_no_writer(db: Database) -> None:
    with db.reading() as reader:
        assert reader.meta("key") is None
        with db.transaction() as writer:
            writer.set_meta("key", "value")
        assert reader.meta("key") is None
    with db.reading() as reader:
        assert reader.meta("key") == "value"


def test_another_process_reads_while_this_one_writes(path: Path, db: Database) -> None:
    other = Database(path)
    with db.transaction() as writer:
        writer.set_meta("key", "value")
        with other.reading() as reader:
            assert reader.meta("key") is None
    other.close()


# ── The file ────────────────────────────────────────────────────────────────────────────


def test_only_its_owner_can_read_it(path: Path, db: Database) -> None:
    with db.transaction() as tx:
        tx.add_device(DEVICE)
    files = list(path.parent.iterdir())
    assert {p.name for p in files} == {"midge.db", "midge.db-wal", "midge.db-shm"}
    assert {p.stat().st_mode & 0o777 for p in files} == {0o600}


def test_sqlite_is_set_to_survive_a_power_cut(db: Database) -> None:
    with db._engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    full = 2
    assert found == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "secure_delete": 1,
    }


@pytest.mark.parametrize("abandoned", [False, True], ids=["closed", "abandoned"])
@pytest.mark.parametrize("summary_chars", [2, 1500, 20_000])
def test_the_keys_of_a_round_are_nowhere_in_the_files_after_its_end(
    path: Path, db: Database, summary_chars: int, abandoned: bool
) -> None:
    """Also when the row has grown and moved, and its old place is only free space."""
    keys = bytes(range(100, 132)), bytes(range(140, 172))
    with db.transaction() as tx:
        tx.add_run(RUN)
        tx.open_round(replace(ROUND, round_key=keys[0], fleet_key=keys[1]))
    for key in keys:
        assert any(key in p.read_bytes() for p in path.parent.iterdir())
    db.checkpoint()
    summary = "x" * summary_chars
    with db.transaction() as tx:
        if abandoned:
            tx.abandon_round(1, closed_at=9.0, summary_json=summary)
        else:
            tx.close_round(1, model_after=1, closed_at=9.0, summary_json=summary)
    db.checkpoint()
    for key in keys:
        assert not any(key in p.read_bytes() for p in path.parent.iterdir())


def test_a_newer_schema_is_refused_in_one_sentence(path: Path) -> None:
    database = Database(path)
    with database.transaction() as tx:
        tx.set_meta("schema", "99")
    database.close()
    with pytest.raises(LocalError, match=r"midge\.db: written by a newer midge \(schema 99"):
        Database(path)


def test_what_is_no_database_is_refused_and_left_as_it_is(path: Path) -> None:
    text = b"this is my diary, it is longer than a header of a hundred bytes " * 20
    path.write_bytes(text)
    path.chmod(0o644)
    with pytest.raises(LocalError, match=r"midge\.db: this is not a midge database"):
        Database(path)
    assert path.read_bytes() == text
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_damaged_database_is_named(path: Path) -> None:
    database = Database(path)
    with database.transaction() as tx:
        for number in range(300):
            tx.add_device(replace(DEVICE, name=f"pi-{number:04d}"))
    database.checkpoint()
    database.close()
    data = bytearray(path.read_bytes())
    data[4096:-4096] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)

    def read_all() -> None:
        with Database(path).reading() as tx:
            tx.devices(limit=5000)

    with pytest.raises(LocalError, match=r"midge\.db: it is damaged; restore it"):
        read_all()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"nowhere/midge\.db: there is no such"):
        Database(tmp_path / "nowhere" / "midge.db")


def test_a_url_that_cannot_be_used_says_so_without_the_password() -> None:
    with pytest.raises(LocalError, match="cannot be used") as caught:
        Database("nosuchdatabase://user:hunter2@host/midge")
    assert "hunter2" not in str(caught.value)


def test_a_url_opens_the_same_database_as_a_path(path: Path, db: Database) -> None:
    with db.transaction() as tx:
        tx.add_device(DEVICE)
    by_url = Database(f"sqlite:///{path}")
    with by_url.reading() as tx:
        assert tx.device("pi-1") == DEVICE
    with by_url._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    by_url.close()


def test_a_database_that_another_program_holds_is_named(path: Path, db: Database) -> None:
    with db.transaction(), pytest.raises(LocalError, match=r"midge\.db: another process holds it"):
        Database(path, busy_timeout_s=0.0)


def test_a_write_that_the_disk_refuses_loses_nothing_and_can_be_tried_again(
    path: Path, db: Database
) -> None:
    with db.transaction() as tx:
        tx.set_meta("kept", "yes")

    def write_much() -> None:
        with db.transaction() as tx:
            for number in range(200):
                tx.set_meta(f"large-{number}", "x" * 10_000)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100_000, before[1]))
    try:
        with pytest.raises(LocalError, match=r"midge\.db: "):
            write_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with db.transaction() as tx:
        assert tx.meta("kept") == "yes"
        assert tx.meta("large-0") is None
        tx.set_meta("large-0", "x" * 10_000)


def test_a_commit_that_fails_leaves_no_transaction_behind(db: Database) -> None:
    def unheard_of() -> None:
        with db.transaction() as tx:
            tx._sql.exec_driver_sql("PRAGMA defer_foreign_keys=ON")  # so that COMMIT says no
            tx.add_receipt(RECEIPT)  # of no round there is

    for _ in range(3):
        with pytest.raises(IntegrityError):
            unheard_of()
        with db.reading() as tx:
            assert tx.receipt(RECEIPT.upload) is None
        with db.transaction() as tx:
            tx.set_meta("after", "it")


def test_every_table_can_be_written_for_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in schema.METADATA.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
    indexes = [str(CreateIndex(i).compile(dialect=dialect)) for i in schema.receipts.indexes]
    assert any("WHERE status = 'accepted'" in text for text in indexes)


# ── No secret shows ─────────────────────────────────────────────────────────────────────


def test_no_secret_is_in_a_repr() -> None:
    token = Token(device="pi-1", secret=SECRET, created_at=1.0, expires_at=2.0)
    for row in (DEVICE, ROUND, token):
        assert "secret" not in repr(row)
        assert "pi-1" in repr(row) or "number=1" in repr(row)


def test_no_secret_is_in_the_text_of_a_database_error(db: Database) -> None:
    with pytest.raises(Exception, match="FOREIGN KEY") as caught, db.transaction() as tx:
        tx.open_round(replace(ROUND, run_id=77))
    assert "this is secret" not in str(caught.value)


# ── Meta, devices, tokens ───────────────────────────────────────────────────────────────


def test_boots_are_counted_over_restarts(path: Path) -> None:
    boots = []
    for _ in range(3):
        database = Database(path)
        with database.transaction() as tx:
            boots.append(tx.next_boot())
        database.close()
    assert boots == [1, 2, 3]


def test_the_fleet_epoch_never_goes_back(tx: Transaction) -> None:
    assert tx.fleet_epoch() == 0
    tx.set_fleet_epoch(3)
    tx.set_fleet_epoch(3)
    with pytest.raises(ValueError, match="never goes back"):
        tx.set_fleet_epoch(2)
    assert tx.fleet_epoch() == 3


def test_a_device_that_enrols_anew_is_replaced_whole(tx: Transaction) -> None:
    tx.set_device_status("pi-1", "revoked")
    anew = replace(DEVICE, sign_public=b"n" * 32, enrolled_at=2000.0)
    tx.add_device(anew)
    assert tx.device("pi-1") == anew
    assert tx.device_counts() == {"enrolled": 2}


def test_devices_come_in_pages(tx: Transaction) -> None:
    for number in range(10, 35):
        tx.add_device(replace(DEVICE, name=f"node-{number}", status="suspended"))
    names: list[str] = []
    while page := tx.devices(after=names[-1] if names else "", limit=10):
        names += [device.name for device in page]
    assert names == sorted([f"node-{n}" for n in range(10, 35)] + ["pi-1", "pi-2"])
    assert [d.name for d in tx.devices(status="enrolled")] == ["pi-1", "pi-2"]
    assert tx.device_counts() == {"enrolled": 2, "suspended": 25}


def test_when_a_device_was_seen_is_noted(tx: Transaction) -> None:
    tx.device_seen("pi-1", 50.0, round=4)
    tx.device_seen("pi-1", 60.0)
    found = tx.device("pi-1")
    assert found is not None
    assert (found.last_seen, found.last_round) == (60.0, 4)


def test_a_token_is_used_once(tx: Transaction) -> None:
    token = Token(device="pi-9", secret=SECRET, created_at=1.0, expires_at=100.0)
    assert not tx.use_token("pi-9", 5.0)
    tx.put_token(token)
    assert tx.token("pi-9") == token
    assert tx.use_token("pi-9", 6.0)
    assert not tx.use_token("pi-9", 7.0)
    assert tx.token("pi-9") == replace(token, used_at=6.0)
    tx.put_token(replace(token, secret=b"n" * 32))
    assert tx.use_token("pi-9", 8.0)


def test_whether_a_person_must_accept_is_kept_with_the_token(tx: Transaction) -> None:
    token = Token(device="pi-9", secret=SECRET, created_at=1.0, expires_at=100.0, by_hand=True)
    tx.put_token(token)
    assert tx.token("pi-9") == token


def test_the_tokens_that_nobody_used_are_listed(tx: Transaction) -> None:
    tokens = [
        Token(device=name, secret=SECRET, created_at=1.0, expires_at=100.0)
        for name in ("pi-9", "pi-8", "pi-7")
    ]
    for each in tokens:
        tx.put_token(each)
    tx.use_token("pi-8", 5.0)
    assert tx.unused_tokens() == [tokens[2], tokens[0]]


def test_a_token_that_was_taken_back_is_gone(tx: Transaction) -> None:
    tx.put_token(Token(device="pi-9", secret=SECRET, created_at=1.0, expires_at=100.0))
    tx.drop_token("pi-9")
    tx.drop_token("never given")
    assert tx.token("pi-9") is None


def test_a_removed_device_is_in_no_list_but_its_own(tx: Transaction) -> None:
    tx.set_device_status("pi-1", "removed")
    assert [d.name for d in tx.devices()] == ["pi-2"]
    assert [d.name for d in tx.devices(status="removed")] == ["pi-1"]


def test_what_a_device_is_to_be_asked_for_is_kept(tx: Transaction) -> None:
    tx.set_device_wanted("pi-1", "rotate")
    assert tx.device("pi-1") == replace(DEVICE, wanted="rotate")


def test_every_certificate_of_a_name_is_kept_and_the_last_is_the_devices(tx: Transaction) -> None:
    bundles = Certificate(serial="0a", device="pi-1", until=5.0)
    newest = Certificate(serial="ff" * 20, device="pi-1", until=9.0)
    tx.add_certificate(bundles)
    tx.add_certificate(newest)
    tx.add_certificate(Certificate(serial="0b", device="pi-9", until=5.0))  # no device as yet
    assert tx.certificates("pi-1") == [bundles, newest]
    found = tx.device("pi-1")
    assert found is not None
    assert (found.certificate_serial, found.certified_until) == (newest.serial, 9.0)
    assert [each.serial for each in tx.certificates("pi-9")] == ["0b"]


def test_changes_of_the_fleet_are_counted(tx: Transaction) -> None:
    assert tx.fleet_changes() == 0
    tx.count_fleet_change()
    tx.count_fleet_change()
    assert tx.fleet_changes() == 2


@pytest.mark.parametrize("status", ["suspended", "revoked"])
def test_to_change_a_device_that_is_not_there_is_our_own_mistake(
    tx: Transaction, status: str
) -> None:
    with pytest.raises(ValueError, match="no such row in devices"):
        tx.set_device_status("nobody", status)  # type: ignore[arg-type]


# ── Runs and rounds ─────────────────────────────────────────────────────────────────────


def test_one_run_at_a_time(tx: Transaction) -> None:
    with pytest.raises(ValueError, match="one run at a time"):
        tx.add_run(RUN)
    tx.set_run_status(1, "paused", reason="asked to")
    with pytest.raises(ValueError, match="one run at a time"):
        tx.add_run(RUN)
    tx.set_run_status(1, "stopped", reason="asked to", ended_at=9.0)
    assert tx.current_run() is None
    assert tx.latest_run() == replace(RUN, id=1, status="stopped", reason="asked to", ended_at=9.0)
    assert tx.add_run(RUN) == 2
    assert tx.current_run() == replace(RUN, id=2)


def test_the_rounds_of_a_run_are_counted(tx: Transaction) -> None:
    tx.count_round_done(1)
    tx.count_round_done(1)
    assert tx.run(1) == replace(RUN, id=1, rounds_done=2)


def test_a_round_goes_from_open_to_closed_and_its_key_goes(tx: Transaction) -> None:
    assert tx.current_round() == ROUND
    tx.close_round(1, model_after=1, closed_at=9.0, summary_json='{"devices":3}')
    assert tx.current_round() is None
    closed = replace(
        ROUND,
        status="closed",
        round_key=None,
        model_after=1,
        closed_at=9.0,
        summary_json='{"devices":3}',
    )
    assert tx.round(1) == closed
    assert tx.rounds_of(1) == [closed]


def test_an_abandoned_round_has_no_model_and_no_key(tx: Transaction) -> None:
    tx.abandon_round(1, closed_at=9.0, summary_json="{}")
    found = tx.round(1)
    assert found is not None
    assert (found.status, found.model_after, found.round_key) == ("abandoned", None, None)


def test_a_round_ends_once(tx: Transaction) -> None:
    tx.close_round(1, model_after=1, closed_at=9.0, summary_json="{}")
    with pytest.raises(ValueError, match="no such row"):
        tx.abandon_round(1, closed_at=10.0, summary_json="{}")


def test_one_round_at_a_time_and_numbers_only_grow(tx: Transaction) -> None:
    with pytest.raises(ValueError, match="one round at a time"):
        tx.open_round(replace(ROUND, number=2))
    tx.abandon_round(1, closed_at=9.0, summary_json="{}")
    with pytest.raises(ValueError, match="only grow"):
        tx.open_round(ROUND)
    tx.open_round(replace(ROUND, number=5))
    assert tx.highest_round() == 5


def test_the_database_itself_refuses_a_second_open_round(path: Path, db: Database) -> None:
    with db.transaction() as tx:
        tx.add_run(RUN)
        tx.open_round(ROUND)
    raw = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(
            "INSERT INTO rounds SELECT 2, run_id, status, announcement, round_key, fleet_key,"
            " model_before, model_after, opened_at, closed_at, summary_json FROM rounds"
        )
    raw.close()


# ── Receipts ────────────────────────────────────────────────────────────────────────────


def test_a_receipt_is_settled_once(tx: Transaction) -> None:
    tx.add_receipt(RECEIPT)
    tx.settle(b"upload-1", "accepted", at=4.0)
    assert tx.receipt(b"upload-1") == structs.replace(RECEIPT, status="accepted", at=4.0)
    for status in ("rejected", "late", "accepted"):
        with pytest.raises(ValueError, match="only once"):
            tx.settle(b"upload-1", status, at=5.0)  # type: ignore[arg-type]
    assert tx.receipt(b"upload-1") == structs.replace(RECEIPT, status="accepted", at=4.0)


def test_a_device_is_counted_once_in_a_round(tx: Transaction) -> None:
    tx.add_receipt(RECEIPT)
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-2"))
    tx.settle(b"upload-1", "accepted", at=4.0)
    with pytest.raises(PeerError) as caught:
        tx.settle(b"upload-2", "accepted", at=5.0)
    assert caught.value.reason == "already_counted"
    with pytest.raises(PeerError):
        tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-3", status="accepted"))
    tx.settle(b"upload-2", "rejected", at=5.0, reason="already counted")
    assert tx.receipt_counts(1) == {"accepted": 1, "rejected": 1}


def test_the_database_itself_refuses_to_count_a_device_twice(path: Path, db: Database) -> None:
    with db.transaction() as tx:
        tx.add_device(DEVICE)
        tx.add_run(RUN)
        tx.open_round(ROUND)
        tx.add_receipt(RECEIPT)
        tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-2"))
    raw = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute("UPDATE receipts SET status='accepted'")
    raw.close()


def accepted(count: int, *, start: int = 0) -> list[Receipt]:
    return [
        structs.replace(
            RECEIPT, upload=n.to_bytes(8, "big"), device=f"node-{n}", status="accepted", at=10.0 + n
        )
        for n in range(start, start + count)
    ]


def with_nodes(tx: Transaction, count: int) -> None:
    for n in range(count):
        tx.add_device(replace(DEVICE, name=f"node-{n}"))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20, 33])
def test_updates_of_a_group_are_noted_together(tx: Transaction, count: int) -> None:
    with_nodes(tx, 70)
    tx.add_accepted(accepted(count))
    tx.add_accepted(accepted(count, start=count))
    assert tx.receipts(1) == accepted(2 * count)


@pytest.mark.parametrize("twice", [0, 3, 6])
def test_a_group_with_a_device_that_was_counted_before_is_refused_whole(
    db: Database, twice: int
) -> None:
    with db.transaction() as tx:
        with_nodes(tx, 7)
        tx.add_run(RUN)
        tx.open_round(ROUND)
        tx.add_accepted([structs.replace(accepted(1, start=twice)[0], upload=b"earlier!")])

    def add() -> None:
        with db.transaction() as tx:
            tx.add_accepted(accepted(7))

    with pytest.raises(PeerError) as caught:
        add()
    assert caught.value.reason == "already_counted"
    with db.reading() as tx:
        assert [each.upload for each in tx.receipts(1)] == [b"earlier!"]


def test_a_group_that_names_a_device_twice_is_refused_whole(tx: Transaction) -> None:
    with_nodes(tx, 2)
    one, two = accepted(2)
    with pytest.raises(PeerError) as caught:
        tx.add_accepted([one, two, structs.replace(one, upload=b"another!")])
    assert caught.value.reason == "already_counted"
    assert tx.receipts(1) == []


def test_a_device_that_was_counted_in_another_round_or_refused_in_this_one_is_counted(
    tx: Transaction,
) -> None:
    with_nodes(tx, 1)
    (one,) = accepted(1)
    tx.add_accepted([one])
    tx.close_round(1, model_after=1, closed_at=9.0, summary_json="{}")
    tx.open_round(replace(ROUND, number=2))
    tx.add_receipt(structs.replace(one, upload=b"refused!", round=2, status="rejected"))
    tx.add_accepted([structs.replace(one, upload=b"another!", round=2)])
    assert tx.receipt_counts(2) == {"accepted": 1, "rejected": 1}


def test_an_update_of_a_device_that_is_not_there_is_our_own_mistake(db: Database) -> None:
    with db.transaction() as tx:
        tx.add_run(RUN)
        tx.open_round(ROUND)
    with pytest.raises(Exception, match="FOREIGN KEY"), db.transaction() as tx:
        tx.add_accepted(accepted(1))


def test_two_databases_in_one_process_take_updates(tmp_path: Path) -> None:
    for name in ("one", "two"):
        database = Database(tmp_path / name)
        with database.transaction() as tx:
            with_nodes(tx, 3)
            tx.add_run(RUN)
            tx.open_round(ROUND)
            tx.add_accepted(accepted(3))
            assert tx.receipts(1) == accepted(3)
        database.close()


@pytest.mark.parametrize("ending", ["closed", "abandoned"])
def test_a_device_was_last_seen_when_its_update_was_accepted(tx: Transaction, ending: str) -> None:
    tx.device_seen("pi-2", 2.5, round=0)
    tx.add_accepted([structs.replace(RECEIPT, status="accepted", at=7.0)])
    tx.add_receipt(
        structs.replace(RECEIPT, upload=b"refused!", device="pi-2", status="rejected", at=8.0)
    )
    assert tx.seen_in(1) == {"pi-1": 7.0}
    if ending == "closed":
        tx.close_round(1, model_after=1, closed_at=9.0, summary_json="{}")
    else:
        tx.abandon_round(1, closed_at=9.0, summary_json="{}")
    assert tx.device("pi-1") == replace(DEVICE, last_seen=7.0, last_round=1)
    assert tx.device("pi-2") == replace(DEVICE, name="pi-2", last_seen=2.5)


def test_a_device_that_enrolled_anew_since_its_update_was_seen_then(tx: Transaction) -> None:
    tx.add_accepted([structs.replace(RECEIPT, status="accepted", at=7.0)])
    anew = replace(DEVICE, last_seen=8.0)
    tx.add_device(anew)
    tx.close_round(1, model_after=1, closed_at=9.0, summary_json="{}")
    assert tx.device("pi-1") == anew


def test_a_device_is_seen_also_after_the_clock_of_this_machine_was_set_back(
    tx: Transaction,
) -> None:
    tx.device_seen("pi-1", 5000.0, round=1)
    tx.abandon_round(1, closed_at=5000.0, summary_json="{}")
    tx.open_round(replace(ROUND, number=2))
    tx.add_accepted([structs.replace(RECEIPT, round=2, status="accepted", at=7.0)])
    tx.abandon_round(2, closed_at=9.0, summary_json="{}")
    assert tx.device("pi-1") == replace(DEVICE, last_seen=7.0, last_round=2)


def test_a_device_whose_update_was_withdrawn_was_seen_all_the_same(tx: Transaction) -> None:
    other = structs.replace(RECEIPT, upload=b"other", device="pi-2", status="accepted")
    tx.add_accepted([structs.replace(RECEIPT, status="accepted", at=7.0), other])
    tx.withdraw(1, "pi-1", at=8.0, reason="revoked")
    assert tx.device("pi-1") == replace(DEVICE, last_seen=7.0, last_round=1)
    assert tx.device("pi-2") == replace(DEVICE, name="pi-2")


def test_the_rounds_of_each_device_are_counted(tx: Transaction) -> None:
    tx.add_receipt(structs.replace(RECEIPT, status="accepted"))
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-2", device="pi-2"))
    assert tx.rounds_by_device() == {"pi-1": 1}


def test_what_a_device_has_in_a_round_can_be_withdrawn(tx: Transaction) -> None:
    accepted = structs.replace(RECEIPT, status="accepted")
    tx.add_receipt(accepted)
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-2"))
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-3", device="pi-2"))
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-4", status="rejected"))
    taken = tx.withdraw(1, "pi-1", at=5.0, reason="revoked")
    assert [(each.upload, each.status) for each in taken] == [
        (b"upload-1", "accepted"),
        (b"upload-2", "going"),
    ]
    assert tx.withdraw(1, "pi-1", at=6.0, reason="revoked") == []
    assert tx.receipt(b"upload-1") == structs.replace(
        accepted, status="withdrawn", reason="revoked", at=5.0
    )
    assert tx.receipt_counts(1) == {"withdrawn": 2, "going": 1, "rejected": 1}


def test_what_is_still_under_way_at_the_close_is_late(tx: Transaction) -> None:
    tx.add_receipt(RECEIPT)
    tx.add_receipt(structs.replace(RECEIPT, upload=b"upload-2", device="pi-2"))
    tx.settle(b"upload-1", "accepted", at=4.0)
    assert tx.settle_rest(1, at=9.0, reason="the round is over") == 1
    assert tx.settle_rest(1, at=9.0, reason="the round is over") == 0
    assert tx.receipt_counts(1) == {"accepted": 1, "late": 1}


def test_receipts_come_in_one_order_and_by_status_and_device(tx: Transaction) -> None:
    for upload, device in ((b"c", "pi-1"), (b"a", "pi-2"), (b"b", "pi-1")):
        tx.add_receipt(structs.replace(RECEIPT, upload=upload, device=device))
    tx.settle(b"c", "accepted", at=4.0)
    assert [r.upload for r in tx.receipts(1)] == [b"a", b"b", b"c"]
    assert [r.upload for r in tx.receipts(1, status="going")] == [b"a", b"b"]
    assert [r.upload for r in tx.receipts(1, device="pi-1")] == [b"b", b"c"]
    assert tx.receipts(2) == []
    assert tx.receipt(b"unheard of") is None


# ── Models, requests, rejects ───────────────────────────────────────────────────────────


def test_model_versions_only_grow_and_the_latest_is_found(tx: Transaction) -> None:
    assert (tx.highest_model(), tx.latest_model()) == (-1, None)
    later = replace(MODEL, version=1, optimiser_state_digest=b"o" * 32)
    other = replace(MODEL, version=2, task_digest=b"e" * 32)
    for model in (MODEL, later, other):
        tx.add_model(model)
    with pytest.raises(ValueError, match="only grow"):
        tx.add_model(later)
    assert tx.latest_model() == other
    assert tx.latest_model(b"d" * 32) == later
    assert tx.highest_model() == 2
    assert [m.version for m in tx.models(limit=2)] == [2, 1]
    assert [m.version for m in tx.models(below=1)] == [0]


def test_what_a_model_turned_out_to_be_is_noted(tx: Transaction) -> None:
    tx.add_model(MODEL)
    tx.set_model_metrics(0, '{"accuracy":0.7}')
    assert tx.model(0) == replace(MODEL, metrics_json='{"accuracy":0.7}')


def test_a_repeated_request_is_answered_again_and_the_newest_are_kept(tx: Transaction) -> None:
    for number in range(REQUESTS_KEPT_MAX + 5):
        tx.remember_reply(f"id-{number}", f"reply {number}")
    assert tx.reply_to("id-4") is None
    assert tx.reply_to("id-5") == "reply 5"
    assert tx.reply_to(f"id-{REQUESTS_KEPT_MAX + 4}") == f"reply {REQUESTS_KEPT_MAX + 4}"
    assert tx.reply_to("never asked") is None


def test_rejects_are_counted_by_reason(tx: Transaction) -> None:
    tx.count_rejects("bad_signature")
    tx.count_rejects("bad_signature", 4)
    tx.count_rejects("wrong_shape")
    assert tx.rejects() == {"bad_signature": 5, "wrong_shape": 1}
