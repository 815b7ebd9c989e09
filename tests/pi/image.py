"""A card that boots: Debian's arm64 packages, laid out as Raspberry Pi OS lays out its card.

Debian's own kernel, systemd and Python in two partitions: bootfs (FAT) with the kernel, where
`midge flash` writes, and rootfs (ext4). The packages are unpacked and none of their
scripts is run; what those would have set up, so far as a boot needs it, is set up here. It is
not Raspberry Pi's image: other kernel, no firmware, no NetworkManager, and of their scripts a
stand-in. Needs no root where `unshare` can map one.
"""

import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cards import PLACEHOLDER, START_SECTOR, make_folder
from tests.pi.debian import CannotFetchError, fetch_root, made_once, run

__all__ = ["BOOKWORM", "TRIXIE", "Release", "card_image"]

# Essential packages are nobody's dependencies; the last is apt's, which every Debian has.
ESSENTIAL = (
    "base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils",
    "diffutils", "findutils", "grep", "gzip", "hostname", "init-system-helpers", "libc-bin",
    "login", "mount", "ncurses-base", "perl-base", "sed", "sysvinit-utils", "tar", "util-linux",
    "passwd", "mawk", "libstdc++6",
)  # fmt: skip
SYSTEM = (
    "systemd-sysv", "systemd-timesyncd", "udev", "dbus", "kmod", "iproute2", "procps",
    "e2fsprogs", "dosfstools", "python3", "python3-venv",
)  # fmt: skip
KERNEL = ("linux-image-cloud-arm64", "busybox-static")
MODULES = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "vfat", "nls_cp437",
    "nls_ascii", "nls_iso8859-1", "nls_utf8",
)  # fmt: skip
DISK_ID = "4e639091"  # as the command line of tests/cards.py names it
BOOT_MB, ROOT_MB = 256, 1400
FILES = Path(__file__).parent / "card"
_BEYOND = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/i18n")


@dataclass(frozen=True)
class Release:
    """Which Debian, and with what of its own."""

    suite: str
    python: str
    cloud_init: bool

    @property
    def packages(self) -> tuple[str, ...]:
        """What its card has."""
        own = ("cloud-init", "netplan.io") if self.cloud_init else ()
        return (*ESSENTIAL, *SYSTEM, *own)


BOOKWORM = Release("bookworm", "3.11", cloud_init=False)
TRIXIE = Release("trixie", "3.13", cloud_init=True)


def card_image(release: Release) -> Path:
    """Return the image, which is made once and kept in the cache. Raises CannotFetchError."""
    kernel = fetch_root(release.suite, "arm64", KERNEL)
    root = fetch_root(release.suite, "arm64", release.packages)
    recipe = (Path(__file__).read_text(), *(p.read_text() for p in sorted(FILES.iterdir())))
    with made_once(f"card-{release.suite}", str(root), *recipe) as (folder, work):
        if work is not None:
            (work / "made").mkdir()
            _make(release, root, kernel, work, work / "made" / "card.img")
    return folder / "card.img"


