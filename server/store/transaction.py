"""Everything that can be asked of the database or changed in it, inside one transaction.

Rows go in and come out as the dataclasses of rows.py; nothing of SQLAlchemy leaves this
folder.
"""

from server.store.fleet_queries import FleetQueries
from server.store.round_queries import RoundQueries

__all__ = ["Transaction"]


class Transaction(FleetQueries, RoundQueries):
    """Made by `Database.transaction` and `Database.reading`; of no use after the block."""
