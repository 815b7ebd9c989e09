"""The few shapes of SQL that the store uses, in words that every database understands."""

from typing import Any, TypeVar

from sqlalchemy import Connection, Select, Table, func, insert, select, update

__all__ = ["Queries"]

_T = TypeVar("_T")


class Queries:
    """Dataclass rows over one connection, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._sql = connection

    def _one(
        self, kind: type[_T], query: Select[Any], given: dict[str, Any] | None = None
    ) -> _T | None:
        row = self._sql.execute(query, given).first()
        return None if row is None else kind(**row._mapping)

    def _all(self, kind: type[_T], query: Select[Any]) -> list[_T]:
        return [kind(**row._mapping) for row in self._sql.execute(query)]

    def _counts(self, column: Any, *where: Any) -> dict[Any, int]:
        query = select(column, func.count()).where(*where).group_by(column)
        return {row[0]: row[1] for row in self._sql.execute(query)}

    def _put(self, table: Table, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Update or insert, in SQL that every database understands."""
        query = update(table).where(*(table.c[k] == v for k, v in key.items())).values(values)
        if not self._sql.execute(query).rowcount:
            self._sql.execute(insert(table).values({**key, **values}))

    def _change(self, table: Table, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Update one row that is there. Raises ValueError when it is not: our bug."""
        query = update(table).where(*(table.c[k] == v for k, v in key.items())).values(values)
        if self._sql.execute(query).rowcount != 1:
            raise ValueError(f"no such row in {table.name}: {key}")
