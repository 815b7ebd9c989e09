"""`midge demo`: a whole federation on one machine, from keys to the closing table.

Everything is real: a private CA, mutual TLS and ACL, the broker, one server process and
ten device processes, one for each person in examples/wearables. Eight train; two hold
their data out and only measure. Nothing here does what a fleet could not do: it runs
the same commands, and watches the broker's traffic as the broker itself could.

    story.py       the demo from beginning to end
    stage.py       the parts that run: broker, server, people
    traffic.py     what the broker sees of them
    comparison.py  what federating brings, and whether the broker could read any of it
    table.py       the closing table
"""
