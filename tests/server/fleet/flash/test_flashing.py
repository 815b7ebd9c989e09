"""Cards are written byte for byte, checked, booted from, read again, and made what they were."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import LocalError
from server.fleet.flash import firstboot, flashing
from server.fleet.flash.card import FolderCard, ImageCard
from server.fleet.flash.diagnosis import diagnose
from server.fleet.flash.firstboot import Login, Wifi, wifi
from server.fleet.flash.flashing import Settings
from server.fleet.flash.parcel import file_of_ours, parcel, settings_text
from server.fleet.flash.wheelhouse import cache_folder
from tests import cards

TOKEN = b'{"token": "a secret of one device"}\n'
WIFI = wifi("Ward 3", "correct horse", country="GB")
SETTINGS = Settings(
    device="ward-3", instance="midge-1", wifi=WIFI,
    login=Login("pi", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB ann"),
)  # fmt: skip
MADE_AT = 1_790_000_000


def flash(card, *, targets=None, settings=SETTINGS, made_at=MADE_AT):
    """Write what `midge flash` writes; return all of it by name."""
    system = flashing.check_card(card, replace=False)
    wanted = targets or (system.target,)
    cards.wheels_or_skip(*wanted)
    files = parcel(
        wanted, cache_folder(), made_at=made_at, bundle=TOKEN,
        settings=settings_text(data="npz:/var/lib/midge/data/samples.npz", role="train"),
        extra={"data/samples.npz": b"samples of one person"},
    )  # fmt: skip
    content = flashing.boot_files(card, system, settings, files)
    flashing.write(card, system, settings, content, made_at=made_at, token_expires="tomorrow")
    return content


@pytest.mark.parametrize("files", [cards.TRIXIE, cards.BOOKWORM], ids=["trixie", "bookworm"])
def test_an_image_is_written_byte_for_byte_and_made_what_it_was(tmp_path, files):
    image = cards.make_image(tmp_path / "card.img", files, megabytes=80)
    card = ImageCard(image)
    content = flash(card)
    # Read by another way than it was written.
    found = cards.everything_in(image, tmp_path / "read")
    assert {name: found.get(name) for name in content} == content
    assert cards.check_fat(cards.boot_partition(image, tmp_path / "boot.fat"))
    manifest = flashing.manifest(card)
    assert manifest is not None
    assert flashing.differences(card, manifest) == []
    assert set(found) == set(files) | set(content) | {
        "midge/.orig/manifest.json", *(f"midge/.orig/{name}" for name in manifest.kept)
    }  # fmt: skip
    assert found["cmdline.txt"].count(b"\n") == 1
    assert b"correct horse" not in b"".join(found[name] for name in found if ".whl" not in name)

    flashing.undo(card)
    assert cards.everything_in(image, tmp_path / "undone") == files
    assert cards.check_fat(cards.boot_partition(image, tmp_path / "boot.fat"))


@pytest.fixture
def folder(tmp_path):
    """A card with trixie, mounted."""
    return cards.make_folder(tmp_path / "bootfs", cards.TRIXIE)


def test_a_card_written_twice_is_still_made_what_it_was_at_first(folder):
    card = FolderCard(folder)
    flash(card)
    content = flash(card, settings=Settings(device="ward-4", instance="midge-2"))
    assert content["cmdline.txt"].count(b"ds=nocloud") == 1
    found = flashing.manifest(card)
    assert found is not None
    assert found.device == "ward-4"
    flashing.undo(card)
    assert cards.tree_of(folder) == cards.TRIXIE
    with pytest.raises(LocalError, match="nothing to undo"):
        flashing.undo(card)


class PowerCutError(Exception):
    """Nothing after this moment is written."""


class CutCard(FolderCard):
    """A card that is taken out while it is written."""

    def __init__(self, folder, writes):
        super().__init__(folder)
        self.writes = writes

    def write(self, files):
        if self.writes == 0:
            raise PowerCutError
        self.writes -= 1
        super().write(files)


@pytest.mark.parametrize("times", [1, 2], ids=["first time", "written anew"])
@pytest.mark.parametrize("writes", range(3))
def test_a_card_taken_out_at_any_moment_can_be_made_what_it_was(folder, times, writes):
    if times == 2:
        flash(FolderCard(folder))
    with pytest.raises(PowerCutError):
        flash(CutCard(folder, writes))
    if (times, writes) == (1, 0):
        with pytest.raises(LocalError, match="nothing to undo"):
            flashing.undo(FolderCard(folder))
    else:
        flashing.undo(FolderCard(folder))
    assert cards.tree_of(folder) == cards.TRIXIE


def test_a_card_that_imager_prepared_is_left_alone_unless_told(folder):
    (folder / "user-data").write_text("#cloud-config\nhostname: mine\n")
    before = cards.tree_of(folder)
    with pytest.raises(LocalError, match="--replace"):
        flashing.check_card(FolderCard(folder), replace=False)
    assert cards.tree_of(folder) == before
    assert flashing.check_card(FolderCard(folder), replace=True).cloud_init


def test_a_changed_file_is_found(folder):
    card = FolderCard(folder)
    flash(card)
    (folder / "network-config").write_text("network: {}\n")
    (folder / "midge" / "install.sh").unlink()
    found = flashing.manifest(card)
    assert found is not None
    assert set(flashing.differences(card, found)) == {"network-config", "midge/install.sh"}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"device": 1}',
        '{"device":"a","system":"s","made_at":1,"token_expires":"","kept":["../x"],"wrote":{}}',
        '{"device":"a","system":"s","made_at":1,"token_expires":"","kept":[],"wrote":{"../x":""}}',
    ],
)  # fmt: skip
def test_a_manifest_from_somewhere_else_is_believed_nothing(folder, text):
    cards.make_folder(folder, {"midge/.orig/manifest.json": text.encode()})
    with pytest.raises(LocalError, match="manifest"):
        flashing.undo(FolderCard(folder))


# ── On the device ───────────────────────────────────────────────────────────────────────


def findings(folder):
    return {f.check: f for f in diagnose(FolderCard(folder))}


def test_a_first_boot_that_fails_is_tried_again_and_then_no_secret_is_left(folder, tmp_path):
    target = cards.target_of_this_machine()
    flash(FolderCard(folder), targets=(target,))
    for path in folder.rglob("*"):
        path.chmod(0o755)  # FAT knows no modes
    assert "not booted" in findings(folder)["first boot"].found
    root = tmp_path / "root"
    boot = ["sh", str(folder / "midge" / "first-boot.sh"), str(root)]
    (folder / "midge" / "uninstall.sh").write_text("something else\n")
    failed = subprocess.run(boot, capture_output=True, text=True, check=False)
    assert failed.returncode == 1, "systemd must see it"
    assert failed.stdout == (folder / "midge/log/install.txt").read_text(), "the journal, too"
    assert "damaged" in findings(folder)["installation"].found
    # The network is joined already, so its key has done its work, whatever else failed.
    assert WIFI.psk.encode() not in b"".join(cards.tree_of(folder).values())
    # What the next boot needs is still there.
    assert (folder / "midge" / "device.bundle").read_bytes() == TOKEN
    (folder / "midge" / "uninstall.sh").write_bytes(file_of_ours("uninstall.sh"))
    subprocess.run(boot, check=True)
    log = (folder / "midge/log/install.txt").read_text()
    assert log.endswith("result: installed\n"), log
    assert (root / "var/lib/midge/device.bundle").read_bytes() == TOKEN
    assert (root / "var/lib/midge/data/samples.npz").read_bytes() == b"samples of one person"
    left = b"".join(cards.tree_of(folder).values())
    assert TOKEN.strip() not in left
    assert b"samples of one person" not in left
    assert WIFI.psk.encode() not in left
    assert "erased" in (folder / "network-config").read_text()
    units = (root / "etc/systemd/system").glob("midge-*")
    assert {path.name: path.stat().st_mode & 0o777 for path in units} == {
        "midge-device.service": 0o644, "midge-report.service": 0o644, "midge-report.timer": 0o644,
    }  # fmt: skip
    assert not (folder / "midge" / "first-boot.sh").exists()
    assert not (folder / "midge" / "wheels").exists()
    found = findings(folder)
    assert [f.level for f in found.values()] == ["ok", "ok", "ok", "ok", "warning"]
    assert "not reported yet" in found["report"].found


POWER_CUT = """#!/bin/sh
# Stands in for sync: at the call of a certain number the machine has no power any more.
count=$(($(cat "$COUNT") + 1))
echo $count >"$COUNT"
if [ $count = "$CUT_AT" ]; then kill -9 0; fi
"""


@pytest.fixture(scope="module")
def ready_root(tmp_path_factory):
    """A device's file system, on which the software is unpacked already: that takes longest."""
    place = tmp_path_factory.mktemp("ready")
    card = cards.make_folder(place / "bootfs", cards.TRIXIE)
    flash(FolderCard(card), targets=(cards.target_of_this_machine(),))
    install = ["sh", str(card / "midge" / "install.sh"), "--root", str(place / "root")]
    subprocess.run(install, check=True)
    shutil.rmtree(place / "root" / "var")
    return place / "root"


