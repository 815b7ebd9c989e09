"""The server's settings: the file that `midge init` writes, and what may stand in it."""

import contextlib
import re

import msgspec
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.limits import LIMITS
from server.commands.serving import connected
from server.config import EXAMPLE, ServerConfig
from server.fleet.home import Home


def config(tmp_path, text):
    (tmp_path / "midge.toml").write_text(text)
    return Home(tmp_path).config()


def test_the_file_that_init_writes_means_the_defaults(tmp_path):
    text = EXAMPLE.format(federation="demo", host="localhost", port=8883)
    assert config(tmp_path, text) == ServerConfig()


def test_each_number_that_the_file_shows_is_the_default(tmp_path):
    tables_and_numbers = re.findall(r"^(?:# )?(\[\w+\]|\w+ = [\d.]+)$", EXAMPLE, re.MULTILINE)
    found = config(tmp_path, "\n".join(tables_and_numbers))
    default = ServerConfig()
    # What is left out of [training] is the task's own.
    assert msgspec.structs.replace(found, training=default.training) == default
    assert f"inflight_max = {LIMITS.server_inflight_max}" in tables_and_numbers


@pytest.mark.parametrize(("setting", "window"), [("", 200), ("inflight_max = 3", 3)])
def test_the_server_has_as_many_publishes_on_their_way_as_it_is_set_to(fleets, setting, window):
    """The shipped mosquitto.conf allows all of them."""
    fleet = fleets()
    fleet.broker.start()
    path = fleet.home.folder / "midge.toml"
    path.write_text(f"[broker]\nhost = 'localhost'\nport = {fleet.port}\n{setting}\n")
    with contextlib.closing(connected(fleet.home, fleet.home.config(), fleet.home.keys())) as link:
        assert (link.limits.inflight_max, link.room()) == (window, window)


def test_every_number_has_bounds(tmp_path):
    for text in (
        "models_kept = 0",
        "[broker]\nport = 65536",
        "[broker]\nkeepalive_s = 0",
        "[broker]\npacket_bytes_max = 1023",
        "[broker]\npacket_bytes_max = 61441",
        "[broker]\ninflight_max = 0",
        "[broker]\ninflight_max = 201",
        "[broker]\npublishes_per_s = -1",
        "[broker]\nmqtt = 5",
        "[rounds]\ntarget = -1",
        "[rounds]\nquorum = 1.5",
        "[rounds]\ndeadline_s = 0",
        "[rounds]\ndeadline_s = inf",
        "[rounds]\nabandoned_max = 0",
        "[rounds]\nevaluation_wait_s = -1",
        "[rounds]\ndelta_bound = nan",
        "[rounds]\nweight_max = 0",
        "[rounds]\nfraction_bits = 41",
        "[training]\nepochs = 0",
        "[training]\nlearning_rate = 0.0",
        "[training]\nproximal_mu = -0.1",
        "[training]\nclip_norm = -1.0",
        "[aggregation]\nlearning_rate = nan",
    ):
        key = text.partition("\n")[2].partition(" ")[0] or "models_kept"
        with pytest.raises(LocalError, match=key):
            config(tmp_path, text)


def test_a_training_setting_that_is_left_out_is_the_tasks_own(tmp_path):
    assert config(tmp_path, "[training]\nepochs = 3\n").training.learning_rate is None
