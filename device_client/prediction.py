"""Ask the newest model: once (`midge-device infer`), or for as long as it runs (`predict`).

The model is somebody else's program, so it runs in a process of its own that is locked in
as training is (`device_client.sandbox.confinement`). This side reads files, answers
callers, and checks what comes back.

`predict` listens on a Unix socket that the device's group may use. A question is one line
of JSON, `{"input": [[…]]}` (or `inputs`, a list with one for each input of the task; `raw`
for a recording that the task prepares), and so is the answer: `output`, `label`, `model`.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.task.runtime import warm_up
from device_client.model import Kind, Model, newest
from device_client.sandbox import confinement
from device_client.sandbox.tiny_model import TINY_MODEL

__all__ = ["LockedModel", "serve"]

Array = NDArray[Any]

_LENGTH = struct.Struct("<I")
_QUESTION_BYTES_MAX = 64 * 1024 * 1024
_LINE_BYTES_MAX = 8 * 1024 * 1024
_BACKLOG = 16
_PATIENCE_S = 10.0  # with a caller who begins a line and does not end it


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array, in C order."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes


class _Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: list[_Table]
    raw: bool = False


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    output: _Table | None = None
    labels: list[str] = []
    error: str = ""


class LockedModel:
    """The newest model of the device in `folder`, in a process that can do nothing else."""

    def __init__(self, folder: Path, *, kind: Kind | None = None) -> None:
        """Raises LocalError when there is no model, or it does not load."""
        self.path, self.kind, self._content = newest(folder, kind)
        self._folder, self._wanted = folder, kind
        self._line, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            self._line.close()
            _live(theirs, parent, self.path, self.kind, self._content)
        theirs.close()
        self.version = int(self._hear().labels[0])

    def predict(self, inputs: Sequence[Array], *, raw: bool = False) -> tuple[Array, list[str]]:
        """The outputs [rows, …], and each row's label. Raises LocalError."""
        _send(self._line, _Question([_table(each) for each in inputs], raw))
        answer = self._hear()
        try:
            if answer.output is None:
                raise ValueError("no output")
            return _array(answer.output), answer.labels
        except (ValueError, TypeError):  # what a stranger's process may say
            raise LocalError(f"the model in {self.path} gave no answer that is one") from None

    def is_newest(self) -> bool:
        """Whether no other file has taken the place of the one that was loaded."""
        with contextlib.suppress(LocalError):
            return newest(self._folder, self._wanted)[2] == self._content
        return True

    def close(self) -> None:
        """End the process."""
        self._line.close()
        with contextlib.suppress(OSError):
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)

    def __enter__(self) -> "LockedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self) -> _Answer:
        try:
            answer: _Answer = _receive(self._line, _Answer)
        except (OSError, EOFError, msgspec.MsgspecError):
            raise LocalError(
                f"the model in {self.path} ended its process; it does not run on this machine"
            ) from None
        if answer.error:
            raise LocalError(answer.error)
        return answer


def _live(line: socket.socket, parent: int, path: Path, kind: Kind, content: bytes) -> None:
    """The locked process: from here on there is a model, and no way out."""
    code = 1
    try:
        memory_bytes = confinement.begin(parent=parent, memory_bytes=0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        warm_up(TINY_MODEL)
        np.random.default_rng(1).random(1)
        confinement.lock(keep=(line.fileno(),), threads=False, memory_bytes=memory_bytes)
        _answer_questions(line, lambda: Model(path, kind, content))
        code = 0
    except EOFError:
        code = 0
    finally:
        os._exit(code)


def _answer_questions(line: socket.socket, load: Callable[[], Model]) -> None:
    try:
        model = load()
    except MidgeError as error:
        _send(line, _Answer(error=str(error)))
        return
    _send(line, _Answer(labels=[str(model.version)]))
    while True:
        question = _receive(line, _Question)
        try:
            output = model.predict(*map(_array, question.inputs), raw=question.raw)
            labels = [model.label(row) for row in output] if output.ndim > 1 else []
            _send(line, _Answer(output=_table(output), labels=labels))
        except MidgeError as error:
            _send(line, _Answer(error=str(error)))


# ── For as long as it runs ──────────────────────────────────────────────────────────────


def serve(
    folder: Path, path: Path, stopped: Callable[[], bool], *, kind: Kind | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Answer callers on the Unix socket `path` until `stopped`; take newer models by itself.

    `ready` is called once it listens. Raises LocalError when there is no model yet, or `path` is
    in use.
    """
    model = LockedModel(folder, kind=kind)
    try:
        with _listening(path) as listener:
            ready()
            while not stopped():
                with contextlib.suppress(TimeoutError):
                    caller, _ = listener.accept()
                    if not model.is_newest():
                        model.close()
                        model = LockedModel(folder, kind=kind)
                    with caller, contextlib.suppress(OSError):
                        _talk(caller, model, stopped)
    finally:
        model.close()


@contextlib.contextmanager
def _listening(path: Path) -> Any:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.settimeout(0.5)
    try:
        if path.exists():
            _refuse_if_alive(path)
            path.unlink()
        old = os.umask(0o117)  # the device's user and group
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LocalError(f"cannot listen on {path}: {error.strerror or error}") from None
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            path.unlink()


def _refuse_if_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left behind by a process that was killed
        except OSError:
            raise LocalError(f"{path} is there and is no socket; say --socket") from None
    raise LocalError(f"something answers on {path} already; stop it, or say --socket")


def _talk(caller: socket.socket, model: LockedModel, stopped: Callable[[], bool]) -> None:
    """Answer one caller's lines, one after the other."""
    caller.settimeout(_PATIENCE_S)
    with caller.makefile("rb") as lines:
        while not stopped():
            line = lines.readline(_LINE_BYTES_MAX + 1)
            if not line:
                return
            caller.sendall(json.dumps(_answer(line, model)).encode() + b"\n")


def _answer(line: bytes, model: LockedModel) -> dict[str, Any]:
    if len(line) > _LINE_BYTES_MAX:
        return {"ok": False, "error": f"a line has at most {_LINE_BYTES_MAX} bytes"}
    try:
        asked = json.loads(line)
        given = asked["inputs"] if "inputs" in asked else [asked["input"]]
        arrays = [np.asarray(each) for each in given]
        output, labels = model.predict(arrays, raw=bool(asked.get("raw", False)))
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"ok": False, "error": 'write one line of JSON, such as {"input": [[0.1, 0.2]]}'}
    except LocalError as error:
        return {"ok": False, "error": str(error)}
    return {"ok": True, "output": output.tolist(), "label": labels, "model": model.version,
            "kind": model.kind}  # fmt: skip


# ── Frames between the two processes ────────────────────────────────────────────────────


def _table(array: Array) -> _Table:
    plain = np.ascontiguousarray(array)
    if plain.dtype.kind not in "fiub":
        raise LocalError("the input holds something that is not a number")
    return _Table(plain.shape, plain.dtype.str, plain.tobytes())


def _array(table: _Table) -> Array:
    dtype = np.dtype(table.dtype)
    if dtype.kind not in "fiub":
        raise ValueError(table.dtype)
    return np.frombuffer(table.data, dtype).reshape(table.shape)


def _send(line: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    line.sendall(_LENGTH.pack(len(data)) + data)


def _receive(line: socket.socket, kind: Any) -> Any:
    (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if length > _QUESTION_BYTES_MAX:
        raise EOFError
    return msgspec.msgpack.decode(_exactly(line, length), type=kind)


def _exactly(line: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        got = line.recv(min(length - len(parts), 1 << 20))
        if not got:
            raise EOFError
        parts += got
    return bytes(parts)
