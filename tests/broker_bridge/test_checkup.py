"""What both doctors have in common: levels, exit codes, and dates read without a library."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.checkup import Finding, clock, disk, exit_code, guarded
from broker_bridge.errors import LocalError
from broker_bridge.link.inspection import certificate, certificate_dates
from server.fleet.authority import Authority
from server.fleet.certificates import read_certificate

OK = Finding("a", "ok", "fine")
WARNING = Finding("b", "warning", "soon", "do this")
PROBLEM = Finding("c", "problem", "broken", "do that")
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
CA = Authority.create("midge demo", now=NOW)


@pytest.mark.parametrize(
    ("findings", "code"),
    [([], 0), ([OK], 0), ([OK, WARNING], 1), ([WARNING, PROBLEM, OK], 2), ([PROBLEM], 2)],
)
def test_the_worst_finding_is_the_exit_code(findings, code):
    assert exit_code(findings) == code


def test_an_error_in_a_check_is_a_finding_with_its_advice():
    def fails():
        raise LocalError("/x: the disk is full; make room there")

    assert list(guarded("disk", fails)) == [
        Finding("disk", "problem", "/x: the disk is full", "make room there")
    ]


def test_a_bug_of_ours_in_a_check_is_not_hidden():
    def breaks():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        list(guarded("disk", breaks))


@pytest.mark.parametrize("days", [1, 825, 7300, 9000])
def test_dates_are_those_that_an_x509_library_reads(days):
    pem = CA.issue_with_new_key("ward-1", now=NOW, days=days).certificate
    facts = read_certificate(pem)
    assert certificate_dates(pem) == (facts.valid_from, facts.expires)


def test_dates_of_a_certificate_for_a_key_made_on_a_device_are_read_too():
    pem = CA.issue_for_public_key(bytes(31) + b"\x09", "ward-1", now=NOW)
    assert certificate_dates(pem)[1] == NOW + timedelta(days=825)


def test_a_certificate_cut_short_at_any_length_is_refused():
    whole = CA.certificate.rstrip()
    for length in range(0, len(whole), 3):
        with pytest.raises(LocalError):
            certificate_dates(whole[:length])


@given(st.binary(max_size=300))
def test_what_is_no_certificate_raises_only_our_own_error(data):
    with pytest.raises(LocalError):
        certificate_dates(data)


@pytest.mark.parametrize(
    ("days", "level"), [(0, "problem"), (10, "warning"), (29, "warning"), (31, "ok")]
)
def test_a_certificate_is_judged_by_the_days_that_are_left(tmp_path, days, level):
    path = tmp_path / "one.pem"
    path.write_bytes(CA.issue_with_new_key("ward-1", now=NOW, days=days).certificate)
    (found,) = certificate("cert", path, NOW + timedelta(minutes=1), renew="again")
    assert found.level == level
    assert found.level == "ok" or found.advice


def test_a_clock_is_judged_by_when_the_federation_was_made():
    def level(now):
        return [f.level for f in clock(now, made=NOW)]

    assert level(NOW - timedelta(seconds=1)) == ["problem"]
    assert level(NOW + timedelta(days=1)) != ["problem"]
    assert level(NOW.replace(year=NOW.year + 26)) == ["problem"]


def test_a_disk_is_tried_and_left_as_it_was(tmp_path):
    (found,) = disk(tmp_path)
    assert "written and synced" in found.found or found.level == "warning"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_a_problem(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    (found,) = guarded("disk", lambda: disk(path))
    assert found.level == "problem"
    assert found.advice
