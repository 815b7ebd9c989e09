"""Starting brokers, and saying why one did not start."""

import re
import shutil
import socket
from pathlib import Path, PurePosixPath

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.link.broker_config import render_config, render_iotcore
from broker_bridge.link.local_broker import LocalBroker, free_port, shipped_file
from broker_bridge.link.paho_link import PahoLink

SHIPPED = shipped_file("mosquitto.conf").read_text()


def options(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_rendering_changes_the_listener_the_folders_the_user_and_nothing_else():
    rendered = render_config(
        SHIPPED, port=1234, bind="127.0.0.1", folder=PurePosixPath("/some where"), user="me"
    )
    before, after = SHIPPED.splitlines(), rendered.splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [
        ("user mosquitto", "user me"),
        ("listener 8883", "listener 1234 127.0.0.1"),
        ("cafile /etc/mosquitto/midge/ca.pem", "cafile /some where/ca.pem"),
        ("certfile /etc/mosquitto/midge/broker.pem", "certfile /some where/broker.pem"),
        ("keyfile /etc/mosquitto/midge/broker-key.pem", "keyfile /some where/broker-key.pem"),
        ("crlfile /etc/mosquitto/midge/revoked.pem", "crlfile /some where/revoked.pem"),
        ("acl_file /etc/mosquitto/midge/mosquitto.acl", "acl_file /some where/mosquitto.acl"),
        ("persistence_location /var/lib/mosquitto/", "persistence_location /some where/"),
    ]


def test_rendering_for_the_shipped_place_changes_nothing_but_the_address():
    rendered = render_config(
        SHIPPED,
        port=8883,
        bind="0.0.0.0",  # noqa: S104
        folder=PurePosixPath("/etc/mosquitto/midge"),
    )
    assert (
        rendered.replace("listener 8883 0.0.0.0", "listener 8883").replace(
            "persistence_location /etc/mosquitto/midge/", "persistence_location /var/lib/mosquitto/"
        )
        == SHIPPED
    )


def test_the_shipped_file_locks_the_door_and_names_its_limits():
    lines = options(SHIPPED)
    for line in (
        "per_listener_settings false",
        "listener 8883",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
        "tls_version tlsv1.2",
        "persistence true",
    ):
        assert line in lines
    limits = (
        "max_connections",
        "max_packet_size",
        "max_inflight_messages",
        "memory_limit",
        "max_queued_messages",
        "max_queued_bytes",
        "max_keepalive",
        "autosave_interval",
        "persistent_client_expiration",
    )
    for limit in limits:
        (line,) = [each for each in lines if each.startswith(limit + " ")]
        assert line.split()[1] not in ("0", "-1")
    assert sum(each.startswith("listener ") for each in lines) == 1


@pytest.mark.parametrize("name", ["mosquitto.conf", "mosquitto.acl"])
def test_comments_begin_in_column_1_for_mosquitto_knows_no_others(name):
    for line in options(shipped_file(name).read_text()):
        assert re.fullmatch(r"[a-z0-9_]+ (read|write|readwrite )?[^ ]+( [^ ]+)?", line)
        assert "# " not in line


def test_the_acl_denies_by_saying_nothing():
    for line in options(shipped_file("mosquitto.acl").read_text()):
        kind, *rest = line.split()
        assert kind in ("user", "topic", "pattern")
        if kind != "user":
            access, topic = rest
            assert access in ("read", "write", "readwrite")
            assert topic.startswith("midge/v1/+/")
            # Two users in one level would match no one, or someone else.
            assert all(level in ("%u", "+", "#") or level.isalnum() for level in topic.split("/"))


def test_mosquitto_takes_every_line_of_the_shipped_file(tls_broker):
    start = tls_broker.log_path.read_text().partition(" running")[0]
    expected = ("run as root", "does not contain '%c' or '%u'")  # see mosquitto.acl
    for line in start.splitlines():
        if any(word in line for word in ("Error", "Warning", "deprecated", "Unknown")):
            assert any(each in line for each in expected), line


def test_a_taken_port_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        broker = LocalBroker(tmp_path, port=port, conf_text="listener 1\n")
        with pytest.raises(LocalError, match=rf"port {port} .* choose another port"):
            broker.start()


def test_missing_certificates_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(LocalError, match=r"ca\.pem; `midge init` makes it"):
        LocalBroker(tmp_path, port=free_port(), engine="mosquitto").start()


def test_what_mosquitto_complains_about_is_passed_on(tmp_path):
    broker = LocalBroker(
        tmp_path, port=free_port(), engine="mosquitto", conf_text="listener 1\nno_such_option 1\n"
    )
    with pytest.raises(LocalError, match="no_such_option"):
        broker.start()


def test_a_broker_whose_memory_is_damaged_says_what_to_remove(tls_broker):
    tls_broker.stop()
    memory = tls_broker.folder / "midge.db"
    kept = memory.read_bytes()
    memory.write_bytes(b"not what mosquitto wrote")
    with pytest.raises(LocalError, match=r"Its memory is damaged: remove .*midge\.db"):
        tls_broker.start()
    memory.write_bytes(kept)
    tls_broker.start()
    assert tls_broker.is_running


def test_a_broker_listens_on_this_machine_only_unless_told_otherwise(tls_broker):
    config = (tls_broker.folder / "mosquitto.conf").read_text()
    assert f"listener {tls_broker.port} 127.0.0.1" in config


def test_stopping_and_killing_twice_is_fine_and_starting_again_works(plain_broker):
    broker = plain_broker()
    broker.start()
    broker.stop()
    broker.stop()
    broker.kill()
    assert not broker.is_running
    broker.restart()
    assert broker.is_running
    broker.kill()
    assert not broker.is_running


def test_a_folder_with_a_space_serves_as_well(pki, tmp_path):
    folder = tmp_path / "my broker"
    shutil.copytree(pki.folder, folder)
    with LocalBroker(folder, port=free_port(), engine="mosquitto") as broker:
        PahoLink.open(broker.host, broker.port, client_id="ward-1", tls=pki.files("ward-1")).close()


def test_iotcore_serves_tls_and_says_what_it_lacks(pki, tmp_path):
    pytest.importorskip("iotcore")
    folder = tmp_path / "broker"
    shutil.copytree(pki.folder, folder)
    with LocalBroker(folder, port=free_port(), engine="iotcore") as broker:
        assert "no ACL" in broker.lacks
        assert "\n" not in broker.lacks
        link = PahoLink.open(broker.host, broker.port, client_id="ward-1", tls=pki.files("ward-1"))
        link.publish("t", bytes(60_000))
        assert link.flush(20.0)
        link.close()


def test_iotcore_is_bound_to_the_address_it_was_given():
    text = render_iotcore(port=1234, bind="127.0.0.1", folder=Path('/a "b'))
    assert 'listen = "127.0.0.1:1234"' in text
    assert r'"/a \"b/ca.pem"' in text
    assert text.count("listen") == 1
