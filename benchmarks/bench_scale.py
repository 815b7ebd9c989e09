"""Scale: time, processor and memory of one server and per device, from 100 to 10,000 devices.

`midge simulate` with 100,000 parameters, mutual TLS and the ACL as shipped: every device
has its own keys, certificate, connection and folder, and runs the code of a device; only
training is replaced by noise. A tenth of the devices make a round. At the end the broker is
killed (SIGKILL) and started again, and the return of every device is timed.

10,000 devices take some minutes and 2 GB of memory: `--large` adds them.
"""

import json
import subprocess
import sys
from typing import Any

from benchmarks.fleet import DENSE100K
from benchmarks.machine import Spread, header, is_quick, megabytes, table

ROUNDS = 3
MEMORY_TARGET_BYTES = 300e6
STORM_TARGET_S = 60.0


def simulate(devices: int) -> dict[str, Any]:
    """Run it; return what it measured. Raises CalledProcessError."""
    command = [
        sys.executable, "-m", "server.cli", "simulate", "--devices", str(devices), "--rounds",
        str(ROUNDS), "--task", str(DENSE100K), "--drop", "0.05", "--slow", "0.05", "--slow-s", "5",
        "--seed", "7", "--processes", "2", "--deadline", "600", "--storm", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return dict(json.loads(done.stdout))


def row(found: dict[str, Any]) -> list[object]:
    """What the table says of one size of fleet."""
    devices, closed = found["devices"], [r for r in found["rounds"] if r["state"] == "closed"]
    rest, after = found["at_rest"], found["after_rounds"]
    accepted = sum(r["accepted"] for r in closed)
    server_cpu_s = after["server"]["cpu_s"] - rest["server"]["cpu_s"]
    return [
        f"{devices:,}", f"{found['connect_s']:.1f} s",
        f"{accepted}/{sum(r['joined'] for r in closed)}",
        Spread.of([r["round_s"] for r in closed]).text(digits=1) + " s",
        f"{server_cpu_s / max(1, accepted) * 1000:.1f} ms",
        megabytes(found["after_storm"]["server"]["rss_peak_bytes"]),
        f"{rest['broker']['rss_bytes'] / devices / 1000:.0f} kB",
        f"{rest['devices']['rss_bytes'] / devices / 1000:.0f} kB",
        f"{rest['devices']['cpu_s'] / devices * 1000:.1f} ms",
        f"{found['storm_s']:.1f} s",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    header("Scale: one server, simulated devices, 100,000 parameters, a tenth makes a round")
    sizes = [100] if is_quick() else [100, 1_000]
    sizes += [10_000] if "--large" in sys.argv[1:] else []
    table(
        ["devices", "connect all", "updates/joins", "round", "server CPU an update", "server peak",
         "broker each", "device each", "CPU to connect one", "back after a storm"],
        [row(simulate(devices)) for devices in sizes],
    )  # fmt: skip
    print(
        "  a device's share of memory holds the interpreter of its process: with few devices, much"
    )
    print("  a round waits for its jitter: 200 joins a second, 30 MB/s")
    print(f"  targets: server peak < {megabytes(MEMORY_TARGET_BYTES)}, CPU an update flat,")
    print(f"  all back after a storm in < {STORM_TARGET_S:.0f} s\n")


if __name__ == "__main__":
    main()
