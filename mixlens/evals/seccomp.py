"""Seccomp filter (classic BPF) of the system calls that a sandbox refuses."""

from __future__ import annotations

import platform
import struct

# Call numbers from asm/unistd_64.h for x86-64 and asm-generic/unistd.h for arm64.
# Refused: memory, queues and semaphores not accounted to any process (a page lent to a pipe keeps its huge page); keys;
# access to other processes; the clock; namespaces and mounts; large kernel interfaces that no answer needs.
_REFUSED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "clock_settime": (227, 112), "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), 435
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_SOCKET, _SOCKETPAIR, _AF_UNIX = (41, 198), (53, 199), 1
_SETSOCKOPT, _SNDBUF, _SNDBUFFORCE = (54, 208), 7, 32
_MMAP, _MAP_SHARED = (9, 222), 1  # MAP_SHARED_VALIDATE has the bit too
_NEW_USER_NAMESPACE = 0x10000000
_X32 = 0x40000000  # x86-64 calls with x32 numbering
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def seccomp_filter() -> bytes | None:
    """Return the filter for the processor of this machine in bubblewrap's format; None if its numbers are unknown."""
    if platform.machine() not in _ARCHITECTURES:
        return None
    which, architecture = _ARCHITECTURES[platform.machine()]
    refuse, missing = _statement(_RETURN, _ERROR | _EPERM), _statement(_RETURN, _ERROR | _ENOSYS)
    call = _statement(_LOAD, 0)
    program = [
        _statement(_LOAD, 4), _jump(_EQUAL, architecture, 1, 0), _statement(_RETURN, _KILL),
        call, _jump(_AT_LEAST, _X32, 0, 1), refuse,
    ]  # fmt: skip
    for numbers in _REFUSED.values():
        program += [_jump(_EQUAL, numbers[which], 0, 1), refuse]
    program += [_jump(_EQUAL, _CLONE3, 0, 1), missing]  # its flags are in memory; the C library then uses clone
    new_namespace = _jump(_ANY_BIT, _NEW_USER_NAMESPACE, 0, 1)
    program += [_jump(_EQUAL, _CLONE[which], 0, 3), _argument(0), new_namespace, refuse, call]
    # Shared mappings can hold unaccounted memory. Programs that fall back to reading files still work.
    program += [_jump(_EQUAL, _MMAP[which], 0, 3), _argument(3), _jump(_ANY_BIT, _MAP_SHARED, 0, 1), refuse, call]
    # Other families reach the hypervisor (vsock) or the kernel's crypto (alg), or hold memory in separate buffers.
    for sockets in (_SOCKET, _SOCKETPAIR):
        program += [_jump(_EQUAL, sockets[which], 0, 3), _argument(0), _jump(_EQUAL, _AF_UNIX, 1, 0), refuse, call]
    # Unread data in a socket is not accounted to any process, but is small with default buffer sizes.
    larger = [_jump(_EQUAL, _SNDBUF, 1, 0), _jump(_EQUAL, _SNDBUFFORCE, 0, 1), refuse]
    program += [_jump(_EQUAL, _SETSOCKOPT[which], 0, 5), _argument(2), *larger, call]
    return b"".join([*program, _statement(_RETURN, _ALLOW)])


def _argument(number: int) -> bytes:
    """Load the lower half of an argument of the call."""
    return _statement(_LOAD, 16 + 8 * number)


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