def _make(release: Release, source: Path, kernel: Path, work: Path, image: Path) -> None:
    root = work / "root"
    shutil.copytree(source, root, symlinks=True)
    for each in _BEYOND:
        shutil.rmtree(root / each, ignore_errors=True)
    _set_up(release, root)
    _compile(release, root)
    # The kernel lies where a Pi's firmware would look for it.
    (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
    files = {
        "config.txt": b"arm_64bit=1\nauto_initramfs=1\n",
        "cmdline.txt": f"console=serial0,115200 console=tty1 root=PARTUUID={DISK_ID}-02 "
        "rootfstype=ext4 fsck.repair=yes rootwait\n".encode(),
        "kernel8.img": vmlinuz.read_bytes(),
        "initramfs8": _initramfs(kernel),
        "kernel_2712.img": b"for another board\n",
    }
    if release.cloud_init:
        files |= {
            "user-data": PLACEHOLDER.encode(),
            "meta-data": b"dsmode: local\ninstance_id: rpios-image\n",
            "network-config": b"network:\n  version: 2\n",
        }
    _assemble(root, make_folder(work / "boot", files), image)


def _set_up(release: Release, root: Path) -> None:
    """Do what the packages' own scripts would have done."""
    _fill_places(root)
    _name_and_mount(root / "etc")
    # Raspberry Pi OS calls it eth0 too.
    network = root / "etc/systemd/network"
    network.mkdir(parents=True, exist_ok=True)
    (network / "99-default.link").symlink_to("/dev/null")
    if not release.cloud_init:
        (network / "10-eth0.network").write_text("[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n")
    _install(root, "imager_custom", "usr/lib/raspberrypi-sys-mods/imager_custom", 0o755)
    _install(root, "report-memory.sh", "usr/local/lib/report-memory.sh", 0o755)
    _install(root, "report-memory.service", "etc/systemd/system/report-memory.service", 0o644)
    _enable_units(release, root)


def _fill_places(root: Path) -> None:
    """Folders, users, links and certificates that other packages count on."""
    etc = root / "etc"
    for name in ("boot/firmware", "var/log/journal", "var/lib/dbus", "root", "mnt"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", etc / name)
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    (etc / "shadow").chmod(0o640)
    shutil.copy(root / "usr/share/libc-bin/nsswitch.conf", etc / "nsswitch.conf")
    for name, program in (("awk", "mawk"), ("nc", "nc.openbsd")):
        if (root / "usr/bin" / program).exists():
            (root / "usr/bin" / name).symlink_to(program)
    if (root / "usr/share/ca-certificates").is_dir():  # cloud-init does not start without
        known = sorted((root / "usr/share/ca-certificates/mozilla").glob("*.crt"))
        (etc / "ssl/certs").mkdir(parents=True, exist_ok=True)
        bundle = etc / "ssl/certs/ca-certificates.crt"
        bundle.write_bytes(b"".join(path.read_bytes() for path in known))
    for name, target in (("run", "/run"), ("lock", "/run/lock")):
        place = root / "var" / name
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
            place.symlink_to(target)


def _name_and_mount(etc: Path) -> None:
    """Who the machine is, and what is mounted where."""
    (etc / "hostname").write_text("raspberrypi\n")
    (etc / "hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\traspberrypi\n")
    # A busy machine emulates slowly: udev may take longer than the 90 s that systemd gives it.
    patient = "x-systemd.device-timeout=15min"
    (etc / "fstab").write_text(
        f"proc /proc proc defaults 0 0\nPARTUUID={DISK_ID}-01 /boot/firmware vfat {patient} 0 2\n"
        f"PARTUUID={DISK_ID}-02 / ext4 noatime,{patient} 0 1\n"
    )
    (etc / "machine-id").write_text("7a0d4f0c5b8e4a1f9d3c2b1a00112233\n")


def _enable_units(release: Release, root: Path) -> None:
    """What `systemctl enable` does, for what is to start."""
    units, library = root / "etc/systemd/system", "/usr/lib/systemd/system"
    wanted = {"multi-user": ["systemd-networkd.service"], "sysinit": ["systemd-timesyncd.service"]}
    if release.cloud_init:
        _install(root, "99-boot.cfg", "etc/cloud/cloud.cfg.d/99-boot.cfg", 0o644)
        drop_in = units / "cloud-init-local.service.d"
        drop_in.mkdir(parents=True)
        (drop_in / "boot.conf").write_text("[Unit]\nRequiresMountsFor=/boot/firmware\n")
        found = sorted(p.name for p in (root / "usr/lib/systemd/system").glob("cloud-*.service"))
        wanted["cloud-init"] = [n for n in found if "hotplug" not in n]
        wanted["multi-user"].append("cloud-init.target")
    for target, names in wanted.items():
        folder = units / f"{target}.target.wants"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).symlink_to(f"{library}/{name}")
    (units / "multi-user.target.wants/report-memory.service").symlink_to(
        "/etc/systemd/system/report-memory.service"
    )
    (units / "default.target").symlink_to(f"{library}/multi-user.target")


def _install(root: Path, name: str, place: str, mode: int) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(FILES / name, root / place)
    (root / place).chmod(mode)


def _compile(release: Release, root: Path) -> None:
    """Compile Python's library, as its packages do; left out without that Python here."""
    python = shutil.which(f"python{release.python}")
    if python is None:
        return
    for place in (f"usr/lib/python{release.python}", "usr/lib/python3/dist-packages"):
        if (root / place).is_dir():
            subprocess.run(
                [python, "-m", "compileall", "-q", "-s", str(root), "-p", "/", str(root / place)],
                check=False, capture_output=True,
            )  # fmt: skip


# ── The kernel's first file system ──────────────────────────────────────────────────────


def _initramfs(kernel: Path) -> bytes:
    """busybox, the modules that a virtual board needs, and a script that hands over to systemd."""
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "proc", "sys", "root", "m")]
    entries.append(("bin/busybox", 0o100755, (kernel / "usr/bin/busybox").read_bytes()))
    modules = {_plain(p.name.split(".ko")[0]): p for p in kernel.glob("lib/modules/*/**/*.ko*")}
    order = list(dict.fromkeys(n for m in MODULES for n in _with_needs(_plain(m), modules)))
    entries += [(f"m/{name}.ko", 0o100644, _unpacked(modules[name])) for name in order]
    entries.append(("m/order", 0o100644, " ".join(order).encode() + b"\n"))
    entries.append(("init", 0o100755, (FILES / "init").read_bytes()))
    return b"".join(_cpio(*entry) for entry in [*entries, ("TRAILER!!!", 0, b"")])


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _with_needs(name: str, modules: dict[str, Path]) -> Iterator[str]:
    """A module after all that it needs; nothing for one that is built into the kernel."""
    if name not in modules:
        return
    (needs,) = re.findall(rb"\0depends=([^\0]*)\0", _unpacked(modules[name]))[:1] or [b""]
    for each in needs.decode().split(","):
        yield from _with_needs(_plain(each), modules)
    yield name


