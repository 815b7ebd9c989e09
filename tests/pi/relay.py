"""One connection, from standard input and output to a port of this machine: `relay.py PORT`.

qemu starts it for each connection that the guest makes to the one address that it may reach.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable

BLOCK = 1 << 16


def main(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        up = threading.Thread(target=_pump, args=(lambda: os.read(0, BLOCK), peer.sendall, peer))
        up.daemon = True
        up.start()
        _pump(lambda: peer.recv(BLOCK), _write_all, None)


def _pump(
    read: Callable[[], bytes], write: Callable[[bytes], object], ends: socket.socket | None
) -> None:
    while block := read():
        write(block)
    if ends is not None:
        ends.shutdown(socket.SHUT_WR)


def _write_all(block: bytes) -> None:
    while block:
        block = block[os.write(1, block) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
