"""Fuzz every parser with atheris: `make fuzz MINUTES=16`. See tests/fuzz/targets.py.

    python -m tests.fuzz.run --minutes 16                 divided over all targets
    python -m tests.fuzz.run --minutes 5 --only weights   one target
    python -m tests.fuzz.run --replay tests/fuzz/corpus/weights/crash-…

Each target runs in a process of its own, whose memory is limited: what takes more is a
finding, like an exception that is not ours. Inputs that reached new code are kept in
corpus/TARGET/found (not in git), what failed in corpus/TARGET/crash-…: a crasher that was
fixed is committed there, and the default tests feed it again for ever.
"""

import argparse
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
INPUT_BYTES_MAX = 1 << 14
ADDRESS_SPACE_BYTES = 512 << 20  # more than the process has when it starts
GROWTH_BYTES_MAX = 64 << 20  # of resident memory, by one input
TRACED_EVERY = 64  # inputs of which one is watched closely; that is slow


def main() -> int:
    """Run what the command line asks for; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=16.0)
    parser.add_argument("--only", action="append", default=[], metavar="TARGET")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked, rest = parser.parse_known_args()
    if asked.child:
        return fuzz_here(asked.child, rest)
    if asked.replay:
        return replay(asked.replay)
    return fuzz_all(asked.minutes, asked.only)


# ── All targets ─────────────────────────────────────────────────────────────────────────


def fuzz_all(minutes: float, only: list[str]) -> int:
    """Divide the time, print a line for each target and a command for each finding."""
    from tests.fuzz.targets import TARGETS

    names = only or list(TARGETS)
    seconds = max(5, int(minutes * 60 / len(names)))
    print(f"{'target':16} {'executions':>11} {'per second':>11} {'inputs kept':>11}  findings")
    findings: list[Path] = []
    total = failed = 0
    for name in names:
        executions, took_s, new = fuzz_one(name, seconds)
        total += executions
        findings += new
        failed += not executions
        kept = len(list((CORPUS / name / "found").iterdir()))
        rate = executions / max(took_s, 1e-9)
        print(
            f"{name:16} {executions:11,} {rate:11,.0f} {kept:11}  {len(new) or 'none'}", flush=True
        )
    print(f"{total:,} executions, {len(findings)} findings")
    for path in findings:
        print(f"again: python -m tests.fuzz.run --replay {path.relative_to(ROOT)}")
    return 1 if findings or failed else 0


def fuzz_one(name: str, seconds: int) -> tuple[int, float, list[Path]]:
    """Run one target in a child; return executions, seconds, and new crashers."""
    from tests.fuzz.target import seeds_of
    from tests.fuzz.targets import TARGETS

    corpus = CORPUS / name
    (corpus / "found").mkdir(parents=True, exist_ok=True)
    before = set(corpus.glob("*-*"))
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as place:
        seeds = Path(place) / "seeds"
        seeds.mkdir()
        for number, seed in enumerate(seeds_of(TARGETS[name])):
            (seeds / str(number)).write_bytes(seed)
        log = Path(place) / "log"
        started = time.monotonic()
        with log.open("wb") as out:
            subprocess.run(
                [sys.executable, "-m", "tests.fuzz.run", "--child", name,
                 f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", "-timeout=30",
                 "-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={corpus}/",
                 str(corpus / "found"), str(seeds)],
                cwd=ROOT, stdout=out, stderr=out, check=False,
                env=os.environ | {"MIDGE_FUZZ_FOLDER": place},
            )  # fmt: skip
        took_s = time.monotonic() - started
        text = log.read_text(errors="replace")
    new = sorted(set(corpus.glob("*-*")) - before)
    found = re.search(r"stat::number_of_executed_units:\s+(\d+)", text)
    if new or found is None:
        print(f"── {name}\n" + "\n".join(text.splitlines()[-40:]))
    return int(found[1]) if found else 0, took_s, new


# ── One target, in this process ─────────────────────────────────────────────────────────


def fuzz_here(name: str, options: list[str]) -> int:
    """Hand this process to libFuzzer. Does not return."""
    import atheris

    logging.disable()  # what is dropped is logged, each time

    with atheris.instrument_imports(
        include=["broker_bridge", "device_client", "server", "paho", "tomllib"]
    ):
        from tests.fuzz.target import check, checked_for_memory
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.mutation import mutate

    target = TARGETS[name]
    for seed in target.seeds():  # whatever is made once is made before memory is counted
        check(target, seed)
    limit_memory()
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (checked_for_memory if count % TRACED_EVERY == 0 else check)(target, data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < GROWTH_BYTES_MAX, f"{len(data)} bytes took {grown} bytes of memory"

    def change(data: bytes, size_max: int, seed: int) -> bytes:
        if seed % 2:
            return mutate(data, seed)[:size_max]
        changed: bytes = atheris.Mutate(data, size_max)
        return changed

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
    atheris.Fuzz()
    return 0


def limit_memory() -> None:
    """Let this process have a little more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def replay(path: Path) -> int:
    """Feed one file of the corpus again; a fault shows its traceback."""
    from tests.fuzz.target import checked_for_memory
    from tests.fuzz.targets import TARGETS

    path = path.resolve()
    name = path.relative_to(CORPUS).parts[0]
    checked_for_memory(TARGETS[name], path.read_bytes())
    print(f"{name}: {path.name} is taken as it should be")
    return 0


if __name__ == "__main__":
    if "MIDGE_FUZZ_FOLDER" not in os.environ:
        os.environ["MIDGE_FUZZ_FOLDER"] = folder = tempfile.mkdtemp(prefix="midge-fuzz-")
        try:
            sys.exit(main())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(main())
