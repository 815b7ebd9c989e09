"""Boot partitions as folders and as images: the same calls, the same bytes."""

import lzma
import mmap
import shutil
import struct

import pytest

from broker_bridge.errors import LocalError
from server.fleet.flash.card import FolderCard, ImageCard, open_card
from server.fleet.flash.images import copy_image
from tests import cards

FILES = {
    "plain.txt": b"hello\n",
    "midge/.orig/cmdline.txt": b"console=tty1\n",
    "midge/wheels/cp311-aarch64/numpy-1.26.4-cp311-cp311-manylinux_2_17_aarch64.whl": b"\0" * 9_999,
    "midge/empty": b"",
}


@pytest.fixture(params=["folder", "image"])
def card(request, tmp_path):
    if request.param == "folder":
        return FolderCard(cards.make_folder(tmp_path / "bootfs", cards.TRIXIE))
    return ImageCard(cards.make_image(tmp_path / "card.img", cards.TRIXIE))


def test_what_is_written_is_read_back(card):
    card.write(FILES)
    card.write({"plain.txt": b"again", "midge/more": b"more"})
    assert {name: card.read(name) for name in FILES} == FILES | {"plain.txt": b"again"}
    assert card.read("midge/more") == b"more"
    assert card.read("midge/nothing") is card.read("nowhere/nothing") is None
    assert set(card.names("midge")) == {".orig", "wheels", "empty", "more"}
    assert {"plain.txt", "midge", "cmdline.txt", "overlays"} <= set(card.names())
    assert card.names("nowhere") == []


def test_what_is_removed_is_gone_with_all_that_is_in_it(card):
    card.write(FILES)
    card.remove(["midge", "plain.txt", "never-there"])
    assert card.names("midge") == []
    assert sorted(card.names()) == sorted({name.split("/")[0] for name in cards.TRIXIE})


def test_a_card_without_room_is_refused(tmp_path):
    card = ImageCard(cards.make_image(tmp_path / "card.img", cards.TRIXIE))
    with pytest.raises(LocalError, match="with room on its boot partition"):
        card.write({"midge/much": bytes(41 << 20)})


def test_a_folder_without_room_is_refused_before_anything_is_written(tmp_path):
    folder = cards.make_folder(tmp_path / "bootfs", cards.TRIXIE)
    card = FolderCard(folder)
    card.check_room(FILES)
    with (tmp_path / "much").open("w+b") as file:
        file.truncate(shutil.disk_usage(folder).free + (1 << 30))  # sparse: it takes no room
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as much,
            pytest.raises(LocalError, match="make room"),
        ):
            card.check_room({"midge/much": much})
    assert cards.tree_of(folder) == cards.TRIXIE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:100], "no partition table"),
        (lambda data: bytes(len(data)), "no partition table"),
        (lambda data: data[:450] + b"\x83" + data[451:], "not a boot partition"),
        (lambda data: data[:454] + struct.pack("<I", 1 << 31) + data[458:], "not a boot partition"),
    ],
    ids=["short", "zeros", "ext4 first", "beyond the end"],
)
def test_a_file_that_is_no_card_is_refused(tmp_path, change, words):
    image = cards.make_image(tmp_path / "card.img", cards.TRIXIE)
    with image.open("rb") as file:
        image.write_bytes(change(file.read(1 << 20)))
    with pytest.raises(LocalError, match=words):
        ImageCard(image)


def test_an_image_is_copied_packed_or_not_and_holes_stay_holes(tmp_path):
    image = cards.make_image(tmp_path / "card.img", cards.TRIXIE)
    packed = tmp_path / "card.img.xz"
    packed.write_bytes(lzma.compress(image.read_bytes(), preset=0))
    for source in (image, packed):
        copy = tmp_path / f"{source.suffix}.copy"
        copy_image(source, copy)
        assert copy.read_bytes() == image.read_bytes()
        assert copy.stat().st_blocks * 512 < copy.stat().st_size / 4
    with pytest.raises(LocalError, match="there already"):
        copy_image(image, copy)


def test_a_packed_image_that_was_cut_short_leaves_nothing(tmp_path):
    image = cards.make_image(tmp_path / "card.img", cards.TRIXIE)
    packed = tmp_path / "card.img.xz"
    packed.write_bytes(lzma.compress(image.read_bytes(), preset=0)[:-500])
    with pytest.raises(LocalError, match="download it again"):
        copy_image(packed, tmp_path / "copy.img")
    assert not (tmp_path / "copy.img").exists()


def test_a_folder_or_an_image_and_not_both(tmp_path):
    for boot, image in ((None, None), (tmp_path, tmp_path)):
        with pytest.raises(LocalError, match="either --boot"):
            open_card(boot, image)
    with pytest.raises(LocalError, match="no folder"):
        open_card(tmp_path / "nowhere", None)
