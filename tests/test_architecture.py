"""The rules of ARCHITECTURE.md as code: rooms, pure cores, one home for each foreign library.

A rule is a function from a file's path and source to the violations in it, one sentence
each. It is tried on planted sources first, then on every file of the project.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("broker_bridge", "device_client", "server")
Rule = Callable[[str, str], list[str]]

# Which rooms a room may look into.
MAY_IMPORT = {
    "broker_bridge": {"broker_bridge"},
    "device_client": {"device_client", "broker_bridge"},
    "server": {"server", "broker_bridge"},
}

# Where a foreign library is used. A reader who wants to know how opens that one place.
# A home that ends in "/" is a folder.
HOMES = {
    "paho": ("broker_bridge/link/paho_client.py", "broker_bridge/link/paho_session.py"),
    "nacl": ("broker_bridge/wire/envelope.py",),
    "tflite_runtime": ("broker_bridge/task/runtime.py",),
    "ai_edge_litert": ("broker_bridge/task/runtime.py",),
    "iotcore": ("broker_bridge/link/local_broker.py",),
    "tensorflow": ("server/tasks/",),
    "keras": ("server/tasks/",),
    "cryptography": ("server/fleet/authority.py", "server/fleet/certificates.py"),
    "sqlalchemy": ("server/store/",),
    "rich": ("server/screen.py",),
}
NEVER_ON_A_DEVICE = {"cryptography", "keras", "rich", "sqlalchemy", "tensorflow"}

# Cores that take events, time included, and return effects.
PURE = (
    "broker_bridge/wire/",
    "broker_bridge/task/taskfile.py",
    "device_client/duties/",
    "device_client/participant.py",
    "device_client/renewing.py",
    "server/attendance.py",
    "server/coordinator.py",
    "server/measuring.py",
    "server/orders.py",
    "server/round.py",
    "server/cohort.py",
    "server/quotas.py",
    "server/aggregation/",
)
IMPURE_MODULES = {
    "asyncio", "datetime", "logging", "multiprocessing", "os", "paho", "pathlib", "random",
    "secrets", "select", "shutil", "signal", "socket", "sqlalchemy", "sqlite3", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip
# A durable file goes through Disk, or the simulation would not see its crashes (decision 0050).
DURABLE_CALLS = {
    "os.fdatasync", "os.fsync", "os.pwrite", "os.pwritev", "os.rename", "os.replace",
}  # fmt: skip
DISK = "broker_bridge/disk.py"
IMPURE_CALLS = {"open", "print", "input", "breakpoint"}
NUMPY_FILES = {
    "fromfile", "genfromtxt", "load", "loadtxt", "memmap", "save", "savetxt", "savez",
    "savez_compressed",
}  # fmt: skip
NUMPY_SEEDED = {"Generator", "BitGenerator", "SeedSequence", "PCG64", "Philox", "default_rng"}

UNSAFE_MODULES = {
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve",
}  # fmt: skip


# ── Reading a file ──────────────────────────────────────────────────────────────────────


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, wherever in the file, also by a literal name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                yield "." * node.level + (node.module or "")
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                if called(node) in {"__import__", "import_module", "importlib.import_module"}:
                    yield name


def called(call: ast.Call) -> str:
    """What is called, as written: `open`, `np.load`; empty when it has no such name."""
    try:
        return ast.unparse(call.func)
    except ValueError:
        return ""


def top(module: str) -> str:
    return module.split(".")[0]


def is_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path.startswith(p) if p.endswith("/") else path == p for p in places)


# ── The rules ───────────────────────────────────────────────────────────────────────────


def rooms(path: str, source: str) -> list[str]:
    """`device_client` and `server` see only `broker_bridge`, which sees neither."""
    allowed = MAY_IMPORT[top(path.replace("/", "."))]
    return [
        f"{path} imports {module}"
        for module in imports(source)
        if module.startswith(".") or (top(module) in ROOMS and top(module) not in allowed)
    ]


def homes(path: str, source: str) -> list[str]:
    """Each foreign library is imported in its own home and nowhere else."""
    return [
        f"{path} imports {module}, whose home is {HOMES[top(module)][0]}"
        for module in imports(source)
        if top(module) in HOMES and not is_in(path, HOMES[top(module)])
    ]


def light(path: str, source: str) -> list[str]:
    """What a device installs never needs what only an operator's machine carries."""
    if not path.startswith(("broker_bridge/", "device_client/")):
        return []
    return [
        f"{path} imports {module}" for module in imports(source) if top(module) in NEVER_ON_A_DEVICE
    ]