@pytest.mark.parametrize("cut_at", range(1, 8))
def test_a_power_cut_at_any_moment_of_the_first_boot_ends_in_a_clean_card(
    folder, tmp_path, ready_root, cut_at
):
    flash(FolderCard(folder), targets=(cards.target_of_this_machine(),))
    root = tmp_path / "root"
    shutil.copytree(ready_root, root, symlinks=True, copy_function=os.link)
    programs, count = tmp_path / "bin", tmp_path / "count"
    cards.make_folder(programs, {"sync": POWER_CUT.encode()})
    (programs / "sync").chmod(0o755)
    count.write_text("0\n")
    script = ["sh", str(folder / "midge" / "first-boot.sh"), str(root)]
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "COUNT": str(count)}
    cut = subprocess.run(
        script, env=environment | {"CUT_AT": str(cut_at)}, check=False, start_new_session=True
    )
    assert cut.returncode == -9
    if (folder / "midge" / "first-boot.sh").exists():  # or all was done but the last sync
        subprocess.run(script, check=True)
    assert (folder / "midge/log/install.txt").read_text().endswith("result: installed\n")
    assert (root / "var/lib/midge/device.bundle").read_bytes() == TOKEN
    left = b"".join(cards.tree_of(folder).values())
    for secret in (TOKEN.strip(), b"samples of one person", WIFI.psk.encode()):
        assert secret not in left
    assert [f.level for f in findings(folder).values()][:4] == ["ok"] * 4


