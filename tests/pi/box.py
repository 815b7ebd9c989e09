"""A Debian machine of this one's processor: its own systemd as the first process, in namespaces.

Debian's packages, unpacked, are `/`; processes, mounts, names and control groups are its own, the
kernel and the network this machine's. So units run as they are: users, sandbox, watchdog,
limits. Needs root. Not shown: a boot from disk, a power cut (`make pi-boot` shows those).
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.fleets import GIVE_UP_S, Program, run, wait_until
from tests.pi.debian import fetch_root
from tests.pi.image import ESSENTIAL

__all__ = ["Box"]

PACKAGES = (*ESSENTIAL, "systemd-sysv", "procps", "python3", "python3-venv")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a container's manager would do: devices, /run, control groups of either kind.
BOOT = """
set -e
root=$1
mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 dev dev
for each in null zero full random urandom tty; do
    touch dev/$each
    mount --bind /dev/$each dev/$each
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs shm dev/shm
mount -t tmpfs -o mode=755 run run
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
    for each in cpu memory pids devices; do
        mkdir sys/fs/cgroup/$each
        mount -t cgroup -o $each cgroup sys/fs/cgroup/$each || rmdir sys/fs/cgroup/$each
    done
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd,xattr cgroup sys/fs/cgroup/systemd
fi
pivot_root . mnt
exec env -i container=other PATH=/usr/sbin:/usr/bin \\
    /usr/lib/systemd/systemd --unit=multi-user.target
"""
NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--cgroup")


class Box:
    """A machine that has started. Its files are in `root`."""

    def __init__(self, suite: str, architecture: str, folder: Path) -> None:
        self.root = folder / "root"
        shutil.copytree(fetch_root(suite, architecture, PACKAGES), self.root, symlinks=True)
        self._set_up(self.root / "etc")
        self._machine = Program(
            folder / "box.log", "unshare", *NAMESPACES, "--fork", "--kill-child", "sh", "-c",
            BOOT, "boot", str(self.root),
        )  # fmt: skip
        wait_until(self._has_started, "systemd has started", GIVE_UP_S)

    def _set_up(self, etc: Path) -> None:
        """What the packages' own scripts would have done."""
        for name in ("proc", "sys", "dev", "run", "tmp", "mnt", "root", "var/log/journal"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "usr/bin/awk").symlink_to("mawk")
        for name in ("passwd", "group"):
            shutil.copy(self.root / f"usr/share/base-passwd/{name}.master", etc / name)
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        shutil.copy(self.root / "usr/share/libc-bin/nsswitch.conf", etc / "nsswitch.conf")
        (etc / "hosts").write_text("127.0.0.1 localhost box\n")
        (etc / "hostname").write_text("box\n")
        (etc / "machine-id").write_text("")

    def _has_started(self) -> bool:
        assert self._machine.is_running, self._machine.log
        if not self._first_process():
            return False
        said = self.run("systemctl", "is-system-running").stdout.strip()
        return said in ("running", "degraded")

    def _first_process(self) -> str:
        here = Path(f"/proc/{self._machine.pid}/task/{self._machine.pid}/children")
        return here.read_text().strip()

    def run(self, *command: str, give_up_s: float = GIVE_UP_S) -> Any:
        """Run a command there, as root."""
        return run(
            "nsenter", f"--target={self._first_process()}", *NAMESPACES, "--root", "--wd",
            "env", "-i", PATH, "HOME=/root", *command, give_up_s=give_up_s,
        )  # fmt: skip

    def shown(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return str(self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip())

    def journal(self, unit: str) -> str:
        """All that a unit has said."""
        return str(self.run("journalctl", "-u", unit, "-o", "cat", "--no-pager").stdout)

    def stop(self) -> None:
        """Pull the plug, and wait until the mounts are gone with the processes."""
        self._machine.kill()
        subprocess.run(["sync"], check=False)
