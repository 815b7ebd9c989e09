"""Cards as Raspberry Pi OS makes them: folders and images with what midge looks at.

The layout is that of the real images (MBR, FAT32 with one sector a
cluster, at 8 MiB); the kernels are a few bytes, since nobody boots them.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from broker_bridge.errors import LocalError
from server.fleet.flash.targets import TARGETS, Target
from server.fleet.flash.wheelhouse import cache_folder, fetch

PLACEHOLDER = """#cloud-config

# This is the user-data configuration file for cloud-init.

# disable_piwiz: false
ssh_pwauth: false
#hostname: raspberrypi
"""
_FIRMWARE = {
    "config.txt": b"arm_64bit=1\nauto_initramfs=1\n",
    "cmdline.txt": b"console=serial0,115200 console=tty1 root=PARTUUID=4e639091-02 "
    b"rootfstype=ext4 fsck.repair=yes rootwait resize\n",
    "issue.txt": b"Raspberry Pi reference 2025-12-04\nGenerated using pi-gen\n",
    "kernel8.img": b"kernel",
    "kernel_2712.img": b"kernel",
    "initramfs8": b"initramfs",
    "initramfs_2712": b"initramfs",
    "overlays/README": b"overlays\n",
}
_SEEDS = {
    "user-data": PLACEHOLDER.encode(),
    "meta-data": b"dsmode: local\ninstance_id: rpios-image\n",
    "network-config": b"network:\n  version: 2\n  ethernets:\n    eth0:\n      dhcp4: true\n",
}
BOOKWORM = _FIRMWARE
TRIXIE = _FIRMWARE | _SEEDS
ARMHF = _FIRMWARE | {"kernel.img": b"kernel", "kernel7.img": b"kernel", "kernel7l.img": b"kernel"}
BULLSEYE = {n: d for n, d in _FIRMWARE.items() if not n.startswith("initramfs")}
UBUNTU = {n: d for n, d in TRIXIE.items() if not n.startswith("kernel")} | {"vmlinuz": b"kernel"}

ROOT = Path(__file__).parents[1]
START_SECTOR = 16_384
OFFSET = START_SECTOR * 512


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """A boot partition that is mounted."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_image(image: Path, files: dict[str, bytes], *, megabytes: int = 40) -> Path:
    """A card's image: partition table, boot partition, an empty second partition."""
    sectors = megabytes * 2048
    with image.open("wb") as file:
        file.truncate(OFFSET + (sectors + 2048) * 512)
    table = (
        f"label: dos\nlabel-id: 0x4e639091\nstart={START_SECTOR}, size={sectors}, type=c\n"
        f"start={START_SECTOR + sectors}, size=2048, type=83\n"
    )
    _tool("sfdisk", "--quiet", str(image), given=table)
    _tool("mkfs.vfat", "-F", "32", "-s", "1", "-n", "BOOTFS", "--offset", str(START_SECTOR),
          str(image), str(sectors // 2))  # fmt: skip
    source = make_folder(image.with_suffix(".files"), files)
    tops = [str(path) for path in sorted(source.iterdir())]
    _tool("mcopy", "-i", f"{image}@@{OFFSET}", "-s", *tops, "::/")
    shutil.rmtree(source)
    return image


def boot_partition(image: Path, out: Path) -> Path:
    """The boot partition of an image alone, for tools that know no partition tables."""
    with image.open("rb") as file:
        head = file.read(512)
        size = int.from_bytes(head[446 + 12 : 446 + 16], "little") * 512
        file.seek(OFFSET)
        out.write_bytes(file.read(size))
    return out


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def everything_in(image: Path, out: Path) -> dict[str, bytes]:
    """Every file on an image's boot partition."""
    out.mkdir()
    _tool("mcopy", "-i", f"{image}@@{OFFSET}", "-s", "-n", "::/", str(out))
    return tree_of(out)


def plainly() -> tuple[str, ...]:
    """What to put before a command that shall obey permissions, whoever runs these tests."""
    if os.getuid() != 0:
        return ()
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def leave_out(reason: str) -> NoReturn:
    """Skip a test, unless all of them must run, as in .ci/run."""
    if os.environ.get("MIDGE_NO_SKIP"):
        pytest.fail(f"this must not be skipped here: {reason}")
    pytest.skip(reason)


def _tool(name: str, *arguments: str, given: str | None = None) -> str:
    program = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if program is None:
        leave_out(f"{name} is not here: apt-get install mtools dosfstools fdisk")
    done = subprocess.run(
        [program, *arguments], input=given, capture_output=True,
        text=True, check=False, env=os.environ | {"MTOOLS_SKIP_CHECK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{name}: {done.stderr}"
    return done.stdout


def check_fat(partition: Path) -> str:
    """Run fsck.vfat, which changes nothing; fails unless the file system is clean."""
    return _tool("fsck.vfat", "-n", "-v", str(partition))


# ── Wheels ──────────────────────────────────────────────────────────────────────────────


def wheels_or_skip(*targets: Target) -> Path:
    """The user's cache of wheels, with those of `targets` in it: the same that devices get.

    Off line and without them there is nothing to test with, except where everything must run.
    """
    for target in targets:
        try:
            fetch(target, cache_folder())
        except LocalError as error:
            leave_out(str(error))
    return cache_folder()


def target_of_this_machine() -> Target:
    """What a bundle for this machine is made for."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for target in TARGETS:
        if (target.python, target.machine) == (version, platform.machine()):
            return target
    leave_out(f"there are no bundles for Python {version} on {platform.machine()}")
