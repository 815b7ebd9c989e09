"""Change bytes the way an attacker or a dying card would: by structure where there is one.

`mutate` is a function of bytes and a seed, so atheris and Hypothesis change inputs alike and
a finding can be made again. A first byte that chooses a mode is changed like any other.
"""

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["mutate"]

BYTES_MAX = 1 << 16

# What codecs stumble over: bounds, signs, floats that are none, words of other types.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 31, 32, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32,
    2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 0.0, -0.0, 1.5, 1e-300, 1e300, -1e39, 1e39,
    "", "a", "-", "é", "\x00", "\n", "/", "../..", "+", "#", "x" * 41, "x" * 600, "\u202e",
    b"", b"\x00", b"\xff" * 8, bytes(32), bytes(31), b"\x01" + bytes(31), b"x" * 5000,
    [], {}, [[]], [None], {"": None}, {"v": 2}, [0] * 9, [2**40] * 3, ["x"] * 70,
]  # fmt: skip
ONLY_BINARY = [float("nan"), float("inf"), float("-inf")]
ONLY_JSON = [10**30, -(10**400), "NUMBER"]
RAW = [b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
       b"1e999", b"NaN", b"\\ud800", b"\xff", b"\xed\xa0\x80", b"[" * 2000, b"\x91" * 2000,
       b'{"a":' * 2000, b"9" * 5000]  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes:
    """Return `data` with one to four changes that `seed` decides."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        change: Callable[[bytes, random.Random], bytes | None] = draw.choice(
            [_by_bytes, _by_fields, _by_fields]
        )
        data = change(data, draw) or _by_bytes(data, draw)
    return data[:BYTES_MAX]


def _by_bytes(data: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(data))
    end = min(len(data), at + draw.choice([1, 1, 2, 4, 8, 32]))
    match draw.randrange(7):
        case 0:
            return data[:at] + draw.randbytes(end - at) + data[end:]
        case 1 if data and at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[end:]
        case 4:
            return data[:end] + data[at:]
        case 5:
            return data[:at] + draw.choice(RAW) + data[end:]
    return data[:at] + draw.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * (end - at) + data[end:]


def _by_fields(data: bytes, draw: random.Random) -> bytes | None:
    """Change one field of a MessagePack or JSON value that starts at 0, or after a mode byte."""
    for start in (1, 0):
        for decode, encode, odd in _CODECS:
            try:
                value = decode(data[start:])
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue
            if isinstance(value, dict | list):
                changed = _changed(value, draw, [*ODD, *odd])
                with contextlib.suppress(OverflowError, TypeError):  # no codec says everything
                    return data[:start] + encode(changed)
    return None


def _to_json(value: Any) -> bytes:
    return json.dumps(value, default=lambda raw: raw.hex(), ensure_ascii=draw_ascii(value)).encode(
        errors="surrogatepass"
    )


def draw_ascii(value: Any) -> bool:
    """Spell strings out or not: both are JSON, and readers differ in what they forgive."""
    return bool(len(str(value)) % 2)


_CODECS: list[tuple[Callable[[bytes], Any], Callable[[Any], bytes], list[Any]]] = [
    (msgspec.json.decode, _to_json, ONLY_JSON),
    (msgspec.msgpack.decode, msgspec.msgpack.encode, ONLY_BINARY),
]


def _changed(value: Any, draw: random.Random, odd: list[Any]) -> Any:
    """A copy of `value` in which one thing is another, is missing, or is new."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value, key=str))
        match draw.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {draw.choice(["v", "x", "type", "", "é"]): draw.choice(odd)}
        return value | {key: _changed(value[key], draw, odd)}
    if isinstance(value, list) and value:
        at = draw.randrange(len(value))
        match draw.randrange(6):
            case 0:
                return [*value[:at], *value[at + 1 :]]
            case 1:
                return [*value[:at], value[at], *value[at:]]
        return [*value[:at], _changed(value[at], draw, odd), *value[at + 1 :]]
    if isinstance(value, bytes) and draw.random() < 0.5:
        return _by_bytes(value, draw)
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, value, -2 * value])
    return draw.choice(odd)
