"""Which system is on a card, and which are refused."""

import pytest

from broker_bridge.errors import LocalError
from server.fleet.flash.card import FolderCard, ImageCard
from server.fleet.flash.system import is_customised, recognise
from tests import cards


@pytest.mark.parametrize(
    ("files", "target"), [(cards.TRIXIE, "trixie-arm64"), (cards.BOOKWORM, "bookworm-arm64")]
)
def test_the_two_systems_are_told_apart_in_folders_and_images(tmp_path, files, target):
    folder = FolderCard(cards.make_folder(tmp_path / "bootfs", files))
    image = ImageCard(cards.make_image(tmp_path / "card.img", files))
    assert recognise(folder).target.name == recognise(image).target.name == target
    assert not is_customised(folder, recognise(folder))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (cards.ARMHF, "32-bit system"),
        (cards.ARMHF | cards.TRIXIE, "32-bit system"),
        (cards.BULLSEYE, "neither Raspberry Pi OS 12"),
        (cards.UBUNTU, "does not know"),
        ({"DCIM/IMG_0001.JPG": b"a holiday"}, "no boot partition"),
        ({}, "no boot partition"),
    ],
    ids=["armhf", "armhf with cloud-init", "bullseye", "ubuntu", "a camera's card", "empty"],
)
def test_what_midge_cannot_set_up_is_refused_in_a_sentence(tmp_path, files, words):
    (tmp_path / "bootfs").mkdir()
    card = FolderCard(cards.make_folder(tmp_path / "bootfs", files))
    with pytest.raises(LocalError, match=words):
        recognise(card)


def test_a_card_that_imager_prepared_is_noticed(tmp_path):
    trixie = cards.TRIXIE | {"user-data": b"#cloud-config\nhostname: mine\n"}
    line = cards.BOOKWORM["cmdline.txt"].strip() + b" systemd.run=/boot/firstrun.sh\n"
    for number, files in enumerate((trixie, cards.BOOKWORM | {"cmdline.txt": line})):
        card = FolderCard(cards.make_folder(tmp_path / str(number), files))
        assert is_customised(card, recognise(card))
