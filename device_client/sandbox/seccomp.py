"""The system calls that training needs, as a filter for the kernel: seccomp-BPF, pure.

`program` returns the instructions; `confinement` hands them to Linux. Three answers:

    allowed    memory, threads, time, and talk over descriptors that are open already
    refused    the rest: EPERM, as libraries probe for files and go on without them
    the end    what no library does by mistake (a socket, another program, another process's
               memory, more rights): the kernel ends the process

Arguments are looked at where a call is safe in one form only: threads but no processes, no
executable and no shared memory, signals to itself alone, limits read and not set. The
numbers are those of Linux's `arch/x86/entry/syscalls/syscall_64.tbl` and, for aarch64, of
`include/uapi/asm-generic/unistd.h`; the structures are in seccomp(2) and linux/bpf_common.h.
"""

import struct
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "program"]

ALLOW = 0x7FFF_0000
KILL = 0x8000_0000  # SECCOMP_RET_KILL_PROCESS
ERRNO = 0x0005_0000
_EPERM, _ENOSYS = 1, 38

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data
_X32_BIT = 0x4000_0000

_CLONE_THREAD = 0x0001_0F00  # VM, FS, FILES, SIGHAND, THREAD: what pthread_create asks for
_CLONE_NEW_ANYTHING = 0x7E02_0080  # namespaces
_PROT_EXEC, _MAP_SHARED = 0x4, 0x1

Instruction = bytes


@dataclass(frozen=True)
class Architecture:
    """How one machine numbers the calls. `audit` is its AUDIT_ARCH in linux/audit.h."""

    audit: int
    numbers: dict[str, int]
    x32: bool = False


# Everything here is allowed, whatever its arguments.
_HARMLESS = (
    # Descriptors that are open already: the line to the agent and /dev/null.
    "read", "write", "readv", "writev", "pread64", "recvfrom", "lseek", "fstat", "close",
    "poll", "ppoll", "select", "pselect6",
    # Memory, as far as RLIMIT_DATA goes.
    "brk", "munmap", "mremap", "madvise",
    # Threads and their waiting.
    "futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "getcpu",
    "membarrier", "exit", "exit_group", "restart_syscall",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack",
    # Time and who we are.
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time",
    "getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "uname",
    "getrandom", "getrusage", "sysinfo", "getrlimit",
)  # fmt: skip

# Training never does this, nor does a library that looks around.
_DEADLY = (
    "socket", "socketpair", "connect", "bind", "listen", "accept", "accept4",
    "execve", "execveat", "fork", "vfork",
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd",
    "pidfd_send_signal", "kill", "tkill",
    "setuid", "setgid", "setresuid", "setresgid", "capset",
    "mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "bpf", "seccomp",
    "perf_event_open", "userfaultfd", "io_uring_setup", "memfd_create", "open_by_handle_at",
    "init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon",
    "add_key", "request_key", "keyctl",
)  # fmt: skip

ARCHITECTURES = {
    "x86_64": Architecture(
        audit=0xC000_003E,
        x32=True,
        numbers={
            "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9,
            "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "select": 23,
            "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39,
            "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "bind": 49,
            "listen": 50, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59,
            "exit": 60, "kill": 62, "uname": 63, "gettimeofday": 96, "getrlimit": 97,
            "getrusage": 98, "sysinfo": 99, "ptrace": 101, "getuid": 102, "getgid": 104,
            "setuid": 105, "setgid": 106, "geteuid": 107, "getegid": 108, "getppid": 110,
            "setresuid": 117, "setresgid": 119, "capset": 126, "sigaltstack": 131,
            "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166, "swapon": 167,
            "reboot": 169, "init_module": 175, "delete_module": 176, "gettid": 186,
            "tkill": 200, "time": 201, "futex": 202, "sched_getaffinity": 204,
            "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
            "clock_nanosleep": 230, "exit_group": 231, "tgkill": 234, "kexec_load": 246,
            "add_key": 248, "request_key": 249, "keyctl": 250, "newfstatat": 262,
            "pselect6": 270, "ppoll": 271, "unshare": 272, "set_robust_list": 273,
            "accept4": 288, "perf_event_open": 298, "prlimit64": 302, "open_by_handle_at": 304,
            "setns": 308, "getcpu": 309, "process_vm_readv": 310, "process_vm_writev": 311,
            "finit_module": 313, "seccomp": 317, "getrandom": 318, "memfd_create": 319,
            "bpf": 321, "execveat": 322, "userfaultfd": 323, "membarrier": 324, "rseq": 334,
            "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435,
            "pidfd_getfd": 438,
        },
    ),
    "aarch64": Architecture(
        audit=0xC000_00B7,
        numbers={
            "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "close": 57, "lseek": 62,
            "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72,
            "ppoll": 73, "newfstatat": 79, "fstat": 80, "capset": 91, "exit": 93,
            "exit_group": 94, "unshare": 97, "futex": 98, "set_robust_list": 99,
            "nanosleep": 101, "kexec_load": 104, "init_module": 105, "delete_module": 106,
            "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "ptrace": 117,
            "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "kill": 129,
            "tkill": 130, "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134,
            "rt_sigprocmask": 135, "rt_sigreturn": 139, "reboot": 142, "setgid": 144,
            "setuid": 146, "setresuid": 147, "setresgid": 149, "uname": 160, "getrlimit": 163,
            "getrusage": 165, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173,
            "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
            "sysinfo": 179, "socket": 198, "socketpair": 199, "bind": 200, "listen": 201,
            "accept": 202, "connect": 203, "sendto": 206, "recvfrom": 207, "brk": 214,
            "munmap": 215, "mremap": 216, "add_key": 217, "request_key": 218, "keyctl": 219,
            "clone": 220, "execve": 221, "mmap": 222, "swapon": 224, "mprotect": 226,
            "madvise": 233, "perf_event_open": 241, "accept4": 242, "prlimit64": 261,
            "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
            "process_vm_writev": 271, "finit_module": 273, "seccomp": 277, "getrandom": 278,
            "memfd_create": 279, "bpf": 280, "execveat": 281, "userfaultfd": 282,
            "membarrier": 283, "rseq": 293, "pidfd_send_signal": 424, "io_uring_setup": 425,
            "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
        },
    ),
}  # fmt: skip


