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


def main():
    how, descriptor = sys.argv[1], int(sys.argv[2])
    line = socket.socket(fileno=descriptor)

    def say(message, *blobs):
        for part in talk.frame(message, *blobs):
            line.sendall(part)

    def hear():
        def read(length):
            found = bytearray()
            while len(found) < length:
                got = line.recv(length - len(found))
                if not got:
                    os._exit(0)
                found += got
            return found

        return talk.read_frame(read, HEARD, head_bytes_max=1 << 24, blob_bytes_max=1 << 30)

    task = msgspec.json.decode(hear()[0].task, type=Task)
    good = {spec.name: np.zeros(spec.shape, np.float32) for spec in task.weights}
    metrics = dict.fromkeys(task.metrics, 0.5)

    def done(found, **changes):
        fields = {"loss": 1.0, "metrics": metrics, "seconds": 0.1, "peak_bytes": 0} | changes
        say(talk.Done(**fields), found if isinstance(found, bytes) else weights.encode(found))

    if how == "no samples":
        say(talk.Ready(samples=0, confinement=Confinement(0)))
    if how == "too many samples":
        line.sendall(
            _raw({"type": "Ready", "samples": 1 << 60, "confinement": {"memory_bytes": 0}})
        )
    if how == "mute":
        time.sleep(600)
    say(READY)
    hear()
    say(talk.Built(runtime="a runtime\nERROR a line of its own"))
    hear()
    match how:
        case "a head that is too long":
            line.sendall(struct.pack("<IQ", 1 << 31, 0))
        case "a blob that is too long":
            line.sendall(struct.pack("<IQ", 10, 1 << 40))
        case "no message":
            line.sendall(struct.pack("<IQ", 4, 0) + b"\xc1\xc1\xc1\xc1")
        case "deeply nested":
            line.sendall(struct.pack("<IQ", 100_000, 0) + b"\x91" * 100_000)
        case "another message":
            say(talk.Measured(loss=0.0, metrics={}))
        case "an unknown field":
            line.sendall(_raw({"type": "Stopped", "extra": 1}))
        case "steps that were not":
            say(talk.Steps(last=3, losses=[1.0]))
        case "steps without end":
            say(talk.Steps(last=4096, losses=[1.0] * 4096))
        case "done too early":
            done(good)
        case "cut short":
            line.sendall(b"".join(talk.frame(talk.Stopped()))[:-1])
            os._exit(0)
        case "a letter a second":
            for byte in b"".join(talk.frame(talk.Stopped())):
                line.sendall(bytes([byte]))
                time.sleep(0.4)
        case _:
            say(talk.Steps(last=2, losses=[1.0, 1.0]))
            _end(how, done, good, metrics)
    time.sleep(600)


def _end(how, done, good, metrics):
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
            done(good, metrics=metrics | {"x": 1.0})
        case "no loss":
            done(good, loss=float("nan"))
        case "the truth":
            done(good)


def _raw(message):
    head = msgspec.msgpack.encode(message)
    return struct.pack("<IQ", len(head), 0) + head


if __name__ == "__main__":
    main()
