"""Programs that mean harm: each is scored wrong in time, and leaves no process and no file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from forks import await_that, exit_code, forked

from pissa_cli.evals import sandbox
from pissa_cli.evals.sandbox import Protection, Verdict, protection, run_program, run_programs

HARMLESS = [
    "x = 1",
    "import math, json, re, collections",
    "open('a', 'w').write('x')",
    "print('a' * 10**6)",
    "",
    "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))",
    "import code; code.InteractiveConsole",  # not the file beside the one that runs this
    "import multiprocessing as m\nwith m.Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]",
    "assert open('/proc/self/oom_score_adj').read() == '1000\\n'",
]
LIBC = "import ctypes; libc = ctypes.CDLL(None)\n"
KEYCTL = {"x86_64": 250}.get(os.uname().machine, 219)
HOSTILE = {
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "forks that sleep": "import os, time\nfor _ in range(8):\n    if os.fork() == 0: time.sleep(1000)\nassert False",
    "too many forks": "import os, time\nfor _ in range(16):\n    if os.fork() == 0: time.sleep(1000)",
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
        "    os._exit(0)\nos._exit(0)"
    ),
    "zombies": "import os, time\nfor _ in range(8):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(1000)",
    "threads": "import threading as t, time\nfor _ in range(10**5): t.Thread(target=time.sleep, args=(1000,)).start()",
    "ten gigabytes": "x = bytearray(10**10)",
    "a growing list": "x = []\nwhile True: x.append(bytearray(10**7))",
    "endless output": "while True: print('x' * 10**6)",
    "endless output to the verdict": "import os\nwhile True: os.write(3, b'x' * 10**5)",
    "a verdict of its own": "import os; os.write(3, b'passed'); os._exit(0)",
    "a large file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6); f.flush()",
    "more files than its folder has room for": "for i in range(65): open(f'x{i}', 'wb').write(bytes(2**20))",
    "many files": "i = 0\nwhile True:\n    i += 1\n    open(f'x{i}', 'wb').write(b'x' * 10**6)",
    "a deep tree": "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\nassert False",
    "a shut folder": "import os; os.makedirs('a/b'); os.chmod('a', 0); assert False",
    "open files": "x = [open('f', 'w') for _ in range(64)]",
    "files of its supervisor": "import os; os.fstat(4)",
    "the group of its supervisor": "import os; assert os.getpgrp() != os.getpid()",
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "an exception that is no error": "raise KeyboardInterrupt",
    "kill the parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); raise RuntimeError",
    "kill the group": "import os, signal; os.killpg(os.getpgid(os.getppid()), signal.SIGKILL); raise RuntimeError",
    "kill everything": "import os, signal; os.kill(-1, signal.SIGKILL); raise RuntimeError",
    "ignore signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "recursion": "def f(): f()\nf()",
    "recursion without a limit": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "close stdout": "import sys, os; sys.stdout.close(); os.close(1); os.close(2); os.close(3)",
    "ctypes, address 0": "import ctypes; ctypes.string_at(0)",
    "environment": "import os; assert 'PISSA_SECRET' in os.environ",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "a socket of this machine": "import os, socket; os.chdir(FOLDER); socket.socket(socket.AF_UNIX).connect('socket')",
    "a name server": "import socket; socket.getaddrinfo('example.org', 80)",
    "a symbolic link": "import os; os.symlink(MARK, 'link'); open('link', 'w').write('x')",
    "outside its folder": "open(MARK, 'w').write('x')",
    "remove a file": "import os; os.remove(KEEP)",
    "change the program": "open('/proc/1/mem', 'wb').write(b'x')",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
    "shared memory": f"{LIBC}assert libc.shmget(0, 1 << 20, 0o1600) >= 0",
    "semaphores": f"{LIBC}assert libc.semget(0, 32000, 0o1600) >= 0",
    "message queues": f"{LIBC}assert libc.msgget(0, 0o1600) >= 0",
    "memory of a namespace of its own": (
        f"{LIBC}import os\nuser, group = os.getuid(), os.getgid()\nassert libc.unshare(0x10020000) == 0\n"
        "libc.prctl(4, 1)\n"  # may write the following
        "for name, text in (('setgroups', 'deny'), ('uid_map', f'0 {user} 1'), ('gid_map', f'0 {group} 1')):\n"
        "    open(f'/proc/self/{name}', 'w').write(text)\n"
        "assert libc.mount(b'tmpfs', b'/run', b'tmpfs', 0, b'size=8g') == 0 or libc.syscall(430, b'tmpfs', 0) >= 0"
    ),
    "the user's keys": f"{LIBC}assert libc.syscall({KEYCTL}, 0, -3, 1) > 0",
    "io_uring": f"{LIBC}assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "sockets and terminals": (
        "import os; assert any(os.listdir(place) for place in ('/run', '/dev/pts', '/dev/shm') if os.path.isdir(place))"
    ),
    "namespaces of this machine": (
        "import os; assert any(os.readlink(f'/proc/self/ns/{kind}') == one for kind, one in OUTSIDE.items())"
    ),
    "other processes": "import os; assert any(int(name) > 99 for name in os.listdir('/proc') if name.isdigit())",
    "capabilities": (
        "has = [line.split()[1] for line in open('/proc/self/status') if line.startswith('CapPrm')]\n"
        "assert int(has[0], 16) & ~6"  # but to read, and to write, what root may
    ),
    "groups": "import os; assert os.getuid() >= 2 * 10**9 and (os.getgroups() or os.getgid() != 65534)",
    "rights of a program of root": "assert 'NoNewPrivs:\\t0' in open('/proc/self/status').read()",
    "a core file": "import resource; assert resource.getrlimit(resource.RLIMIT_CORE)[1]",
    "processor time": "import resource; assert resource.getrlimit(resource.RLIMIT_CPU)[1] != 2",
    "become root": "import os; os.setuid(0); os.setgroups([0]); open(MARK, 'w').write('x')",
    "more limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10**5, 10**5)); resource.setrlimit("
        "resource.RLIMIT_AS, (-1, -1)); x = bytearray(10**10)"
    ),
}
WHY = {
    "too many forks": "Resource temporarily unavailable",
    "threads": "can't start new thread",
    "ten gigabytes": "MemoryError",
    "a large file": "File too large",
    "more files than its folder has room for": "No space left",
    "open files": "Too many open files",
}
"""What a program is ended by, where its time would end it as well."""
NEEDS_NAMESPACES = {
    "more files than its folder has room for",
    "a socket of this machine",
    "outside its folder",
    "remove a file",
    "a symbolic link",
    "become root",
    "mount",
    "kill everything",
    "kill the parent",
    "kill the group",
    "shared memory",
    "semaphores",
    "message queues",
    "memory of a namespace of its own",
    "the user's keys",
    "io_uring",
    "sockets and terminals",
    "namespaces of this machine",
    "other processes",
}


def processes(folder: Path) -> list[str]:
    """Processes whose environment names a folder in `folder`: the sandbox's own and all that they started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "limits"])
