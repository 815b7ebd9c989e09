"""docs/brokers.md, read by the tests: its table, and its nats.conf made ready to run here."""

import re
from pathlib import Path

from broker_bridge.link.local_broker import free_port
from server.fleet.home import Home

DOC = Path(__file__).parents[2] / "docs" / "brokers.md"
BEGIN, END = "<!-- table: python -m tests.conformance.table -->\n", "<!-- end of table -->"


def printed_table() -> str:
    """The table as it stands in the file."""
    return DOC.read_text().partition(BEGIN)[2].partition(END)[0].strip() + "\n"


def shipped_nats_conf() -> str:
    """The configuration that an operator copies."""
    found = re.search(r"^```conf\n(.*?)^```$", DOC.read_text(), re.M | re.S)
    assert found is not None
    return found[1]


def nats_conf(home: Home, folder: Path, port: int, names: tuple[str, str]) -> str:
    """The same with our folders, our ports and our two devices, and nothing else changed."""
    text = shipped_nats_conf()
    for theirs, ours in {
        "/etc/nats/midge": str(home.broker),
        "/var/lib/nats": str(folder / "store"),
        "0.0.0.0:8883": f"127.0.0.1:{port}",
        "127.0.0.1:4222": f"127.0.0.1:{free_port()}",
        "ward-3": names[0],
        "ward-4": names[1],
    }.items():
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    return text
