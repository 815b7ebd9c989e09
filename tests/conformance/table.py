"""Print the table of docs/brokers.md: `python -m tests.conformance.table`."""

from tests.conformance.capabilities import table

if __name__ == "__main__":
    print(table(), end="")
