"""Prepared statements, on every way in which a driver may want its values."""

import sqlite3
from typing import NamedTuple

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Double,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from server.store import schema
from server.store.prepared import Prepared

THINGS = Table(
    "things",
    MetaData(),
    Column("name", String(8), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("at", Double),
)


class Thing(NamedTuple):
    at: float | None  # not in the order of the columns
    name: str
    data: bytes


ROWS = [Thing(1.5, "a", b"\x00\xff %s ? :name"), Thing(None, "b", b""), Thing(2.0, "c", b"c")]
ADD = Prepared(insert(THINGS))
MOVE = Prepared(update(THINGS).where(THINGS.c.name == bindparam("of")).values(at=bindparam("then")))
FIND = Prepared(select(THINGS.c.name).where(THINGS.c.name.in_([bindparam("x"), bindparam("y")])))


@pytest.fixture(params=["qmark", "named", "numeric"])
def sql(request):
    engine = create_engine("sqlite://", paramstyle=request.param)
    THINGS.metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def things(sql: Connection) -> list[Thing]:
    query = select(THINGS.c.at, THINGS.c.name, THINGS.c.data).order_by(THINGS.c.name)
    return [Thing(*row) for row in sql.execute(query)]


def test_many_rows_are_added_and_each_value_is_in_its_column(sql: Connection) -> None:
    ADD.each(sql, ROWS[:1])
    ADD.each(sql, ROWS[1:])
    assert things(sql) == ROWS


def test_one_row_is_changed_by_names(sql: Connection) -> None:
    ADD.each(sql, ROWS)
    MOVE.one(sql, {"then": 9.0, "of": "b", "of no concern": 1})
    assert [each.at for each in things(sql)] == [1.5, 9.0, 2.0]


def test_what_is_asked_for_is_found(sql: Connection) -> None:
    ADD.each(sql, ROWS)
    assert set(FIND.one(sql, {"x": "c", "y": "a"}).scalars()) == {"a", "c"}
    assert FIND.one(sql, {"x": "nobody", "y": "nobody"}).first() is None


def test_a_row_that_is_refused_is_the_error_it_always_is(sql: Connection) -> None:
    with pytest.raises(IntegrityError, match="UNIQUE") as caught:
        ADD.each(sql, [ROWS[0], ROWS[0]])
    assert isinstance(caught.value.orig, sqlite3.IntegrityError)


def test_a_value_that_is_not_given_is_our_own_mistake(sql: Connection) -> None:
    with pytest.raises(KeyError, match="then"):
        MOVE.one(sql, {"of": "b"})


def test_postgresql_is_given_its_own_words() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    made = Prepared(insert(schema.receipts))._for(dialect)
    assert "VALUES (%(upload)s, %(round)s" in made.text
    assert "RETURNING" not in made.text
    row = dict.fromkeys(made.names, 1)
    assert made.shape(list(row.values())) == row
