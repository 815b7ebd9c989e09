"""`midge flash`, as a person types it: cards for one device and for many, and what it refuses."""

import csv
import html
import json
import lzma
import os
import signal

import pytest

from broker_bridge.wire.enrolment import Bundle
from server.cli import main
from server.fleet.flash.targets import find_target
from tests import cards
from tests.fleets import MIDGE, Program, is_refusal, run, typed, wait_until

BROKER = ("--broker", "192.0.2.10:8883")


@pytest.fixture
def alone(fleets):
    """A fleet of which nothing runs."""
    return fleets()


@pytest.fixture
def bootfs(tmp_path):
    """A card with trixie that is mounted here."""
    cards.wheels_or_skip(find_target("trixie-arm64"))
    return cards.make_folder(tmp_path / "bootfs", cards.TRIXIE)


def midge(*arguments):
    return typed(main, *arguments)


def flash(fleet, *arguments, **environment):
    return fleet.midge("flash", *map(str, arguments), **environment)


def test_a_card_is_written_verified_and_undone(alone, bootfs, tmp_path):
    key = tmp_path / "id.pub"
    key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB ann\n")
    done = flash(
        alone, "--device", "ward-3", "--boot", bootfs, *BROKER, "--wifi", "Ward 3",
        "--wifi-country", "GB", "--ssh-key", key, "--data", "npz:/var/lib/midge/data/x.npz",
        "--task-cache", "--no-wait", MIDGE_WIFI_PASSPHRASE="correct horse",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("13 trixie", "sha256 checked", "one-time token until", "read back: identical",
                  "eject"):  # fmt: skip
        assert words in done.stdout, done.stdout
    assert "waiting" not in done.stdout
    bundle = Bundle.decode((bootfs / "midge" / "device.bundle").read_bytes())
    assert (bundle.device, bundle.broker_host, bundle.broker_port) == ("ward-3", "192.0.2.10", 8883)
    assert "Ward 3" in (bootfs / "network-config").read_text()
    assert "AAAAC3" in (bootfs / "user-data").read_text()
    assert list((bootfs / "midge" / "tasks").glob("*.plan"))
    text = done.stdout + done.stderr + "".join(
        path.read_text() for path in bootfs.rglob("*") if path.suffix in ("", ".txt", ".toml")
        and path.is_file()
    )  # fmt: skip
    assert "correct horse" not in text

    verified = midge("flash", "verify", "--boot", str(bootfs))
    assert verified.returncode == 0, verified.stderr
    (bootfs / "midge" / "install.sh").write_text("#!/bin/sh\n")
    is_refusal(
        midge("flash", "verify", "--boot", str(bootfs)),
        "midge/install.sh is not as it was written",
    )
    doctor = midge("flash", "doctor", "--boot", str(bootfs), "--json")
    assert doctor.returncode == 2
    assert json.loads(doctor.stdout)["worst"] == "problem"
    undone = midge("flash", "undo", "--boot", str(bootfs))
    assert undone.returncode == 0, undone.stderr
    assert cards.tree_of(bootfs) == cards.TRIXIE
    is_refusal(midge("flash", "undo", "--boot", str(bootfs)), "nothing to undo")


def test_a_card_that_has_booted_is_not_called_what_it_was(alone, bootfs):
    done = flash(alone, "--device", "ward-3", "--boot", bootfs, *BROKER, "--no-wait")
    assert done.returncode == 0, done.stderr
    cards.make_folder(bootfs, {"midge/log/install.txt": b"first boot\nresult: installed\n"})
    (bootfs / "midge" / "device.bundle").unlink()
    assert "has booted from this card" in midge("flash", "verify", "--boot", str(bootfs)).stdout
    undone = midge("flash", "undo", "--boot", str(bootfs))
    assert "what it installed is still on it" in undone.stdout
    assert "still good" not in undone.stdout
    assert cards.tree_of(bootfs) == cards.TRIXIE


def test_a_dry_run_writes_nothing_and_makes_no_token(alone, bootfs):
    done = flash(alone, "--device", "ward-3", "--boot", bootfs, *BROKER, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "change cmdline.txt" in done.stdout
    assert "add    midge/install.sh" in done.stdout
    assert "nothing was written" in done.stdout
    assert cards.tree_of(bootfs) == cards.TRIXIE
    assert not alone.home.bundle("ward-3").exists()


def test_a_fleet_of_images_has_a_list_and_labels(alone, tmp_path):
    cards.wheels_or_skip(find_target("bookworm-arm64"))
    image = cards.make_image(tmp_path / "raspios.img", cards.BOOKWORM, megabytes=60)
    out = tmp_path / "cards"
    done = flash(alone, "--count", 2, "--name", "ward-{:02}", "--image", image, "--out", out,
                 *BROKER, "--data", "npz:x", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["device"] for row in rows] == ["ward-01", "ward-02"]
    listed = list(csv.DictReader((out / "cards.csv").open()))
    assert [row["image"] for row in listed] == [str(out / "ward-01.img"), str(out / "ward-02.img")]
    assert all(row["fingerprint"] == "" and row["token_expires"] for row in listed)
    labels = html.unescape((out / "labels.html").read_text())
    assert "ward-01" in labels
    assert "ward-02" in labels
    tokens = set()
    for row in rows:
        files = cards.everything_in(out / f"{row['device']}.img", tmp_path / row["device"])
        bundle = Bundle.decode(files["midge/device.bundle"])
        assert bundle.device == row["device"]
        assert row["device"].encode() in files["firstrun.sh"]
        tokens.add(bundle.token)
    assert len(tokens) == 2
    again = flash(alone, "--count", 2, "--name", "ward-{:02}", "--image", image, "--out", out,
                  *BROKER)  # fmt: skip
    is_refusal(again, "there already", "--out")
    # Another ward: the list has both, with what a person wrote into it.
    text = (out / "cards.csv").read_text().replace(f"{listed[0]['token_expires']},", "soon,a1b2", 1)
    (out / "cards.csv").write_text(text)
    packed = image.with_suffix(".img.xz")
    packed.write_bytes(lzma.compress(image.read_bytes(), preset=0))
    more = flash(alone, "--count", 2, "--name", "lab-{}", "--image", packed, "--out", out, *BROKER,
                 "--no-wait")  # fmt: skip
    assert more.returncode == 0, more.stderr
    listed = list(csv.DictReader((out / "cards.csv").open()))
    assert [row["device"] for row in listed] == ["ward-01", "ward-02", "lab-1", "lab-2"]
    assert listed[0]["fingerprint"] == "a1b2"
    assert {path.suffix for path in out.iterdir()} == {".img", ".csv", ".html"}


def test_it_waits_until_the_device_has_enrolled(alone, bootfs, tmp_path):
    waiting = Program(
        tmp_path / "flash.log", *MIDGE, "flash", "--device", "ward-3", "--boot", str(bootfs),
        *BROKER, "--data", "npz:x", "--dir", str(alone.home.folder),
    )  # fmt: skip
    try:
        waiting.wait_for("waiting for ward-3")
        alone.enrol("ward-3")
        wait_until(lambda: not waiting.is_running, "flash sees it")
    finally:
        waiting.kill()
    assert "ward-3 enrolled after 0m" in waiting.log
    assert "fingerprint " in waiting.log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--device"]),
        (["--device", "Ward 3", "--boot", "{}"], ["'Ward 3'", "a-z, 0-9"]),
        (["--device", "ward-3", "--boot", "{}/nowhere", *BROKER], ["nowhere", "boot partition"]),
        (["--device", "ward-3", *BROKER], ["either --boot"]),
        (["--device", "ward-3", "--boot", "{}"], ["'localhost' is the Pi itself", "--broker"]),
        (["--device", "ward-3", "--boot", "{}", *BROKER], ["no boot partition of a Raspberry Pi"]),
        (["--device", "ward-3", "--image", "{}/fleet/midge.toml", *BROKER], ["no partition table"]),
        (["--count", "3", "--image", "{}/x.img"], ["--count, --name and --image"]),
        (["--count", "3", "--name", "ward", "--image", "{}/x.img"], ["pattern of names"]),
        (["--count", "3", "--name", "ward-{{0.x}}", "--image", "{}/x.img"], ["pattern of names"]),
        (["--device", "ward-3", "--boot", "{}", "--wifi", "Ward", *BROKER], ["--wifi-country"]),
        (["--device", "ward-3", "--boot", "{}", "--wifi-country", "GB", *BROKER], ["--wifi SSID"]),
        (["--device", "ward-3", "--boot", "{}", "--wifi-hidden", *BROKER], ["--wifi SSID"]),
        (["--device", "ward-3", "--boot", "{}", "--wifi", "Ward", "--wifi-country", "GB", *BROKER],
         ["no terminal", "MIDGE_WIFI_PASSPHRASE"]),
        (["--device", "ward-3", "--boot", "{}", "--ssh-key", "{}/fleet/midge.toml", *BROKER],
         ["public key"]),
        (["--device", "ward-3", "--boot", "{}", "--ssh-key", "{}/none", *BROKER], ["none"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_gets_one_sentence(alone, arguments, words):
    is_refusal(flash(alone, *(a.format(alone.folder) for a in arguments)), *words)


def test_a_32_bit_image_is_refused_and_no_copy_is_left(alone, tmp_path):
    image = cards.make_image(tmp_path / "raspios-armhf.img", cards.ARMHF)
    done = flash(alone, "--device", "ward-3", "--image", image, "--out", tmp_path / "out", *BROKER)
    is_refusal(done, "32-bit system", "Raspberry Pi OS (64-bit)")
    assert not (tmp_path / "out").exists()
    assert not alone.home.bundle("ward-3").exists()
    packed = image.with_suffix(".img.xz")
    packed.write_bytes(lzma.compress(image.read_bytes(), preset=0))
    for options in ([], ["--dry-run"]):
        done = flash(alone, "--device", "ward-3", "--image", packed, *BROKER, *options)
        is_refusal(done, f"{packed} has a 32-bit system")
    assert not (alone.home.folder / "cards").exists()


def test_an_image_that_is_cut_short_is_refused_and_nothing_is_left(alone, tmp_path):
    whole = cards.make_image(tmp_path / "raspios.img", cards.TRIXIE).read_bytes()
    packed = lzma.compress(whole, preset=0)
    for number, data in enumerate(
        (whole[: 9 << 20], whole[: len(whole) // 2], whole[:-512], packed[: len(packed) // 2],
         packed[:-40])
    ):  # fmt: skip
        image = tmp_path / f"{number}.img"
        image.write_bytes(data)
        done = flash(alone, "--device", "ward-3", "--image", image, *BROKER)
        is_refusal(done, str(image), "cut short", "again")
    assert list(alone.home.folder.glob("cards/*")) == []
    assert not alone.home.bundle("ward-3").exists()


def test_a_dry_run_looks_into_a_packed_image(alone, tmp_path):
    cards.wheels_or_skip(find_target("trixie-arm64"))
    image = cards.make_image(tmp_path / "raspios.img", cards.TRIXIE, megabytes=80)
    packed = tmp_path / "raspios.img.xz"
    packed.write_bytes(lzma.compress(image.read_bytes(), preset=0))
    said = [
        flash(alone, "--device", "ward-3", "--image", each, *BROKER, "--dry-run")
        for each in (image, packed)
    ]
    assert "nothing was written" in said[0].stdout, said[0].stderr
    assert said[1].stdout.splitlines()[1:] == said[0].stdout.splitlines()[1:]
    assert not (alone.home.folder / "cards").exists()


def test_an_image_is_its_owners_alone_and_lies_with_the_fleets_other_secrets(alone, tmp_path):
    cards.wheels_or_skip(find_target("bookworm-arm64"))
    image = cards.make_image(tmp_path / "raspios.img", cards.BOOKWORM, megabytes=60)
    done = flash(alone, "--device", "ward-3", "--image", image, *BROKER, "--no-wait")
    assert done.returncode == 0, done.stderr
    out = alone.home.folder / "cards"
    assert out.stat().st_mode & 0o777 == 0o700
    (card,) = out.iterdir()
    assert (card.name, card.stat().st_mode & 0o777) == ("ward-3.img", 0o600)
    assert f"{card}; read back: identical" in done.stdout
    assert f"--cli {card} /dev/sdX" in done.stdout
    # Nothing is left in whichever folder it was called from.
    assert not (cards.ROOT / "cards").exists()
    # The first card is worth nothing once there is a second one of this name; that is said.
    assert "enrols no more" not in done.stdout
    done = flash(alone, "--device", "ward-3", "--image", image, *BROKER, "--no-wait", "--out",
                 tmp_path / "second")  # fmt: skip
    assert "made before for ward-3 enrols no more" in done.stdout


def test_a_killed_flash_leaves_nothing_that_looks_like_a_card(alone, tmp_path):
    cards.wheels_or_skip(find_target("bookworm-arm64"))
    image = cards.make_image(tmp_path / "raspios.img", cards.BOOKWORM, megabytes=60)
    out = tmp_path / "out"
    with image.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(8 << 30)  # much to copy, though there is nothing in it
    options = ("--device", "ward-3", "--image", str(image), "--out", str(out), *BROKER)
    flashing = Program(tmp_path / "flash.log", *MIDGE, "flash", *options, "--no-wait",
                       "--dir", str(alone.home.folder))  # fmt: skip
    wait_until(lambda: list(out.glob("*")), "it copies")
    flashing.kill()
    assert [path.name for path in out.iterdir()] == ["ward-3.img.part"], flashing.log
    os.truncate(image, size)
    assert flash(alone, *options, "--no-wait").returncode == 0
    assert [path.name for path in out.iterdir()] == ["ward-3.img"]


def test_a_card_that_cannot_be_written_is_untouched_and_no_token_is_made(alone, bootfs):
    bootfs.chmod(0o555)
    try:
        done = run(*cards.plainly(), *MIDGE, "flash", "--device", "ward-3", "--boot", str(bootfs),
                   *BROKER, "--dir", str(alone.home.folder))  # fmt: skip
    finally:
        bootfs.chmod(0o755)
    is_refusal(done, "cannot be written", "lock")
    assert cards.tree_of(bootfs) == cards.TRIXIE
    assert not alone.home.bundle("ward-3").exists()


def test_a_card_without_room_is_found_out_before_a_token_is_made(alone, tmp_path):
    cards.wheels_or_skip(find_target("trixie-arm64"))
    image = cards.make_image(tmp_path / "raspios.img", cards.TRIXIE)
    much = tmp_path / "samples.npz"
    much.write_bytes(bytes(20 << 20))
    done = flash(alone, "--device", "ward-3", "--image", image, *BROKER, "--with", much)
    is_refusal(done, "has room for", "make room")
    assert list(alone.home.folder.glob("cards/*")) == []
    assert not alone.home.bundle("ward-3").exists()


def test_who_stops_waiting_stops_nothing_else(alone, bootfs, tmp_path):
    waiting = Program(
        tmp_path / "flash.log", "env", "--default-signal=INT", *MIDGE, "flash", "--device",
        "ward-3", "--boot", str(bootfs), *BROKER, "--data", "npz:x", "--dir",
        str(alone.home.folder),
    )  # fmt: skip
    try:
        waiting.wait_for("waiting for ward-3")
        os.kill(waiting.pid, signal.SIGINT)
        wait_until(lambda: not waiting.is_running, "it stops")
    finally:
        waiting.kill()
    assert waiting.terminate() == 0
    assert "not waiting any more; `midge device list`" in waiting.log
    assert midge("flash", "verify", "--boot", str(bootfs)).returncode == 0


def test_a_bundle_that_is_there_already_goes_on_the_card(alone, bootfs):
    assert alone.midge("device", "add", "ward-9").returncode == 0
    is_refusal(
        flash(alone, "--device", "ward-9", "--boot", bootfs, "--bundle",
              alone.home.bundle("ward-9")),
        "'localhost' is the Pi itself",
    )  # fmt: skip
    settings = alone.home.folder / "midge.toml"
    settings.write_text(settings.read_text().replace("localhost", "192.0.2.10"))
    assert alone.midge("device", "add", "ward-3").returncode == 0
    made = alone.home.bundle("ward-3")
    before = made.read_bytes()
    is_refusal(
        flash(alone, "--device", "ward-4", "--boot", bootfs, "--bundle", made),
        "is for the device 'ward-3'",
    )
    is_refusal(
        flash(alone, "--device", "ward-3", "--boot", bootfs, "--bundle",
              alone.home.folder / "midge.toml"),
        "not a device bundle",
    )  # fmt: skip
    assert cards.tree_of(bootfs) == cards.TRIXIE
    done = flash(alone, "--device", "ward-3", "--boot", bootfs, "--bundle", made, "--no-wait")
    assert done.returncode == 0, done.stderr
    assert (bootfs / "midge" / "device.bundle").read_bytes() == before == made.read_bytes()
