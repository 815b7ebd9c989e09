"""Model files: whole, checked, and no more of them than wanted."""

import hashlib
from pathlib import Path

import pytest

from broker_bridge.errors import LocalError
from server.store.models import ModelFiles


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return ModelFiles(tmp_path / "models")


def test_what_was_written_is_read_back_by_its_digest(files: ModelFiles) -> None:
    digest = files.write(12, b"weights")
    assert digest == hashlib.sha256(b"weights").digest()
    assert files.read(12, digest) == b"weights"
    assert [p.name for p in files.folder.iterdir()] == ["000012.weights"]
    assert files.path(12).stat().st_mode & 0o777 == 0o600


def test_weights_and_optimiser_state_lie_side_by_side(files: ModelFiles) -> None:
    files.write(1, b"weights")
    state = files.write(1, b"state", kind="optimiser")
    assert files.read(1, state, kind="optimiser") == b"state"
    assert files.versions() == [1]


@pytest.mark.parametrize("damage", [b"", b"weight", b"weights!", b"Weights"])
def test_a_file_that_was_changed_is_named_not_used(files: ModelFiles, damage: bytes) -> None:
    digest = files.write(3, b"weights")
    files.path(3).write_bytes(damage)
    with pytest.raises(LocalError, match=r"000003\.weights: this is not the file that was"):
        files.read(3, digest)


def test_a_file_that_is_not_there_is_named(files: ModelFiles) -> None:
    with pytest.raises(LocalError, match=r"000007\.weights: there is no such file"):
        files.read(7, bytes(32))


def test_the_newest_are_kept_and_those_that_are_asked_for(files: ModelFiles) -> None:
    for version in (0, 1, 2, 3, 10, 1_000_000):
        files.write(version, b"w")
        files.write(version, b"s", kind="optimiser")
    assert files.prune(2, also=[1]) == [0, 2, 3]
    assert files.versions() == [1, 10, 1_000_000]
    assert len(list(files.folder.iterdir())) == 6
    with pytest.raises(ValueError, match="newest"):
        files.prune(0)


def test_other_files_in_the_folder_are_let_be(files: ModelFiles) -> None:
    for name in ("000001.weights.new", "notes.txt", "1.weights", "000002.weightsx"):
        (files.folder / name).write_bytes(b"")
    files.write(5, b"w")
    assert files.versions() == [5]
    assert files.prune(1) == []
    assert len(list(files.folder.iterdir())) == 5


def test_a_round_that_is_done_again_writes_its_model_again(files: ModelFiles) -> None:
    assert files.write(1, b"same") == files.write(1, b"same")
    assert files.read(1, hashlib.sha256(b"same").digest()) == b"same"
