"""What every update asks of the database, compiled once and then run with plain values.

SQLAlchemy makes the text, as the database at hand wants it. What it would do at every run,
look the statement up and convert each value of each row, takes longer than SQLite needs to
carry it out, and is left out here. So the values must be such as every driver takes as they
are (PEP 249): str, bytes, int, float, None.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ClauseElement, Connection, CursorResult, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["Prepared"]


class Prepared:
    """A statement all of whose values are bindparams, two or more, given anew at every run."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._compiled: WeakKeyDictionary[Dialect, _Compiled] = WeakKeyDictionary()

    def one(self, connection: Connection, values: Mapping[str, Any]) -> CursorResult[Any]:
        """Run it once, with a value for each bindparam by its name."""
        this = self._for(connection.dialect)
        return connection.exec_driver_sql(this.text, this.shape([values[n] for n in this.names]))

    def each(self, connection: Connection, rows: Sequence[object]) -> None:
        """Run it for every one of `rows`, at least one, in one call of the driver.

        The bindparams are named as the attributes of a row.
        """
        this = self._for(connection.dialect)
        take = attrgetter(*this.names)
        connection.exec_driver_sql(this.text, [this.shape(take(row)) for row in rows])

    def _for(self, dialect: Dialect) -> "_Compiled":
        found = self._compiled.get(dialect)
        if found is None:
            found = self._compiled[dialect] = _Compiled(self._statement, dialect)
        return found


class _Compiled:
    """The text for one database, and how its driver wants the values of `names`, in this order."""

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        made = statement.compile(dialect=dialect)
        if not isinstance(made, SQLCompiler):
            raise TypeError("only what reads or changes rows can be prepared")
        self.text = str(made)
        self.names = tuple(made.positiontup or made.params)
        self.shape: Callable[[Sequence[Any]], Any] = tuple
        if made.positiontup is None:  # this driver finds values by their names
            self.shape = lambda values: dict(zip(self.names, values, strict=True))
