"""The tables. Columns have the names of the fields in rows.py; types are portable SQL.

`VERSION` goes up with every change that an older midge could not read.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

__all__ = [
    "METADATA",
    "VERSION",
    "certificates",
    "devices",
    "meta",
    "models",
    "receipts",
    "rejects",
    "requests",
    "rounds",
    "runs",
    "tokens",
]

VERSION = 1
METADATA = MetaData()

meta = Table(
    "meta",
    METADATA,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

devices = Table(
    "devices",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("sign_public", LargeBinary, nullable=False),
    Column("kem_public", LargeBinary, nullable=False),
    Column("tls_public", LargeBinary, nullable=False),
    Column("psk", LargeBinary, nullable=False),
    Column("status", String(16), nullable=False),
    Column("software", Text, nullable=False),
    Column("enrolled_at", Double, nullable=False),
    Column("last_seen", Double),
    Column("last_round", BigInteger, nullable=False),
    Column("certificate_serial", String(40), nullable=False),
    Column("certified_until", Double, nullable=False),
    Column("keys_since", Double, nullable=False),
    Column("wanted", String(16), nullable=False),
)

# Every certificate that was ever made for a name, or it could not be revoked. A bundle's comes
# before its device is one: no foreign key.
certificates = Table(
    "certificates",
    METADATA,
    Column("serial", String(40), primary_key=True),
    Column("device", String(64), nullable=False, index=True),
    Column("until", Double, nullable=False),
    Column("tls_public", LargeBinary, nullable=False),
    Column("pem", Text, nullable=False),
)

# A token comes before its device is one: no foreign key.
tokens = Table(
    "tokens",
    METADATA,
    Column("device", String(64), primary_key=True),
    Column("secret", LargeBinary, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("used_at", Double),
    Column("by_hand", Boolean, nullable=False),
)

runs = Table(
    "runs",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("task_name", String(64), nullable=False),
    Column("task_digest", LargeBinary, nullable=False),
    Column("rounds_total", BigInteger, nullable=False),
    Column("rounds_done", BigInteger, nullable=False),
    Column("until_json", Text, nullable=False),
    Column("target", BigInteger, nullable=False),
    Column("quorum", BigInteger, nullable=False),
    Column("deadline_s", Double, nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
)

rounds = Table(
    "rounds",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", ForeignKey("runs.id"), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("announcement", LargeBinary, nullable=False),
    Column("round_key", LargeBinary),
    Column("fleet_key", LargeBinary),
    Column("model_before", BigInteger, nullable=False),
    Column("model_after", BigInteger),
    Column("opened_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("summary_json", Text, nullable=False),
)
# At most one row can be `open`: the index holds that one value only.
Index(
    "one_open_round",
    rounds.c.status,
    unique=True,
    sqlite_where=rounds.c.status == "open",
    postgresql_where=rounds.c.status == "open",
)

receipts = Table(
    "receipts",
    METADATA,
    Column("upload", LargeBinary, primary_key=True),
    Column("round", ForeignKey("rounds.number"), nullable=False, index=True),
    Column("device", ForeignKey("devices.name"), nullable=False),
    Column("init", LargeBinary, nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("examples", BigInteger, nullable=False),
    Column("metrics_json", Text, nullable=False),
    Column("at", Double, nullable=False),
)
# The last line of defence against counting a device twice: the database refuses it too.
Index(
    "one_accepted_per_device",
    receipts.c.round,
    receipts.c.device,
    unique=True,
    sqlite_where=receipts.c.status == "accepted",
    postgresql_where=receipts.c.status == "accepted",
)

models = Table(
    "models",
    METADATA,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("task_digest", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("metrics_json", Text, nullable=False),
    Column("optimiser_state_digest", LargeBinary),
)

requests = Table(
    "requests",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("reply", Text, nullable=False),
)

rejects = Table(
    "rejects",
    METADATA,
    Column("reason", String(64), primary_key=True),
    Column("count", BigInteger, nullable=False),
)