def safe(path: str, source: str) -> list[str]:
    """Nothing that arrives can become code."""
    found = [f"{path} imports {m}" for m in imports(source) if top(m) in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call() if called(node).removeprefix("builtins.") in {"eval", "exec"}:
                found.append(f"{path} calls {called(node)}")
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{path} allows pickle")
    return found


def pure(path: str, source: str) -> list[str]:
    """A core reads no clock, socket, disk, environment or random source."""
    if not is_in(path, PURE):
        return []
    found = [f"{path} imports {m}" for m in imports(source) if top(m) in IMPURE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [f"{path} calls {what}" for what in impure_call(node)]
        if names(node, "random_bytes") and path != "broker_bridge/wire/envelope.py":
            found.append(f"{path} draws randomness: have it passed in")
    return found


def impure_call(call: ast.Call) -> Iterator[str]:
    name = called(call)
    if name in IMPURE_CALLS or (name.startswith("np.") and name[3:] in NUMPY_FILES):
        yield name
    if name.startswith("np.random."):
        seeded = name.removeprefix("np.random.") in NUMPY_SEEDED
        if not seeded or not (call.args or call.keywords):
            yield name


def names(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Name(id=found) | ast.Attribute(attr=found) | ast.alias(name=found):
            return found == name
    return False


def durable(path: str, source: str) -> list[str]:
    """What must survive is written, synced and renamed in one place."""
    return [
        f"{path} calls {called(node)}: go through {DISK}"
        for node in ast.walk(ast.parse(source))
        if not is_in(path, (DISK, "server/tasks/"))  # a task is built again, not recovered
        and isinstance(node, ast.Call)
        and called(node) in DURABLE_CALLS
    ]


def documented(path: str, source: str) -> list[str]:
    """A file opens by saying what it promises."""
    return [] if ast.get_docstring(ast.parse(source)) else [f"{path} has no docstring"]


def listed(path: str, source: str) -> list[str]:
    """A public module of broker_bridge says in `__all__` what it offers, and offers it."""
    name = path.rsplit("/", 1)[-1]
    if not path.startswith("broker_bridge/") or name.startswith("_"):
        return []
    tree = ast.parse(source)
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                offered = set(ast.literal_eval(value))
                return [f"{path} offers no {n}" for n in sorted(offered - set(defined(tree)))]
    return [f"{path} has no __all__"]


def defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.alias():
                yield node.asname or node.name


def reached_from(path: str, sources: dict[str, str]) -> set[str]:
    """The project's own files that importing `path` brings in, itself included."""
    reached: set[str] = set()
    ahead = [path]
    while ahead:
        here = ahead.pop()
        if here not in reached:
            reached.add(here)
            ahead += [f for m in imports(sources[here]) for f in files_of(m) if f in sources]
    return reached


def files_of(module: str) -> tuple[str, ...]:
    """The files that `import module` may mean; the last part may be a name in a file."""
    whole, parent = module.replace(".", "/"), module.rpartition(".")[0].replace(".", "/")
    return f"{whole}.py", f"{whole}/__init__.py", f"{parent}.py", f"{parent}/__init__.py"


# ── The rules catch what is planted ─────────────────────────────────────────────────────

CORE = "server/coordinator.py"
PLANTED = [
    (rooms, "device_client/agent.py", "import server.store"),
    (rooms, "device_client/agent.py", "def f():\n    from server.cohort import draw"),
    (rooms, "device_client/agent.py", "import importlib\nimportlib.import_module('server.cli')"),
    (rooms, "server/service.py", "from device_client import participant"),
    (rooms, "broker_bridge/limits.py", "import server"),
    (rooms, "broker_bridge/wire/topics.py", "from device_client.agent import x"),
    (rooms, "server/store/database.py", "from . import files"),
    (rooms, "server/service.py", "from .store import database"),
    (homes, "device_client/agent.py", "import paho.mqtt.client as mqtt"),
    (homes, "server/service.py", "import nacl.signing"),
    (homes, "server/tasks/export.py", "from nacl.public import SealedBox"),
    (homes, "device_client/trainer.py", "from tflite_runtime.interpreter import Interpreter"),
    (homes, "device_client/trainer.py", "__import__('ai_edge_litert.interpreter')"),
    (homes, "server/service.py", "import tensorflow as tf"),
    (homes, "server/cohort.py", "import keras"),
    (homes, "server/cli.py", "from cryptography import x509"),
    (homes, "server/cli.py", "import sqlalchemy as sa"),
    (homes, "device_client/cli.py", "from rich.console import Console"),
    (homes, "server/cli.py", "import iotcore"),
    (light, "device_client/identity.py", "from cryptography import x509"),
    (light, "broker_bridge/link/local_broker.py", "def f():\n    import sqlalchemy"),
    (light, "broker_bridge/task/runtime.py", "from tensorflow import lite"),
    (safe, "server/store/files.py", "import pickle"),
    (safe, "server/store/files.py", "from marshal import loads"),
    (safe, "device_client/data.py", "np.load(path, allow_pickle=True)"),
    (safe, "device_client/data.py", "np.load(path, allow_pickle=trusted)"),
    (safe, "device_client/data.py", "eval(text)"),
    (safe, "examples/mine.py", "import builtins\nbuiltins.exec(text)"),
    (pure, CORE, "import time"),
    (pure, CORE, "from datetime import datetime"),
    (pure, CORE, "def f():\n    import secrets"),
    (pure, CORE, "from broker_bridge.wire.envelope import random_bytes"),
    (pure, CORE, "from broker_bridge.wire import envelope\nkey = envelope.random_bytes(32)"),
    (pure, CORE, "import numpy as np\nnp.random.shuffle(devices)"),
    (pure, CORE, "import numpy as np\nrng = np.random.default_rng()"),
    (pure, "server/cohort.py", "import random"),
    (pure, "server/aggregation/sums.py", "import numpy as np\nnp.save('sum.npy', total)"),
    (pure, "device_client/participant.py", "open('outbox')"),
    (pure, "broker_bridge/wire/chunks.py", "import os"),
    (pure, "broker_bridge/task/taskfile.py", "from pathlib import Path"),
    (durable, "server/store/spool.py", "import os\nos.fsync(fd)"),
    (durable, "device_client/journal.py", "import os\nos.replace(new, old)"),
    (documented, "server/cohort.py", "import math"),
    (listed, "broker_bridge/limits.py", "LIMITS = 1"),
    (listed, "broker_bridge/limits.py", "__all__ = ['LIMITS']"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_caught(rule: Rule, path: str, source: str) -> None:
    assert rule(path, source)


INNOCENT = [
    (rooms, "device_client/agent.py", "from broker_bridge.wire import topics"),
    (rooms, "server/service.py", "import server.cohort, broker_bridge.errors"),
    (homes, "broker_bridge/wire/envelope.py", "import nacl.bindings"),
    (homes, "server/tasks/wearables.py", "def f():\n    import tensorflow as tf"),
    (light, "server/store/database.py", "import sqlalchemy"),
    (safe, "device_client/data.py", "np.load(path, allow_pickle=False)"),
    (safe, "server/service.py", "model.eval()"),
    (pure, "server/service.py", "import time"),
    (pure, CORE, "import numpy as np\nrng = np.random.default_rng(seed)"),
    (pure, "broker_bridge/wire/envelope.py", "random_bytes = nacl.utils.random"),
    (durable, "broker_bridge/disk.py", "import os\nos.fsync(fd)"),
    (durable, "server/store/spool.py", "self._disk.fsync(fd)"),
    (listed, "broker_bridge/limits.py", "__all__ = ['LIMITS']\nLIMITS = 1"),
    (listed, "broker_bridge/wire/_private.py", "x = 1"),
]


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_innocent_code_passes(rule: Rule, path: str, source: str) -> None:
    assert rule(path, source) == []


def test_a_core_that_reaches_a_clock_through_another_file_is_caught() -> None:
    planted = {
        CORE: "from server.plans import Plan",
        "server/plans.py": "import server.clock",
        "server/clock.py": "import time",
    }
    assert reached_from(CORE, planted) == set(planted)


# ── The rules hold ──────────────────────────────────────────────────────────────────────


def files_in(*folders: str) -> dict[str, str]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_text()
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


OURS = files_in(*ROOMS)
EVERYTHING = files_in(*ROOMS, "tests", "examples", "benchmarks")


@pytest.mark.parametrize("rule", [rooms, homes, light, pure, durable, documented])
def test_every_file_of_the_three_rooms_keeps_the_rule(rule: Rule) -> None:
    assert [v for path, source in OURS.items() for v in rule(path, source)] == []


def test_nothing_in_the_project_lets_data_become_code() -> None:
    assert [v for path, source in EVERYTHING.items() for v in safe(path, source)] == []


def test_every_public_module_of_broker_bridge_lists_what_it_offers() -> None:
    assert [v for path, source in OURS.items() for v in listed(path, source)] == []


def test_every_home_and_core_that_a_rule_names_exists() -> None:
    named = {place for places in (*HOMES.values(), PURE) for place in places}
    assert [place for place in sorted(named) if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("core", [path for path in OURS if is_in(path, PURE)])
def test_a_core_reaches_no_clock_disk_or_network_through_another_file(core: str) -> None:
    impure = {
        f"{core} reaches {path}, which imports {module}"
        for path in reached_from(core, OURS)
        for module in imports(OURS[path])
        if top(module) in IMPURE_MODULES
    }
    assert impure == set()
