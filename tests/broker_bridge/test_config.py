"""Settings: what is right is taken, and what is wrong is named."""

import contextlib
import tomllib
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from broker_bridge.config import assigned, load_config, overridden
from broker_bridge.errors import LocalError
from device_client.config import EXAMPLE as DEVICE_EXAMPLE
from device_client.config import DeviceConfig
from server.config import EXAMPLE as SERVER_EXAMPLE
from server.config import ServerConfig


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    size: Annotated[int, Meta(ge=1, le=9)] = 3
    mode: Literal["slow", "fast"] = "slow"


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    inner: Inner = Inner()


def loaded(tmp_path, text, kind=Outer):
    path = tmp_path / "some.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, kind)


def test_what_is_left_out_has_its_default(tmp_path):
    assert loaded(tmp_path, 'name = "x"\n[inner]\nsize = 4\n') == Outer(
        name="x", inner=Inner(size=4)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = \n", ["some.toml", "not valid TOML", "line 1"]),
        ("", ["'name'", "missing"]),
        ('name = "x"\nnmae = 3', ["'nmae'", "allowed are inner, name"]),
        ('name = "x"\n[inner]\nsiez = 3', ["'inner.siez'", "allowed are mode, size"]),
        ("name = 3", ["name", "str"]),
        ('name = "x"\n[inner]\nsize = 10', ["inner.size", "<= 9"]),
        ('name = "x"\n[inner]\nsize = 1.5', ["inner.size", "int"]),
        ('name = "x"\n[inner]\nmode = "quick"', ["inner.mode", "'quick'", "slow, fast"]),
        ('name = "x"\nname = "y"\n', ["some.toml", "line 2"]),
        (b'name = "\xff"', ["some.toml", "cannot be read"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(LocalError) as caught:
        loaded(tmp_path, text)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LocalError, match=r"no\.toml: there is no such file"):
        load_config(tmp_path / "no.toml", Outer)
    with pytest.raises(LocalError, match="cannot be read"):
        load_config(tmp_path, Outer)


def test_an_option_that_was_given_counts_and_one_that_was_not_does_not():
    assert overridden(Inner(size=4, mode="fast"), "x", size=5, mode=None) == Inner(
        size=5, mode="fast"
    )


def test_an_option_is_checked_like_a_setting():
    with pytest.raises(LocalError, match=r"command line: size: .*<= 9"):
        overridden(Inner(), "command line", size=99)


@given(st.text(max_size=60))
def test_any_text_is_settings_or_an_error_of_ours(tmp_path_factory, text):
    with contextlib.suppress(LocalError):
        loaded(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("example", "kind"),
    [(SERVER_EXAMPLE.format(federation="demo", host="localhost", port=8883), ServerConfig),
     (DEVICE_EXAMPLE, DeviceConfig)],
    ids=["server", "device"],
)  # fmt: skip
def test_the_example_shows_every_setting_with_its_default(example, kind):
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith("# [") or " = " in line else line
        for line in example.splitlines()
    )
    shown, default = tomllib.loads(uncommented), msgspec.to_builtins(kind())
    for name, value in default.items():
        assert name in shown, name
        if isinstance(value, dict):
            assert set(value) == set(shown[name]), name
    free = {"data", "tasks", "npz", "epochs", "learning_rate", "proximal_mu", "clip_norm"}
    for name, value in default.items():
        for key, given_ in (value if isinstance(value, dict) else {name: value}).items():
            if isinstance(given_, dict):  # a table in a table: shown, with nothing to say
                assert not any(given_.values()), key
            elif key not in free and given_ not in ("", None, ()):
                there = shown[name][key] if isinstance(value, dict) else shown[name]
                assert there == given_, key
    msgspec.convert(shown, kind)


def test_any_setting_can_be_set_for_one_run() -> None:
    wanted = ["rounds.deadline_s=60", 'evaluation.npz="held out.npz"', "federation=ward"]
    config = assigned(ServerConfig(), wanted)
    assert config.rounds.deadline_s == 60.0
    assert config.evaluation.npz == "held out.npz"
    assert config.federation == "ward"
    assert config.rounds.quorum == ServerConfig().rounds.quorum


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("rounds.deadline_s", "write NAME=VALUE"),
        ("rounds.dedline_s=60", "there is no setting 'rounds.dedline_s'; allowed are"),
        ("rounds.deadline_s=-1", "rounds.deadline_s: expected `float` > 0"),
        ("federation.name=x", "federation is a setting, not a table"),
        ("rounds.deadline_s=soon", "rounds.deadline_s: expected `float`, got `str`"),
    ],
)
def test_what_cannot_be_set_is_said(assignment: str, sentence: str) -> None:
    with pytest.raises(LocalError) as refused:
        assigned(ServerConfig(), [assignment])
    assert sentence in str(refused.value)
    assert "--set" in str(refused.value)
