"""Run a program as one of our systemd units would, where no systemd is there to do it.

    python -m tests.shut_in device_client/midge-device.service PROGRAM ARGUMENT …

What the unit says about system calls, namespaces, realtime, writable code and privileges is
read from the unit and put on this process by the kernel's own means (seccomp, prctl), as
systemd does; then the program takes its place. Files, users and devices stay as they are.
"""

import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# linux/prctl.h and linux/sched.h
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
NAMESPACES = 0x7E020080
# seccomp.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
MASKED_EQUAL = 7


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def lines_of(unit: Path, name: str) -> list[str]:
    return re.findall(rf"(?m)^{name}=(.*)$", unit.read_text())


def calls_in(group: str) -> Iterator[str]:
    """The system calls in a group such as @system-service, groups in it included."""
    if not group.startswith("@"):
        yield group
        return
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines()[1:]:
        if name := line.partition("#")[0].strip():
            yield from calls_in(name)


def allowed_calls(unit: Path) -> set[str]:
    """SystemCallFilter= as systemd.exec(5) says: a first list allows, "~" takes away again."""
    allowed = set(calls_in("@default"))
    for line in lines_of(unit, "SystemCallFilter"):
        names = {c for group in line.removeprefix("~").split() for c in calls_in(group)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def shut_in(unit: Path) -> None:
    """Put the unit's restrictions on this process, for good."""
    libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    seccomp.seccomp_init.restype = ctypes.c_void_p
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if lines_of(unit, "MemoryDenyWriteExecute") == ["yes"] and libc.prctl(
        PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "PR_SET_MDWE: Linux 6.3 or newer")
    filter_ = ctypes.c_void_p(seccomp.seccomp_init(ERRNO | errno.EPERM))
    for name in sorted(allowed_calls(unit)):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else: of another architecture
            add_rule(seccomp, filter_, number, *answer(unit, name))
    if seccomp.seccomp_load(filter_):
        raise OSError("seccomp_load")


def answer(unit: Path, call: str) -> tuple[int, Comparison | None]:
    """What the kernel does about an allowed call, and where only if its arguments compare so."""
    if lines_of(unit, "RestrictNamespaces") == ["yes"]:
        if call in ("clone", "unshare"):
            return ALLOW, Comparison(0, MASKED_EQUAL, NAMESPACES, 0)
        if call == "setns":
            return ERRNO | errno.EACCES, None
        if call == "clone3":  # its flags are in memory, where no filter can look: the C library
            return ERRNO | errno.ENOSYS, None  # takes clone instead
    if lines_of(unit, "RestrictRealtime") == ["yes"] and call == "sched_setscheduler":
        return ALLOW, Comparison(1, MASKED_EQUAL, 0xF, 0)  # SCHED_OTHER
    return ALLOW, None


def add_rule(
    seccomp: ctypes.CDLL,
    filter_: ctypes.c_void_p,
    number: int,
    action: int,
    where: Comparison | None,
) -> None:
    arguments = None if where is None else ctypes.byref(where)
    failed = seccomp.seccomp_rule_add_array(
        filter_, ctypes.c_uint32(action), number, ctypes.c_uint(where is not None), arguments
    )
    if failed:
        raise OSError(-failed, f"no rule for system call {number}")


if __name__ == "__main__":
    shut_in(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - that is what it is for
