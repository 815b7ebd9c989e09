"""docs/protocol.md says what the code speaks: every message, field, topic, size and limit."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker_bridge.limits import LIMITS
from broker_bridge.wire import batch, messages
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, TRANSFER_ID_BYTES, ChunkHeader
from broker_bridge.wire.envelope import AEAD_TAG_BYTES, EXPORT_ONLY, SignKey
from broker_bridge.wire.topics import DOWN_KINDS, RESERVED, UP_KINDS, Topics

TEXT = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
SECTIONS = dict(re.findall(r"^#{2,3} (.+?)\n(.*?)(?=^#{2,3} |\Z)", TEXT, re.MULTILINE | re.DOTALL))
STRUCTS: list[Any] = [
    offered
    for offered in (getattr(messages, name) for name in messages.__all__)
    if isinstance(offered, type) and issubclass(offered, msgspec.Struct)
]
EVERY_MESSAGE = pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)


def rows(section: str) -> dict[str, str]:
    """The rows of a section's table, by the name in their first column."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", SECTIONS[section], re.MULTILINE))


def written(number: int) -> str:
    return f"{number:,}"


@EVERY_MESSAGE
def test_a_message_is_described_field_by_field(kind: Any) -> None:
    table = rows(kind.__name__)
    fields = {field.encode_name for field in msgspec.structs.fields(kind)}
    assert set(table) - {"v"} == fields - {"v"}


@EVERY_MESSAGE
def test_a_field_that_may_be_left_out_is_described_as_such(kind: Any) -> None:
    table = rows(kind.__name__)
    for field in msgspec.structs.fields(kind):
        if field.encode_name != "v":
            assert ("if absent" in table[field.encode_name]) == (not field.required)


@EVERY_MESSAGE
def test_a_message_is_described_with_its_type(kind: Any) -> None:
    tag = kind.__struct_config__.tag
    if tag is not None:
        assert f'`type` is `"{tag}"`' in SECTIONS[kind.__name__]


def test_every_value_that_a_field_may_take_is_named() -> None:
    for kind in STRUCTS:
        table = rows(kind.__name__)
        for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            if isinstance(field.type, msgspec.inspect.LiteralType) and field.encode_name != "v":
                assert all(f'"{value}"' in table[field.encode_name] for value in field.type.values)


def test_every_topic_is_listed() -> None:
    any_fed = Topics("demo")
    built = {any_fed.ctl, any_fed.ctl_reply, any_fed.srv, any_fed.round, any_fed.metrics}
    built |= {any_fed.identity}
    built |= {
        any_fed.state("{dev}"),
        f"{any_fed.task(0)[:-1]}{{seq}}",
        f"{any_fed.model(0)[:-1]}{{seq}}",
    }
    built |= {any_fed.up(0, "{dev}", kind).replace("/0/", "/{shard}/") for kind in UP_KINDS}
    built |= {any_fed.down("{dev}", kind) for kind in DOWN_KINDS}
    listed = set(re.findall(r"^\| `(midge/v1/\{fed\}/[^`]+)` \|", SECTIONS["Topics"], re.MULTILINE))
    assert listed == {topic.replace("demo", "{fed}") for topic in built}
    assert all(f"`{name}`" in SECTIONS["Topics"] for name in RESERVED)


def test_the_header_of_a_chunk_is_described_byte_by_byte() -> None:
    layout = re.findall(r"^\| (\d+) \| (\d+) \| (.+) \|$", SECTIONS["Chunks"], re.MULTILINE)
    described = [(int(offset), int(size)) for offset, size, _ in layout]
    header = ChunkHeader(b"transfer", 0x01020304, 0x05060708).encode()
    assert [offset for offset, _ in described] == [
        sum(size for _, size in described[:n]) for n in range(len(described))
    ]
    assert sum(size for _, size in described) == len(header)
    parts = [header[offset : offset + size] for offset, size in described]
    assert parts == [
        b"mg", b"\x01", b"\0", b"transfer", b"\4\3\2\1", b"\x08\x07\x06\x05", b"\0\0\0\0",
    ]  # fmt: skip


def test_a_receipt_that_was_signed_together_is_described_byte_by_byte() -> None:
    text = SECTIONS["Signed together"]
    layout = re.findall(r"^\| (\d+) \| (\d+)(?: × n)? \| .+ \|$", text, re.MULTILINE)
    key, kinds = SignKey.from_seed(bytes(32)), [f"ack demo/d-{n}" for n in range(5)]
    data = batch.sign_together(key, [(kind, b"payload") for kind in kinds])[2]
    parts = batch.split(data)
    assert [(int(offset), int(size)) for offset, size in layout] == [
        (0, len(parts.signature)), (64, 1), (65, 1), (66, len(parts.path[0])),
    ]  # fmt: skip
    assert data[64:66] == bytes([2, 4]) == bytes([parts.entry, parts.last])
    assert data[66:] == b"".join(parts.path) + parts.payload


def test_the_sizes_in_the_text_are_those_of_the_code() -> None:
    text = SECTIONS["Chunks"]
    header_bytes = CHUNK_OVERHEAD_BYTES - AEAD_TAG_BYTES
    assert f"header of {header_bytes} bytes" in text
    assert f"tag of {AEAD_TAG_BYTES} bytes" in text
    assert f"{CHUNK_OVERHEAD_BYTES} bytes more than its body" in text
    assert f"packet_bytes - {LIMITS.packet_overhead_bytes} - {CHUNK_OVERHEAD_BYTES}" in text
    assert f"at most {written(LIMITS.chunks_max)}" in text
    assert f"first {TRANSFER_ID_BYTES} bytes of its digest" in text
    assert f"AEAD {EXPORT_ONLY:#06x}".lower() in SECTIONS["Sealing"].lower()


def test_a_limit_has_the_value_that_is_written() -> None:
    limits = dataclasses.asdict(LIMITS)
    table = rows("Limits")
    assert table
    for name, text in table.items():
        assert text.split(":")[0] == written(limits[name])


def test_every_place_that_the_page_links_to_exists() -> None:
    anchors = {re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (Path(__file__).parents[1] / "docs" / target).exists(), target
