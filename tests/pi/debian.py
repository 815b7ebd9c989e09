"""Another Debian in a folder: its Python and what that needs, for another processor too.

apt's own resolver picks the packages and checks their signatures, in a state of its own, so
that nothing of this machine's apt is touched; `dpkg-deb` takes them apart, and none of their
scripts is run. Needs no root. The mirror is the one that this machine's apt uses.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["CannotFetchError", "fetch_root", "made_once", "may_not_skip", "run"]

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LINKS = ("bin", "sbin", "lib", "lib64")  # what Debian has merged into /usr


class CannotFetchError(Exception):
    """This machine cannot get it; the sentence says why."""


def run(*command: str, **environment: str) -> str:
    """Run a command and return what it printed. Raises CannotFetchError with its last line."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | environment
        )
    except FileNotFoundError:
        raise CannotFetchError(f"there is no {command[0]} here") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CannotFetchError(f"{command[0]} failed: {lines[-1] if lines else done.returncode}")
    return done.stdout


@contextlib.contextmanager
def made_once(kind: str, *recipe: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield (the cache's folder for what this recipe makes, a folder to make it in).

    Whoever comes second waits. The second is None if it is there already; otherwise what the caller
    leaves in it as `made` is kept.
    """
    home = Path(os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge") / "pi"
    home.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:10]
    folder = home / f"{kind}-{digest}"
    with (home / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            yield folder, None
            return
        with tempfile.TemporaryDirectory(dir=home) as work:
            yield folder, Path(work)
            (Path(work) / "made").rename(folder)


def may_not_skip() -> bool:
    """Whether a test that lacks something must fail: where changes are judged."""
    return bool(os.environ.get("CI") or os.environ.get("MIDGE_NO_SKIP"))


def fetch_root(suite: str, architecture: str, packages: Sequence[str]) -> Path:
    """Return a folder with `packages` of Debian `suite`, and all that they depend on.

    It is made once and kept in the cache. Raises CannotFetchError.
    """
    with made_once(f"{suite}-{architecture}", "1", *sorted(packages)) as (folder, work):
        if work is not None:
            _download(work, _mirror(), suite, architecture, packages)
            root = work / "made"
            _make_links(root)
            for each in sorted((work / "cache" / "archives").glob("*.deb")):
                _unpack(each, root)
    return folder


def _mirror() -> str:
    """Where this machine gets Debian from: the first of apt's own sources that is Debian itself."""
    listed = run("apt-get", "update", "--print-uris")  # asks nobody
    found = re.findall(r"^'(\S+/debian)/dists/[^/\s]+/InRelease'", listed, re.MULTILINE)
    if not found or not KEYRING.exists():
        raise CannotFetchError("this machine's apt has no mirror of Debian, or not Debian's keys")
    return str(found[0])


def _download(
    work: Path, mirror: str, suite: str, architecture: str, packages: Sequence[str]
) -> None:
    for each in ("state/lists/partial", "cache/archives/partial"):
        (work / each).mkdir(parents=True)
    (work / "status").touch()  # nothing is installed: all that is needed is fetched
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    settings = work / "apt.conf"
    settings.write_text(
        f"""
        Dir::State "{work}/state";
        Dir::State::status "{work}/status";
        Dir::Cache "{work}/cache";
        Dir::Etc::SourceList "{work}/sources.list";
        Dir::Etc::SourceParts "/dev/null";
        APT::Architecture "{architecture}";
        APT::Architectures {{ "{architecture}"; }};
        APT::Sandbox::User "{"root" if os.getuid() == 0 else ""}";
        Acquire::Languages "none";
        Acquire::Retries "3";
        """
    )
    get = ("apt-get", "-qq", "--no-install-recommends")
    run(*get, "update", APT_CONFIG=str(settings))
    run(*get, "--yes", "--download-only", "install", *packages, APT_CONFIG=str(settings))


def _make_links(root: Path) -> None:
    for each in LINKS:
        (root / "usr" / each).mkdir(parents=True)
        (root / each).symlink_to(f"usr/{each}")


def _unpack(package: Path, root: Path) -> None:
    # Not `dpkg-deb -x`: an older package has /lib as a folder, and that would replace our link.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as deb:
        done = subprocess.run(
            ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)],
            stdin=deb.stdout, check=False,
        )  # fmt: skip
    if done.returncode or deb.returncode:
        raise CannotFetchError(f"{package.name} cannot be taken apart")
