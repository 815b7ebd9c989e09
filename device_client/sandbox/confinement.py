"""Lock this process in, for good: what it needed from the machine it has by now.

Promises, on Linux with seccomp: no new descriptor, socket, file, program or process, no
more rights, no more memory than allowed, nothing written to a file, no core dump, an empty
environment, and an end when the agent ends. Where the kernel lacks something the rest is
done all the same, and `Confinement` says what is missing. What the process holds in memory,
the samples above all, stays readable to whatever runs in it.
"""

import ctypes
import os
import platform
import re
import signal
import sys
from collections.abc import Collection
from pathlib import Path

import msgspec

from broker_bridge.machine import peak_in
from device_client.sandbox import seccomp

__all__ = ["Confinement", "begin", "lock", "peak_bytes", "reserved_bytes"]

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}


class Confinement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds this process. `missing`: a sentence; empty when nothing is."""

    memory_bytes: int  # 0: no limit
    missing: str = ""


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


_status: int | None = None  # /proc/self/status, open since before the door was locked


def begin(*, parent: int, memory_bytes: int) -> int:
    """Do at the start of the process what holds its whole life; return the limit of memory.

    `parent` is the process to die with. `memory_bytes` bounds what is private and written
    to, samples included; 0: half of the machine's memory.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)  # it ended before we asked to end with it
        _write("/proc/self/oom_score_adj", "1000")  # if the machine runs out, this one goes
    memory_bytes = memory_bytes or _half_of_the_machine()
    # Before: what libraries only reserved takes nothing from anybody.
    return memory_bytes if _limit("RLIMIT_DATA", memory_bytes + reserved_bytes()) else 0


def reserved_bytes() -> int:
    """Memory of this process that is private, writable, and was never written to.

    RLIMIT_DATA counts it all the same. On aarch64 NumPy 2's OpenBLAS reserves 240 MB, more than
    half of a board with 512 MB, and writes to hardly any of it. 0 where it is not known.
    """
    try:
        status = Path("/proc/self/status").read_text(errors="replace")
    except OSError:
        return 0
    found = re.findall(r"^(VmData|RssAnon):\s+(\d+) kB$", status, re.MULTILINE)
    kilobytes = {name: int(value) for name, value in found}
    if kilobytes.keys() != {"VmData", "RssAnon"}:
        return 0
    return max(0, kilobytes["VmData"] - kilobytes["RssAnon"]) * 1024


def lock(*, keep: Collection[int], threads: bool, memory_bytes: int) -> Confinement:
    """Give up everything but the descriptors `keep`, memory and, if `threads`, more threads."""
    _forget_environment()
    _close_all_but(keep)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)
    _keep_an_eye_on_memory()
    _limit("RLIMIT_NOFILE", 1)  # poll() takes no more descriptors than this
    if not threads:
        _limit("RLIMIT_NPROC", 0)
    if sys.platform != "linux":
        return Confinement(memory_bytes, f"{sys.platform} has no seccomp")
    _prctl(_PR_SET_DUMPABLE, 0)  # nobody else of this user may look into it either
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
        return Confinement(memory_bytes, "the kernel refuses PR_SET_NO_NEW_PRIVS")
    return Confinement(memory_bytes, _filter_calls(threads))


def _filter_calls(threads: bool) -> str:
    """Have the kernel refuse what training does not need; return why it does not, or nothing."""
    machine = platform.machine()
    if machine not in seccomp.ARCHITECTURES or sys.maxsize < 2**32:
        return f"no filter of system calls was written for {machine}"
    code = seccomp.program(machine, pid=os.getpid(), threads=threads)
    given = _Filter(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    # TSYNC: threads that the data source left running are held by it too.
    done = libc.syscall(
        ctypes.c_long(_SECCOMP_CALL[machine]),
        ctypes.c_uint(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_uint(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(given),
    )
    if done == 0:
        return ""
    return f"the kernel takes no seccomp filter ({os.strerror(ctypes.get_errno())})"


def _prctl(option: int, value: int) -> int:
    arguments = (ctypes.c_ulong(value), *(ctypes.c_ulong(0) for _ in range(3)))
    return int(ctypes.CDLL(None, use_errno=True).prctl(ctypes.c_int(option), *arguments))


def _limit(name: str, value: int) -> bool:
    """Set a limit that cannot be raised again. Say whether it could be set."""
    try:
        import resource

        which = getattr(resource, name)
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, value))
    except (ImportError, AttributeError, ValueError, OSError):
        return False
    return True


def _half_of_the_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _forget_environment() -> None:
    """Remove every variable, and the copy that the kernel laid at the top of the stack."""
    os.environ.clear()
    try:
        # proc(5): fields 50 and 51 of stat. The name in field 2 may hold anything but ")".
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[47]), int(fields[48])
    except (OSError, ValueError, IndexError):
        return
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)


def _close_all_but(keep: Collection[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    # The kernel's account of what is open, not a guess from the limit.
    try:
        opened = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        opened = list(range(3, 1024))
    for descriptor in opened:
        if descriptor > 2 and descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError:
                continue  # listdir's own


def _keep_an_eye_on_memory() -> None:
    global _status
    try:
        _status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        _status = None


def peak_bytes() -> int:
    """The most memory that this locked process ever held; 0 where that is not known."""
    if _status is None:
        return 0
    try:
        return peak_in(os.pread(_status, 8192, 0))
    except OSError:
        return 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError:
        return  # a container may refuse it
