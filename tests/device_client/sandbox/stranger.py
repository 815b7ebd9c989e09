"""A training process that lies: it speaks the frames, and says what no process of ours says.

python stranger.py HOW DESCRIPTOR PARENT MEMORY_BYTES
"""

import os
import socket
import struct
import sys
import time

import msgspec
import numpy as np

from broker_bridge.task.taskfile import Task
from broker_bridge.wire import weights
from device_client.sandbox import talk
from device_client.sandbox.confinement import Confinement

HEARD = msgspec.msgpack.Decoder(
    talk.Load | talk.Build | talk.Train | talk.Evaluate | talk.Ack | talk.Stop
)
READY = talk.Ready(samples=48, confinement=Confinement(0))


class Line:
    """The socket to the agent."""

    def __init__(self, descriptor):
        self._socket = socket.socket(fileno=descriptor)

    def say(self, message, *blobs):
        for part in talk.frame(message, *blobs):
            self._socket.sendall(part)

    def say_bytes(self, data):
        self._socket.sendall(data)

    def hear(self):
        return talk.read_frame(self._read, HEARD, head_bytes_max=1 << 24, blob_bytes_max=1 << 30)

    def _read(self, length):
        found = bytearray()
        while len(found) < length:
            got = self._socket.recv(length - len(found))
            if not got:
                os._exit(0)
            found += got
        return found


class Work:
    """What honest training of this task would answer, for lies to differ from."""

    def __init__(self, line, task):
        self._line = line
        self.good = {spec.name: np.zeros(spec.shape, np.float32) for spec in task.weights}
        self.metrics = dict.fromkeys(task.metrics, 0.5)

    def done(self, found, **changes):
        fields = {"loss": 1.0, "metrics": self.metrics, "seconds": 0.1, "peak_bytes": 0} | changes
        blob = found if isinstance(found, bytes) else weights.encode(found)
        self._line.say(talk.Done(**fields), blob)


def main():
    how, line = sys.argv[1], Line(int(sys.argv[2]))
    work = Work(line, msgspec.json.decode(line.hear()[0].task, type=Task))
    _begin(how, line)
    line.say(READY)
    line.hear()
    line.say(talk.Built(runtime="a runtime\nERROR a line of its own"))
    line.hear()
    if not _break_off(how, line, work):
        line.say(talk.Steps(last=2, losses=[1.0, 1.0]))
        _end(how, work)
    time.sleep(600)


def _begin(how, line):
    """Lies about the samples."""
    if how == "no samples":
        line.say(talk.Ready(samples=0, confinement=Confinement(0)))
    if how == "too many samples":
        ready = {"type": "Ready", "samples": 1 << 60, "confinement": {"memory_bytes": 0}}
        line.say_bytes(_raw(ready))
    if how == "mute":
        time.sleep(600)


def _break_off(how, line, work):
    """Lies in the middle of training; False for one that comes at its end."""
    match how:
        case "a head that is too long":
            line.say_bytes(struct.pack("<IQ", 1 << 31, 0))
        case "a blob that is too long":
            line.say_bytes(struct.pack("<IQ", 10, 1 << 40))
        case "no message":
            line.say_bytes(struct.pack("<IQ", 4, 0) + b"\xc1\xc1\xc1\xc1")
        case "deeply nested":
            line.say_bytes(struct.pack("<IQ", 100_000, 0) + b"\x91" * 100_000)
        case "another message":
            line.say(talk.Measured(loss=0.0, metrics={}))
        case "an unknown field":
            line.say_bytes(_raw({"type": "Stopped", "extra": 1}))
        case "steps that were not":
            line.say(talk.Steps(last=3, losses=[1.0]))
        case "steps without end":
            line.say(talk.Steps(last=4096, losses=[1.0] * 4096))
        case "done too early":
            work.done(work.good)
        case "cut short":
            line.say_bytes(b"".join(talk.frame(talk.Stopped()))[:-1])
            os._exit(0)
        case "a letter a second":
            for byte in b"".join(talk.frame(talk.Stopped())):
                line.say_bytes(bytes([byte]))
                time.sleep(0.4)
        case _:
            return False
    return True


def _end(how, work):
    """Lies about what came of it."""
    done, good = work.done, work.good
    first = next(iter(good))
    match how:
        case "weights that are no number":
            done(good | {first: np.full_like(good[first], np.nan)})
        case "weights of another shape":
            done(good | {first: good[first].ravel()})
        case "a tensor too few":
            done({name: array for name, array in good.items() if name != first})
        case "no weights":
            done(b"")
        case "weights and more":
            done(weights.encode(good) + b"!")
        case "an optimiser of its own":
            done(weights.encode(good) + weights.encode({"x": good[first]}), optimiser_bytes=100)
        case "more optimiser than there is":
            done(good, optimiser_bytes=1 << 40)
        case "metrics of another task":
            done(good, metrics=work.metrics | {"x": 1.0})
        case "no loss":
            done(good, loss=float("nan"))
        case "the truth":
            done(good)


def _raw(message):
    head = msgspec.msgpack.encode(message)
    return struct.pack("<IQ", len(head), 0) + head


if __name__ == "__main__":
    main()
