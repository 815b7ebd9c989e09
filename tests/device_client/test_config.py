"""The device's settings: what may stand in `device.toml`."""

import re

import pytest

from broker_bridge.config import load_config
from broker_bridge.errors import LocalError
from broker_bridge.limits import LIMITS
from device_client.config import EXAMPLE, DeviceConfig


def config(tmp_path, text):
    path = tmp_path / "device.toml"
    path.write_text(text)
    return load_config(path, DeviceConfig)


def test_the_file_that_a_device_leaves_for_its_owner_means_the_defaults(tmp_path):
    assert config(tmp_path, EXAMPLE) == DeviceConfig()


def test_each_number_that_the_file_shows_is_the_default(tmp_path):
    tables_and_numbers = re.findall(
        r"^(?:# )?(\[\w+\]|\w+ = [\d.]+)(?: +#.*)?$", EXAMPLE, re.MULTILINE
    )
    assert config(tmp_path, "\n".join(tables_and_numbers)) == DeviceConfig()
    assert f"inflight_max = {LIMITS.inflight_max}" in tables_and_numbers


def test_what_its_owner_writes_is_taken(tmp_path):
    found = config(tmp_path, 'data = "npz:x.npz"\nrole = "evaluate"\nkeepalive_s = 600\n')
    assert (found.data, found.role, found.keepalive_s) == ("npz:x.npz", "evaluate", 600)


@pytest.mark.parametrize(
    "text",
    ["broker_port = 65536", "broker_port = -1", "keepalive_s = 9", "keepalive_s = 70000",
     "threads = 0", "threads = 65", 'role = "both"', 'log = "loud"', "data = 3"],
)  # fmt: skip
def test_every_setting_has_bounds(tmp_path, text):
    with pytest.raises(LocalError, match=text.split()[0]):
        config(tmp_path, text)
