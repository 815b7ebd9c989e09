"""Settings from a TOML file into a typed struct, or one sentence about what is wrong.

Both sides use this: a key that does not exist, a value of the wrong type or out of
range, and a syntax error are refused with the file, the line or key, and what is
allowed. Nothing is guessed and nothing is ignored.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from broker_bridge.errors import LocalError

__all__ = ["assigned", "load_config", "overridden"]

T = TypeVar("T", bound=msgspec.Struct)


def load_config(path: Path, kind: type[T]) -> T:
    """Return the settings in `path`. Raises LocalError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LocalError(f"{path}: there is no such file; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; numbers of 5,000 digits
        raise LocalError(f"{path} is not valid TOML: {error}") from None
    return _convert(table, kind, str(path))


def overridden(config: T, source: str, **options: object) -> T:
    """Return `config` with the options that were given (not None) in place, checked again.

    Raises LocalError that names `source`, the command line for example.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return _convert(msgspec.to_builtins(config) | given, type(config), source)


def assigned(config: T, assignments: Sequence[str]) -> T:
    """Return `config` with each `NAME=VALUE` in place, as in `rounds.deadline_s=60`.

    A value is read as TOML, and as plain text where it is none. Raises LocalError.
    """
    table: dict[str, Any] = msgspec.to_builtins(config)
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise LocalError(f"--set {text}: write NAME=VALUE, for example rounds.deadline_s=60")
        place: Any = table
        *tables, last = name.strip().split(".")
        for level in tables:
            place = place.setdefault(level, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise LocalError(f"--set {text}: {'.'.join(tables)} is a setting, not a table of them")
        place[last] = _value(value.strip())
    return _convert(table, type(config), "--set")


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(table: dict[str, object], kind: type[T], source: str) -> T:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise LocalError(f"{source}: {_sentence(str(error), kind)}") from None


def _sentence(text: str, kind: type[msgspec.Struct]) -> str:
    """Turn msgspec's words into ours: name the key, and what could stand there."""
    what, _, where = text.partition(" - at `$")
    where = where.strip("`.")
    if what.startswith("Object contains unknown field"):
        key = what.split("`")[1]
        place = _struct_at(kind, where)
        name = f"{where}.{key}" if where else key
        return f"there is no setting {name!r}; allowed are {', '.join(sorted(place))}"
    if what.startswith("Object missing required field"):
        return f"the setting {what.split('`')[1]!r} is missing; add it"
    sentence = f"{where or 'the file'}: {what[:1].lower()}{what[1:]}"
    choices = _choices(kind, where) if what.startswith("Invalid enum value") else ()
    return f"{sentence}; allowed are {', '.join(choices)}" if choices else sentence


def _choices(kind: type[msgspec.Struct], where: str) -> tuple[str, ...]:
    """The values that a setting may have, where they are listed."""
    table, _, name = where.rpartition(".")
    found = [f.type for f in _fields_at(kind, table) if f.encode_name == name]
    return tuple(str(choice) for each in found for choice in get_args(each))


def _struct_at(kind: type[msgspec.Struct], where: str) -> tuple[str, ...]:
    return tuple(field.encode_name for field in _fields_at(kind, where))


def _fields_at(kind: type[msgspec.Struct], where: str) -> tuple[msgspec.structs.FieldInfo, ...]:
    for name in filter(None, where.split(".")):
        for field in msgspec.structs.fields(kind):
            if field.encode_name == name and isinstance(field.type, type):
                kind = field.type
    return msgspec.structs.fields(kind)