def program(machine: str, *, pid: int, threads: bool) -> bytes:
    """Return the filter for `machine` (`x86_64`, `aarch64`) as an array of struct sock_filter.

    `pid`: the process that it is for. `threads`: whether it may start more of them.
    Raises KeyError for another machine.
    """
    found = ARCHITECTURES[machine]
    number = found.numbers
    made = [
        _load(_ARCHITECTURE_AT),
        _jump(_JUMP_EQUAL, found.audit, 1, 0),  # a 32-bit call has other numbers
        _return(KILL),
        _load(_NUMBER_AT),
    ]
    if found.x32:
        made += [_jump(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _return(KILL)]
    made += _when(number["futex"], [_return(ALLOW)])  # the most frequent of all
    for name in _HARMLESS:
        if name in number:
            made += _when(number[name], [_return(ALLOW)])
    for name, rule in _looked_at(pid, threads).items():
        made += _when(number[name], rule)
    for name in _DEADLY:
        if name in number:
            made += _when(number[name], [_return(KILL)])
    return b"".join([*made, _return(ERRNO | _EPERM)])


def _looked_at(pid: int, threads: bool) -> dict[str, list[Instruction]]:
    """Calls that are allowed in one form. A rule ends by returning, whatever it loaded."""
    return {
        # Without the flags of a thread it is fork(), and the end.
        "clone": _if_masked(
            0, _CLONE_THREAD | _CLONE_NEW_ANYTHING, _CLONE_THREAD,
            then=ALLOW if threads else ERRNO | _EPERM, otherwise=KILL,
        ),
        # Its flags are in memory, where a filter cannot look: glibc then uses clone.
        "clone3": [_return(ERRNO | _ENOSYS)],
        "mmap": _if_clear(2, _PROT_EXEC, then=_if_clear(3, _MAP_SHARED, then=[_return(ALLOW)])),
        "mprotect": _if_clear(2, _PROT_EXEC, then=[_return(ALLOW)]),
        "tgkill": _if_masked(0, 0xFFFF_FFFF, pid, otherwise=KILL),  # abort() says why it ended
        # fstat, as newer C libraries write it: an open descriptor, and no path to look up.
        "newfstatat": _if_masked(3, 0x1000, 0x1000, otherwise=ERRNO | _EPERM),
        "prlimit64": _if_null(2, then=[_return(ALLOW)]),
        "sendto": _if_null(4, then=[_return(ALLOW)]),
    }  # fmt: skip


# ── Instructions ────────────────────────────────────────────────────────────────────────


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> Instruction:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(offset: int) -> Instruction:
    return _instruction(_LOAD, offset)


def _jump(code: int, value: int, if_true: int, if_false: int) -> Instruction:
    """Skip `if_true` or `if_false` instructions."""
    return _instruction(code, value, if_true, if_false)


def _return(answer: int) -> Instruction:
    return _instruction(_RETURN, answer)


def _when(number: int, rule: list[Instruction]) -> list[Instruction]:
    return [_jump(_JUMP_EQUAL, number, 0, len(rule)), *rule]


def _low(argument: int) -> Instruction:
    """Load the lower half of an argument, on a little-endian machine."""
    return _load(_ARGUMENTS_AT + 8 * argument)


def _high(argument: int) -> Instruction:
    return _load(_ARGUMENTS_AT + 8 * argument + 4)


def _if_masked(
    argument: int, mask: int, wanted: int, *, then: int = ALLOW, otherwise: int
) -> list[Instruction]:
    return [
        _low(argument), _instruction(_AND, mask), _jump(_JUMP_EQUAL, wanted, 0, 1),
        _return(then), _return(otherwise),
    ]  # fmt: skip


def _if_clear(argument: int, bits: int, *, then: list[Instruction]) -> list[Instruction]:
    refused = [_return(ERRNO | _EPERM)]
    return [
        _low(argument), _instruction(_AND, bits), _jump(_JUMP_EQUAL, 0, 0, len(then)),
        *then, *refused,
    ]  # fmt: skip


def _if_null(argument: int, *, then: list[Instruction]) -> list[Instruction]:
    return [
        _low(argument), _jump(_JUMP_EQUAL, 0, 0, len(then) + 2),
        _high(argument), _jump(_JUMP_EQUAL, 0, 0, len(then)),
        *then, _return(ERRNO | _EPERM),
    ]  # fmt: skip