def guard(request: pytest.FixtureRequest) -> Protection:
    if request.param and not protection().namespaces:
        pytest.skip("this kernel allows no namespaces")
    return Protection(request.param)


@pytest.mark.parametrize("program", HARMLESS)
def test_a_program_that_ends_passes(program: str, guard: Protection) -> None:
    assert run_program(program, guard).passed


@pytest.mark.parametrize("name", HOSTILE)
def test_harm_is_contained(name: str, guard: Protection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS_NAMESPACES and not guard.namespaces:
        pytest.skip("limits alone do not protect from this, and are said not to")
    monkeypatch.setenv("PISSA_SECRET", "x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keep, mark = tmp_path / "keep", tmp_path / "mark"
    keep.write_text("kept")
    tmp_path.chmod(0o777)
    listening = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)
    listening.bind("socket")  # by a short path
    listening.listen()
    (tmp_path / "socket").chmod(0o777)
    outside = {kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("ipc", "mnt", "net", "pid", "uts")}
    program = f"KEEP, MARK, FOLDER = {str(keep)!r}, {str(mark)!r}, {str(tmp_path)!r}\n"
    program += f"OUTSIDE = {outside}\n{HOSTILE[name]}\n"
    began = time.monotonic()
    verdict = run_program(program, guard, seconds=1.5)
    listening.close()
    assert not verdict.passed and verdict.detail and WHY.get(name, "") in verdict.detail, verdict
    assert time.monotonic() - began < 12
    deadline = time.monotonic() + 2
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes(tmp_path)
    assert keep.read_text() == "kept" and not mark.exists()
    assert [path.name for path in tmp_path.iterdir()] in (["keep", "socket"], ["socket", "keep"])


def test_the_best_protection_is_taken() -> None:
    possible = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "--mount-proc", "true"])
    assert protection().namespaces >= (possible.returncode == 0)


MOUNTS = """
import subprocess, sys
from pathlib import Path
from pissa_cli.evals.sandbox import Protection, run_program
(place,) = sys.argv[1:]
subprocess.run(["mount", "--make-rshared", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", place], check=True)
before = Path("/proc/self/mountinfo").read_text()
assert "Read-only" in run_program(f"open({place!r} + '/x', 'w')", Protection(True)).detail
assert Path("/proc/self/mountinfo").read_text() == before
"""


def test_the_mounts_of_this_machine_stay_as_they_are(tmp_path: Path) -> None:
    """Those below the root are read-only to a program, too; and what is mounted for one reaches no shared mount."""
    own = ["unshare", "--mount"]  # private, before they are shared among those of the test
    if subprocess.run([*own, "true"]).returncode:
        pytest.skip("this user can make no mounts")
    subprocess.run([*own, sys.executable, "-c", MOUNTS, str(tmp_path)], check=True)


def test_a_folder_where_others_are_hidden(guard: Protection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert run_program("open('a', 'w').write('x')", guard).passed


def test_nothing_goes_on_when_the_evaluation_is_killed(guard: Protection, tmp_path: Path) -> None:
    def work() -> None:
        tempfile.tempdir = str(tmp_path)
        run_program("import time; open('here', 'w'); time.sleep(1000)", guard, seconds=60)

    process = forked(work, tmp_path / "said")
    await_that(lambda: len(processes(tmp_path)) == 2 + guard.namespaces)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    await_that(lambda: not processes(tmp_path), 5)


def test_a_supervisor_that_stops_is_given_up(
    guard: Protection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(sandbox, "CHILD", child)
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_program("", guard, seconds=0.5) == Verdict(False, "stopped answering")
    assert not processes(tmp_path)


def test_a_signal_is_named(guard: Protection) -> None:
    for number, name in ((11, "Segmentation fault"), (40, "")):
        verdict = run_program(f"import os; os.kill(os.getpid(), {number})", guard)
        assert not verdict.passed and verdict.detail.startswith(f"ended by a signal: {name}")


def test_many_are_run_and_reported_in_order() -> None:
    seen: list[tuple[int, int]] = []
    programs = ["x = 1", "assert False, 'no'", "while True: pass", "import os; os._exit(0)", "x = 2"]
    verdicts = run_programs(programs, lambda done, total: seen.append((done, total)))
    assert [v.passed for v in verdicts] == [True, False, False, False, True]
    assert verdicts[1].detail == "raised AssertionError: no" and seen[-1] == (5, 5)
    assert "10 s" in protection().text()
