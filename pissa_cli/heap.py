"""How the C library keeps freed memory, said before the program starts or never; what the collector passes over."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TUNABLES = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Kernels of oneDNN that are kept, each for one shape: 1,024 by itself. A micro-batch has some 40, the next others."""
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def restart_with_lean_heap() -> None:
    """Start this process anew, once, with glibc's caches of small freed blocks off and those of oneDNN's kernels small;
    only its environment can say so.

    Beside every freed tensor there is a scrap left by aligning it. The caches hand scraps to small objects, and then no
    tensor of the same size fits into the hole: training on a CPU takes up to half as much memory again, no faster.
    Not where there is a GPU, and not in a program that only imports this one.
    """
    given, own = os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:]
    if sys.platform != "linux" or "glibc.malloc." in given or any(Path(driver).exists() for driver in DRIVERS):
        return
    from_stdin = sys.argv[0] in ("", "-")  # which is read by now
    if "torch" in sys.modules or from_stdin or sys.orig_argv[-len(own) :] != own:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join([*([given] if given else []), *TUNABLES])
    for name, kept in KERNELS.items():
        os.environ.setdefault(name, kept)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def for_good() -> Iterator[None]:
    """What is imported inside stays: the garbage collector never looks it over, which takes a tenth of `--help` and of
    the start of every command."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        gc.enable()
