"""The two packets that are nearly all of what a link says and hears, written and read.

A message of QoS 1 without properties, and an acknowledgement without a reason (MQTT 5.0 and
3.1.1, sections 3.3 and 3.4). Reading promises to say nothing of any other packet, be it
malformed, of another kind, or not here in full: the MQTT library reads that one, as it
would have read all. docs/decisions/0134 says what this saves.
"""

__all__ = ["acknowledged_in", "acknowledgement", "extent_of", "head_of", "is_plain", "message_in"]

_MESSAGES = (0x32, 0x33, 0x3A, 0x3B)  # QoS 1; the other bits: retained, sent before
_ACKNOWLEDGEMENT = 0x40


def is_plain(command: int) -> bool:
    """Whether a packet that begins with this byte may be one of the two."""
    return command in _MESSAGES or command == _ACKNOWLEDGEMENT


def extent_of(data: bytes, at: int) -> tuple[int, int] | None:
    """Where the body of the packet at `at` begins and ends; the end may not be here yet.

    None where the length is not here in full, or takes more than three bytes (section 1.5.5):
    2 MiB and more are nothing to be read in one piece.
    """
    have = len(data)
    begin, shift, length = at + 1, 0, 0
    while begin < have and shift <= 14:
        digit = data[begin]
        begin += 1
        if digit < 0x80:
            return begin, begin + (length | digit << shift)
        length |= (digit & 0x7F) << shift
        shift += 7
    return None


def message_in(data: bytes, begin: int, end: int, *, v5: bool) -> tuple[str, int, bytes] | None:
    """Topic, packet id and payload of the PUBLISH with this body; None if it is not plain."""
    if end - begin < 2:
        return None
    topic_at = begin + 2
    packet_id_at = topic_at + (data[begin] << 8 | data[begin + 1])
    payload_at = packet_id_at + 2 + v5
    if payload_at > end or packet_id_at == topic_at or (v5 and data[packet_id_at + 2]):
        return None
    try:
        topic = data[topic_at:packet_id_at].decode()
    except UnicodeDecodeError:
        return None
    packet_id = data[packet_id_at] << 8 | data[packet_id_at + 1]
    return topic, packet_id, data[payload_at:end]


def acknowledged_in(data: bytes, begin: int, end: int) -> int | None:
    """The packet id of the PUBACK with this body; None if it says more than that."""
    return data[begin] << 8 | data[begin + 1] if end - begin == 2 else None


def head_of(topic: bytes, packet_id: int, payload_bytes: int, *, retained: bool, v5: bool) -> bytes:
    """What comes before the payload in the PUBLISH of such a message."""
    length = 2 + len(topic) + 2 + v5 + payload_bytes
    head = bytearray([0x33 if retained else 0x32])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    head += len(topic).to_bytes(2, "big")
    head += topic
    head += packet_id.to_bytes(2, "big")
    if v5:
        head.append(0)  # no properties
    return bytes(head)


def acknowledgement(packet_id: int) -> bytes:
    """The PUBACK of a message that was taken."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")