def test_the_wifis_key_is_written_over_where_it_is(folder):
    """One sector of the card, so that cloud-init finds the old file or the new, and never none."""
    flash(FolderCard(folder), targets=(cards.target_of_this_machine(),))
    network = folder / "network-config"
    before, inode = network.read_bytes(), network.stat().st_ino
    (folder / "midge" / "install.sh").write_text("exit 1\n")
    script = ["sh", str(folder / "midge" / "first-boot.sh"), str(folder / "root")]
    assert subprocess.run(script, capture_output=True, check=False).returncode == 1
    after = network.read_bytes()
    assert (len(after), network.stat().st_ino) == (len(before), inode)
    assert WIFI.psk.encode() not in after
    longest = Wifi("\N{GREEK SMALL LETTER OMEGA}" * 16, "GB", "ab" * 32, hidden=True)
    assert len(firstboot.network_config(longest).encode()) <= 512


def test_a_card_that_became_read_only_installs_and_says_what_is_left(folder, tmp_path):
    flash(FolderCard(folder), targets=(cards.target_of_this_machine(),))
    root = tmp_path / "root"
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    script = [*cards.plainly(), "sh", str(folder / "midge" / "first-boot.sh"), str(root)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    assert "secrets are still on the boot partition" in done.stdout
    assert (root / "var/lib/midge/device.bundle").read_bytes() == TOKEN


@pytest.mark.parametrize(
    ("report", "check", "words"),
    [
        ("service=active enrolled=yes addresses=10.0.0.7 clock-synchronised=yes", "", ""),
        ("service=activating enrolled=no addresses=none", "network", "no address"),
        ("service=activating enrolled=no addresses=10.0.0.7\nagent cannot reach the broker",
         "enrolment", "cannot reach the broker"),
        ("service=failed enrolled=yes addresses=10.0.0.7\nagent no such file", "service",
         "no such file"),
        ("service=\x1b[31mred enrolled=no", "service", "?[31mred"),
    ],
)  # fmt: skip
def test_doctor_reads_what_the_device_reported(folder, report, check, words):
    card = FolderCard(folder)
    flash(card)
    cards.make_folder(
        folder,
        {"midge/log/install.txt": b"first boot\nmidge: installed\nresult: installed\n",
         "midge/log/agent.txt": report.encode()},
    )  # fmt: skip
    (folder / "midge" / "device.bundle").unlink()
    problems = {f.check: f for f in diagnose(card) if f.level == "problem"}
    if check:
        assert words in problems[check].found
        assert problems[check].advice
    else:
        assert problems == {}


def test_a_device_that_was_somebody_else_before_is_said(folder, tmp_path, ready_root):
    """A used card, flashed again for another device: it stays who it was, and nobody enrols."""
    flash(FolderCard(folder), targets=(cards.target_of_this_machine(),))
    root = tmp_path / "root"
    shutil.copytree(ready_root, root, symlinks=True, copy_function=os.link)
    script = ["sh", str(folder / "midge" / "first-boot.sh"), str(root)]
    identity = b'{"federation":"demo","device":"ward-1","broker_host":"192.0.2.1"}'
    cards.make_folder(root / "var/lib/midge", {"identity.json": identity})
    subprocess.run(script, check=True)
    found = findings(folder)["identity"]
    assert found.level == "problem"
    assert "enrolled before, as ward-1" in found.found
    assert "--purge" in found.advice
    assert (root / "var/lib/midge/identity.json").read_bytes() == identity


def test_a_device_that_is_installed_again_is_who_it_should_be(folder):
    flash(FolderCard(folder))
    said = "this device is enrolled already, as ward-3: it keeps its identity and its outbox"
    log = f"first boot\nmidge: {said}\nresult: installed\n".encode()
    cards.make_folder(folder, {"midge/log/install.txt": log})
    assert "identity" not in findings(folder)


def test_doctor_knows_a_card_that_midge_never_wrote(folder):
    assert "nothing" in findings(folder)["midge"].found


class Scribbled:
    """A card on which somebody else wrote."""

    where = "a card"

    def __init__(self, files):
        self.files = files

    def names(self, folder=""):
        return [name for name in self.files if "/" not in name]

    def read(self, name):
        return self.files.get(name)


@given(
    log=st.binary(max_size=400),
    report=st.text(max_size=200),
    manifest=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda text, names: json.dumps(
                {"device": text, "system": text, "made_at": 1, "token_expires": text,
                 "kept": names, "wrote": dict.fromkeys(names, text)}
            ).encode(),
            st.text(max_size=9), st.lists(st.text(max_size=9), max_size=3),
        ),
    ),
)  # fmt: skip
def test_whatever_is_on_a_card_doctor_answers_with_findings_or_one_sentence(log, report, manifest):
    card = Scribbled(
        cards.TRIXIE
        | {"midge/log/install.txt": log + b"\nresult: installed", "midge/log/agent.txt":
           report.encode(), "midge/.orig/manifest.json": manifest}
    )  # fmt: skip
    with contextlib.suppress(LocalError):
        for finding in diagnose(card):
            assert finding.found.isprintable()
            assert finding.level == "ok" or finding.advice


def test_a_card_that_was_flashed_again_is_reported_on_again(tmp_path):
    log, seen = tmp_path / "log", tmp_path / "seen"
    log.mkdir()
    script = file_of_ours("report.sh").decode()
    script = script.replace("/boot/firmware/midge/log", str(log))
    script = script.replace("/var/lib/midge-report", str(seen))
    for _ in range(2):
        subprocess.run(["sh", "-c", script], check=False, capture_output=True)
        report = log / "agent.txt"
        assert report.read_text().startswith("service=")
        before = report.stat().st_mtime_ns
        subprocess.run(["sh", "-c", script], check=False, capture_output=True)
        assert report.stat().st_mtime_ns == before, "the same again is not written"
        report.unlink()


# ── The units ───────────────────────────────────────────────────────────────────────────


def test_systemd_accepts_the_units(tmp_path):
    for name in ("midge-first-boot.service", "midge-report.service", "midge-report.timer"):
        text = file_of_ours(name).decode().replace("/opt/midge/bin/midge-report", sys.executable)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.replace("\n", "")) == (0, "")
