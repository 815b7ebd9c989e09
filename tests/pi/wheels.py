"""What a device carries, as wheels for another processor or Python, unpacked into a folder.

pip picks them, as a device's pip would; they are only taken apart, never installed or run.
"""

import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pi.debian import made_once, run

__all__ = ["device_requirements", "fetch_site"]

ROOT = Path(__file__).parents[2]
# pip takes no "and older" here: each tag that a wheel may have must be named.
GLIBC = range(17, 37)  # Debian 12 has 2.36


def device_requirements(python: str) -> list[str]:
    """Return what `midge[device]` needs under Python `python`, with the versions we tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["device"]]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    wanted = {_name(each) for each in map(Requirement, named) if _holds(each, where)}
    lines = [Requirement(line) for line in pinned if line and not line.startswith("#")]
    return sorted(
        f"{_name(each)}{each.specifier}"
        for each in lines
        if _name(each) in wanted and _holds(each, where)
    )


def fetch_site(python: str, machine: str, *instead: str) -> Path:
    """Return a folder of packages for Python `python` on `machine`, as `aarch64`.

    `instead` are requirements that replace those of the same name. Raises CannotFetchError.
    """
    names = {_name(Requirement(each)) for each in instead}
    kept = [r for r in device_requirements(python) if _name(Requirement(r)) not in names]
    wanted = sorted([*kept, *instead])
    with made_once(f"site-{python}-{machine}", "1", *wanted) as (folder, work):
        if work is not None:
            _download(work / "wheels", python, machine, wanted)
            for each in sorted((work / "wheels").glob("*.whl")):
                with zipfile.ZipFile(each) as archive:
                    archive.extractall(work / "made")
    return folder


def _download(wheels: Path, python: str, machine: str, wanted: list[str]) -> None:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    abi = f"cp{python.replace('.', '')}"
    run(
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:",
        "--disable-pip-version-check", "--dest", str(wheels), "--python-version", python,
        "--implementation", "cp", *(f"--abi={each}" for each in (abi, "abi3", "none")),
        *(f"--platform={each}" for each in (f"manylinux2014_{machine}", *tags)), *wanted,
    )  # fmt: skip


def _name(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def _holds(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)
