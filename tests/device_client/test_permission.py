"""Whether a device may work: looked at every second, and told when it is news."""

import pytest

from device_client.eligibility import Rules, judge
from device_client.events import Eligible
from device_client.permission import Permission
from device_client.readings import take_readings


class Owner:
    """Two real rules, about a file and about the count of samples, and a clock of its own."""

    def __init__(self, folder):
        self.in_use = folder / "in-use"
        self.rules = Rules(unless_file=str(self.in_use), samples_min=5)
        self.folder = folder
        self.now_s = 50.0
        self.looks = 0
        self.permission = Permission(self.judge, lambda: self.now_s)

    def judge(self, samples):
        self.looks += 1
        return judge(self.rules, take_readings(self.folder, self.rules, samples=samples))

    def look(self, after_s=0.0, samples=9):
        self.now_s += after_s
        return self.permission.look(samples)


@pytest.fixture
def owner(tmp_path):
    return Owner(tmp_path)


def test_where_there_are_no_rules_there_is_never_news():
    permission = Permission(None, lambda: 0.0)
    assert permission.look(0) is None
    assert permission.present == Eligible()


def test_what_is_against_it_is_told_once_and_so_is_its_end(owner, caplog):
    caplog.set_level("INFO")
    assert owner.look() is None, "nothing is against it, as before"
    owner.in_use.touch()
    found = owner.look(1.0)
    assert str(owner.in_use) in found.against
    assert owner.permission.present == found
    assert owner.look(1.0) is None
    owner.in_use.unlink()
    assert owner.look(1.0) == Eligible()
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("not now: ")
    assert caplog.messages[1] == "may work again"


def test_it_is_looked_at_once_a_second_however_often_it_is_asked(owner):
    owner.look()
    for _ in range(9):
        assert owner.look(0.1) is None
    assert owner.looks == 1
    owner.look(0.2)
    assert owner.looks == 2


def test_another_reason_is_news_and_no_new_line_in_the_log(owner, caplog):
    caplog.set_level("INFO")
    owner.in_use.touch()
    first = owner.look()
    second = owner.look(1.0, samples=2)
    assert second.against.endswith(first.against)
    assert second != first
    assert len(caplog.messages) == 1
