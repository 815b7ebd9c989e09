"""The owner's rules over what a machine says of itself: each holds, fails and does not know."""

from dataclasses import replace
from datetime import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.config import load_config
from broker_bridge.errors import LocalError
from device_client.config import DeviceConfig
from device_client.eligibility import Readings, Rules, judge, reason_against

NOON = Readings(clock=time(12, 0))
MB = 1_000_000

CASES = [
    # the rule, readings that hold, readings that do not
    ({"mains": True}, {"mains": True}, {"mains": False}),
    ({"battery_min": 0.4}, {"battery": 0.4}, {"battery": 0.39}),
    ({"temperature_max_c": 70.0}, {"temperature_c": 70.0}, {"temperature_c": 70.5}),
    ({"throttled": False}, {"throttled": False}, {"throttled": True}),
    ({"load_max": 0.5}, {"load": 0.5}, {"load": 0.51}),
    ({"memory_min_mb": 100.0}, {"memory_bytes": 100 * MB}, {"memory_bytes": 99 * MB}),
    ({"disk_min_mb": 50.0}, {"disk_bytes": 50 * MB}, {"disk_bytes": 49 * MB}),
    ({"metered": False}, {"metered": False}, {"metered": True}),
    ({"networks": ("eth0", "wlan0")}, {"network": "wlan0"}, {"network": "wwan0"}),
]


def verdict(rule, **readings):
    (found,) = judge(Rules(**rule), replace(NOON, **readings))
    return found


@pytest.mark.parametrize(("rule", "good", "bad"), CASES)
def test_a_rule_holds_where_its_reading_fits_and_says_why_where_not(rule, good, bad):
    assert verdict(rule, **good).holds
    against = verdict(rule, **bad)
    assert not against.holds
    assert against.reading
    assert against.rule in reason_against([against])


@pytest.mark.parametrize(("rule", "good", "bad"), CASES)
def test_a_rule_whose_reading_is_not_to_be_had_does_not_hold(rule, good, bad):
    assert not verdict(rule).holds


def test_without_rules_nothing_is_against_it():
    assert judge(Rules(), NOON) == []
    assert reason_against([]) == ""


def test_a_device_without_a_battery_cannot_run_it_down():
    assert verdict({"battery_min": 0.5}, mains=True).holds
    assert not verdict({"battery_min": 0.5}, mains=False).holds


@pytest.mark.parametrize(
    ("span", "clock", "holds"),
    [
        ("22:00-06:00", time(22, 0), True), ("22:00-06:00", time(3, 0), True),
        ("22:00-06:00", time(6, 0), False), ("22:00-06:00", time(21, 59), False),
        ("09:00-17:30", time(17, 29), True), ("09:00-17:30", time(17, 30), False),
        ("09:00-17:30", time(8, 59), False),
    ],
)  # fmt: skip
def test_hours_may_go_past_midnight(span, clock, holds):
    assert verdict({"hours": (span,)}, clock=clock).holds is holds


@given(st.times(), st.times(), st.times())
def test_a_span_of_hours_and_its_complement_share_no_moment(a, b, now):
    """Hypothesis: of a-b and b-a exactly one holds, unless they are all day and nothing."""
    spans = (f"{a.isoformat()}-{b.isoformat()}", f"{b.isoformat()}-{a.isoformat()}")
    one, other = (verdict({"hours": (span,)}, clock=now).holds for span in spans)
    assert one != other or a == b


def test_samples_are_counted_once_a_task_is_there():
    assert verdict({"samples_min": 10}).holds
    assert verdict({"samples_min": 10}, samples=10).holds
    assert not verdict({"samples_min": 10}, samples=9).holds


def test_a_file_says_that_somebody_is_using_the_machine():
    rule = {"unless_file": "/run/in-use"}
    assert verdict(rule).holds
    assert not verdict(rule, file_is_there=True).holds


def test_only_rules_about_the_network_hold_back_an_upload():
    rules = Rules(mains=True, metered=False, networks=("eth0",), load_max=1.0)
    assert [v.network for v in judge(rules, NOON)] == [False, False, True, True]


def test_every_reason_against_is_told():
    rules = Rules(mains=True, temperature_max_c=60.0, load_max=0.5)
    found = reason_against(judge(rules, replace(NOON, mains=False, temperature_c=78.0, load=0.1)))
    assert "on battery" in found
    assert "78 °C" in found
    assert "load" not in found


def test_rules_are_a_table_of_the_settings_file(tmp_path):
    path = tmp_path / "device.toml"
    path.write_text("[eligibility]\nmains = true\nhours = ['22:00-06:00']\nbattery_min = 0.3\n")
    rules = load_config(path, DeviceConfig).eligibility
    assert (rules.mains, rules.hours, rules.battery_min) == (True, ("22:00-06:00",), 0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hours = ['night']", "22:00-06:00"),
        ("hours = ['25:00-06:00']", "22:00-06:00"),
        ("battery_min = 40", "battery_min"),
        ("temperature = 70", "temperature"),
    ],
)
def test_a_rule_that_is_none_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "device.toml"
    path.write_text(f"[eligibility]\n{text}\n")
    with pytest.raises(LocalError) as refusal:
        load_config(path, DeviceConfig)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)
