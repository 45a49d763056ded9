"""Runs one program that is not trusted. A script of the standard library alone, started by `sandbox.py`.

It reads a job (JSON) on stdin and writes a verdict (JSON) on stdout. Three processes: this one; the first of a new PID
namespace, at whose end the kernel kills everything in there; the program. Without namespaces the first two are one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 2, 4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 24, 36, 38
CAPABILITY_VERSION, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAPABILITIES = 0x20080522, 1, 2, 64
NOBODY = 65534
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, IO_URING_SETUP, FSOPEN = 22, 2, 425, 430
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 165, 29, 64, 68, 248, 249, 250)),
    "aarch64": (0xC00000B7, (198, 40, 194, 190, 186, 217, 218, 219)),
}
"""socket, mount, shmget, semget, msgget (memory beyond the limits), add_key, request_key, keyctl (keys of the user)."""
VERDICT_BYTES = 2**16
libc = ctypes.CDLL(None, use_errno=True)


def call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    job = json.load(sys.stdin)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not job["namespaces"]:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        report(supervise(job))
        return
    enter_namespaces()
    first = os.fork()
    if first == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            hide_the_machine(job["folder"])
            report(supervise(job))
        finally:
            os._exit(0)
    os.waitpid(first, 0)


def report(verdict: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()


def enter_namespaces() -> None:
    """New namespaces for processes, network, mounts, IPC and host name; a user namespace first, where not root."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        call(libc.unshare(flags))
        return
    call(libc.unshare(flags | CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def hide_the_machine(folder: str) -> None:
    """All is read-only but `folder` and the places of sockets and terminals, empty and in memory; a /proc of ours."""
    call(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size))
    for place in ("/run", "/dev/pts", "/dev/shm", folder):
        if place == folder:
            Path(place).mkdir(parents=True, exist_ok=True)  # where it was in one of the others
        if Path(place).is_dir():
            call(libc.mount(b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64m,mode=1777"))
    call(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None))


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Start the program, wait for it or for its time to be up, and leave nothing of it running."""
    reading, writing = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            run(job, writing)
        finally:
            os._exit(1)
    os.close(writing)
    deadline, heard, status = time.monotonic() + job["seconds"], b"", None
    while status is None and time.monotonic() < deadline:
        heard = (heard + listen(reading, 0.02))[-VERDICT_BYTES:]  # a program may write there for all its time
        ended, code = os.waitpid(program, os.WNOHANG)
        status = code if ended else None
    heard = (heard + listen(reading, 0))[-VERDICT_BYTES:]
    if status is None:
        os.kill(program, signal.SIGKILL)
    kill_the_rest()
    return verdict(job, heard, status)


def listen(reading: int, seconds: float) -> bytes:
    ready = select.select([reading], [], [], seconds)[0]
    return os.read(reading, VERDICT_BYTES) if ready else b""


def verdict(job: dict[str, Any], heard: bytes, status: int | None) -> dict[str, Any]:
    if status is None:
        return {"passed": False, "detail": f"not done after {job['seconds']} s"}
    said = heard.decode(errors="replace")
    if status == 0 and said == job["token"]:
        return {"passed": True, "detail": ""}
    if os.WIFSIGNALED(status):
        return {"passed": False, "detail": f"ended by a signal: {signal.strsignal(os.WTERMSIG(status))}"}
    return {"passed": False, "detail": said[:500] if said.startswith("raised ") else "ended before its tests were done"}


def kill_the_rest() -> None:
    """Every process that the program left: in a namespace all of them, else those that became ours."""
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    for _ in range(1000):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def descendants(root: int) -> list[int]:
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(place.name)] = int((place / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    found: set[int] = set()
    new = {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return list(found)


def run(job: dict[str, Any], writing: int) -> None:
    """In the program's own process: give up what it need not have, then be the program."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.chdir(job["folder"])
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out this goes first
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.dup2(writing, 3)
    os.closerange(4, 65536)
    try:
        restrict(job)
        sys.modules["__main__"] = module = types.ModuleType("__main__")  # where pickle looks for the program's classes
        exec(compile(job["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        os.write(3, f"raised {type(error).__name__}: {str(error)[:300]}".encode(errors="replace"))
        os._exit(1)
    os.write(3, job["token"].encode())
    os._exit(0)


def restrict(job: dict[str, Any]) -> None:
    """Limits, and what cannot be undone."""
    megabytes = 2**20
    for limit, value in (
        (resource.RLIMIT_CPU, int(job["seconds"]) + 1),
        (resource.RLIMIT_AS, job["megabytes"] * megabytes),
        (resource.RLIMIT_FSIZE, 16 * megabytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    drop_privileges(job["number"], job["namespaces"])
    resource.setrlimit(resource.RLIMIT_NPROC, (16, 16))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # changing the user has cleared it
    call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if job["namespaces"]:
        forbid_calls()


def forbid_calls() -> None:
    """No new sockets, by a seccomp filter: a socket of this machine's own programs is a file, and files are still seen.

    Nor anything else that reaches beyond the limits: see `FORBIDDEN`. Pairs of connected sockets, which lead nowhere
    else, are left.
    """
    if os.uname().machine not in FORBIDDEN:
        return
    machine, numbers = FORBIDDEN[os.uname().machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # of classic BPF
    denied, allowed, killed = (give, 0, 0, 0x00050000 | 1), (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000)
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), killed, (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), denied]
    for number in (*numbers, IO_URING_SETUP, FSOPEN):
        program += [(equal, 0, 1, number), denied]
    packed = b"".join(struct.pack("HBBI", *line) for line in [*program, allowed])
    lines = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP", len(program) + 1, ctypes.addressof(lines))
    call(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header, len(header)), 0, 0))


def drop_privileges(number: int, namespaces: bool) -> None:
    """Root becomes a user of no name, who may read what root may; of anyone else every capability goes.

    Without namespaces it may write what root may, too, where root can do no less.
    """
    root, kept, version = is_real_root(), 0, (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    if root:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        has = (ctypes.c_uint32 * 6)()
        call(libc.capget(version, has))
        kept = has[1] & 1 << CAP_DAC_READ_SEARCH or (0 if namespaces else has[1] & 1 << CAP_DAC_OVERRIDE)
    for capability in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(number, number, number)  # one for each program: the kernel counts processes by user
    call(libc.capset(version, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)))


def is_real_root() -> bool:
    """Whether user 0 here is user 0 of the machine: no user namespace has been entered."""
    return os.getuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


if __name__ == "__main__":
    main()
