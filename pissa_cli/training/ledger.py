"""Memory counted as it is taken: the storages of tensors, and glibc's heap under them."""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pissa_cli.process import KEPT_BYTES, keep_freed_memory

ALIGNMENT = 64  # of torch's tensors on a CPU


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class Heap:
    """What glibc's heap grows to over the blocks of tensors: they are taken and given back, and never touched.

    A freed block serves a later one of the same size only if nothing small has settled beside it; so the heap comes to
    hold far more than what is alive. `works` is False without glibc 2.33, and where there is no room.
    """

    def __init__(self) -> None:
        keep_freed_memory()
        self._libc = ctypes.CDLL(None)
        self.works = hasattr(self._libc, "mallinfo2") and hasattr(self._libc, "posix_memalign")
        self._blocks: dict[int, ctypes.c_void_p] = {}
        if self.works:
            self._libc.mallinfo2.restype = _Mallinfo
            self._libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
            self._libc.free.argtypes = [ctypes.c_void_p]
            self._begin = self._most = self._size()

    def take(self, key: int, num_bytes: int) -> None:
        block = ctypes.c_void_p()
        self.works = self.works and self._libc.posix_memalign(ctypes.byref(block), ALIGNMENT, num_bytes) == 0
        if self.works:
            self._blocks[key] = block
            if len(self._blocks) % 16 == 0 or num_bytes > KEPT_BYTES:  # which is gone when it is freed
                self._most = max(self._most, self._size())

    def give_back(self, key: int) -> None:
        if key in self._blocks:
            self._libc.free(self._blocks.pop(key))

    def growth(self) -> int:
        """Bytes by which the heap was larger than at first, at most; 0 where it cannot be known."""
        return max(self._most, self._size()) - self._begin if self.works else 0

    def _size(self) -> int:
        info = self._libc.mallinfo2()
        return int(info.arena + info.hblkhd)


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until it is freed, under the `kind` of the moment.

    now: bytes by kind; peak: the same at the moment when they were most. heap: where it asks for as much.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.kind = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._heap = heap
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, list | tuple) else (output,):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.kind)
        return output

    def name(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor under this kind, whatever it was counted under before."""
        key = self._count(tensor, kind)
        ref, before, size = self._storages[key]
        self._storages[key] = (ref, kind, size)
        self.now[before] -= size
        self.now[kind] += size

    def _count(self, tensor: Tensor, kind: str) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), kind, size)
            self.now[kind] += size
            if self.now.total() > self.peak.total():
                self.peak = self.now.copy()
            if self._heap is not None:
                self._heap.take(key, size)
        return key

    def _forget(self, key: int) -> None:
        _, kind, size = self._storages.pop(key)
        self.now[kind] -= size
        if self._heap is not None:
            self._heap.give_back(key)


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
