"""The filter of system calls, run instruction by instruction on both machines.

The kernel's own verdict is in test_sandbox; this one also reads the filter for aarch64.
"""

import functools
import re
import struct
from pathlib import Path

import pytest

from device_client.sandbox.seccomp import ARCHITECTURES, program

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
PID = 4711
MACHINES = list(ARCHITECTURES)
THREAD = 0x003D0F00  # what pthread_create of glibc asks for


@functools.cache
def steps_of(machine, threads):
    code = program(machine, pid=PID, threads=threads)
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4096
    return list(struct.iter_unpack("=HBBI", code))


def verdict(machine, name, *arguments, audit=None, number=None, threads=False):
    """What the kernel does: an interpreter of the few BPF instructions that there are."""
    found = ARCHITECTURES[machine]
    number = found.numbers[name] if number is None else number
    data = struct.pack(
        "<IIQ6Q", number, audit or found.audit, 0, *(arguments + (0,) * 6)[:6]
    )  # struct seccomp_data
    steps = steps_of(machine, threads)
    accumulator = at = 0
    while True:
        operation, if_true, if_false, value = steps[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x06:
                return value
            case other:
                raise AssertionError(f"instruction {other:#x}")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("read", (), ALLOW),
        ("futex", (), ALLOW),
        ("recvfrom", (), ALLOW),
        ("sendto", (3, 1, 5, 0, 0, 0), ALLOW),
        ("sendto", (3, 1, 5, 0, 0x7F00_0000_0000, 16), EPERM),  # to an address
        ("socket", (), KILL),
        ("connect", (), KILL),
        ("execve", (), KILL),
        ("ptrace", (), KILL),
        ("process_vm_readv", (), KILL),
        ("io_uring_setup", (), KILL),
        ("memfd_create", (), KILL),
        ("clone", (17,), KILL),  # fork(): SIGCHLD, and nothing in common
        ("clone", (THREAD,), EPERM),
        ("clone3", (), ENOSYS),
        ("mmap", (0, 4096, 3, 0x22), ALLOW),
        ("mmap", (0, 4096, 7, 0x22), EPERM),  # written and run
        ("mmap", (0, 4096, 5, 0x2), EPERM),
        ("mmap", (0, 4096, 3, 0x21), EPERM),  # shared: no limit of memory counts it
        ("mprotect", (0, 4096, 1), ALLOW),
        ("mprotect", (0, 4096, 5), EPERM),
        ("tgkill", (PID, PID, 6), ALLOW),
        ("tgkill", (1, 1, 6), KILL),
        ("kill", (PID, 9), KILL),
        ("prlimit64", (0, 7, 0), ALLOW),
        ("prlimit64", (0, 7, 0x7FFF_0000_0000), EPERM),
        ("newfstatat", (3, 0, 0, 0x1000), ALLOW),
        ("newfstatat", (3, 0, 0, 0), EPERM),
    ],
)
def test_each_call_gets_its_answer(machine, name, arguments, expected):
    assert verdict(machine, name, *arguments) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_a_task_with_several_threads_may_start_threads_and_still_no_process(machine):
    assert verdict(machine, "clone", THREAD, threads=True) == ALLOW
    for flags in (17, 0x4111, THREAD | 0x1000_0000, THREAD | 0x80, THREAD & ~0x10000):
        assert verdict(machine, "clone", flags, threads=True) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_whatever_is_not_listed_is_refused(machine):
    listed = set(ARCHITECTURES[machine].numbers.values())
    for number in set(range(600)) - listed:
        assert verdict(machine, "", number=number) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_in_the_numbers_of_another_machine_is_the_end(machine):
    others = [each.audit for name, each in ARCHITECTURES.items() if name != machine]
    for audit in (*others, 0x4000_0003, 0x4000_0028):  # and i386, arm
        assert verdict(machine, "read", audit=audit) == KILL


def test_the_x32_numbers_are_the_end():
    for number in ARCHITECTURES["x86_64"].numbers.values():
        assert verdict("x86_64", "", number=0x4000_0000 | number) == KILL


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    header = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} is not here: install linux-libc-dev")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    found.setdefault("newfstatat", found.get("fstatat"))
    for name, number in ARCHITECTURES[machine].numbers.items():
        assert found[name] == str(number), name