def _unpacked(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    return module.read_bytes()


def _cpio(name: str, mode: int, data: bytes) -> bytes:
    """One entry of a "newc" archive: Documentation/driver-api/early-userspace in Linux."""
    raw = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


# ── The card ────────────────────────────────────────────────────────────────────────────


def _assemble(root: Path, boot: Path, image: Path) -> None:
    boot_sectors, root_sectors = BOOT_MB * 2048, ROOT_MB * 2048
    start = START_SECTOR + boot_sectors
    with image.open("wb") as file:
        file.truncate((start + root_sectors) * 512)
    table = (
        f"label: dos\nlabel-id: 0x{DISK_ID}\nstart={START_SECTOR}, size={boot_sectors}, type=c\n"
        f"start={start}, size={root_sectors}, type=83\n"
    )
    _given(table, "sfdisk", "--quiet", str(image))
    run("mkfs.vfat", "-F", "32", "-s", "1", "-n", "bootfs", "--offset", str(START_SECTOR),
        str(image), str(boot_sectors // 2))  # fmt: skip
    tops = [str(path) for path in sorted(boot.iterdir())]
    run("mcopy", "-i", f"{image}@@{START_SECTOR * 512}", "-s", *tops, "::/", MTOOLS_SKIP_CHECK="1")
    as_root = () if os.getuid() == 0 else ("unshare", "--map-root-user")
    run(*as_root, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "rootfs", "-O", "^huge_file", "-d",
        str(root), "-E", f"offset={start * 512}", str(image), f"{ROOT_MB}M")  # fmt: skip


def _given(text: str, *command: str) -> None:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CannotFetchError(f"there is no {command[0]} here") from None
    if done.returncode != 0:
        raise CannotFetchError(f"{command[0]} failed: {done.stderr.strip()}")
