"""A TCP relay between a client and a broker whose wire a test can cut, block or stall."""

import contextlib
import selectors
import socket
import threading

BUFFER_BYTES = 65_536


class Proxy:
    """Relays `host`:`port` to 127.0.0.1:`target`. Use as a context manager."""

    def __init__(self, target: int, *, host: str = "127.0.0.1") -> None:
        self._target = target
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._stopping = False
        self.blocked = False  # take no new connections
        self.stalled = False  # keep connections, forward nothing: a half-open line
        self.swallow: bytes | None = None  # what holds these bytes is not forwarded
        self.accepted = 0
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """End every connection without a word."""
        with self._lock:
            for each in self._pairs:
                each.close()
            self._pairs.clear()

    def _relay(self) -> None:
        while not self._stopping:
            with self._lock:
                watched = [] if self.stalled else list(self._pairs)
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                for each in watched:
                    with contextlib.suppress(ValueError, KeyError, OSError):
                        selector.register(each, selectors.EVENT_READ)
                for key, _ in selector.select(0.02):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._forward(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.blocked:
            client.close()
            return
        self.accepted += 1
        broker = None
        with contextlib.suppress(OSError):
            broker = socket.create_connection(("127.0.0.1", self._target))
        if broker is None:
            client.close()
            return
        with self._lock:
            self._pairs[client], self._pairs[broker] = broker, client

    def _forward(self, source) -> None:
        with self._lock:
            target = self._pairs.get(source)
        if target is None:
            return
        try:
            data = source.recv(BUFFER_BYTES)
            if data:
                self._seen(source, data)
                if self.swallow is None or self.swallow not in data:
                    target.sendall(data)
                return
        except OSError:
            pass
        with self._lock:
            for each in (source, target):
                self._pairs.pop(each, None)
                each.close()

    def _seen(self, source, data: bytes) -> None:
        """What goes by, for whoever listens in; the client's end of the line has our port."""
