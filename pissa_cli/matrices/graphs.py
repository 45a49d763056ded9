"""Many operations of a GPU launched as one: CUDA graphs of functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from queue import LifoQueue
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2  # graphs that run side by side: what one does on a few multiprocessors leaves the others free
MOST = 16  # graphs that each of them keeps: with a rank for every layer there would be hundreds, used once
Function = Callable[..., tuple[Tensor, ...]]
_here = threading.local()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class _Slot:
    """A stream, and the graphs that were captured on it. As they run one after the other, they share their memory, and
    one copy of all inputs of a shape. Nothing else may run on the stream: graphs write into the workspaces that the
    libraries hold for it."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.captured: dict[Hashable, _Captured] = {}
        self.inputs: dict[Hashable, Tensor] = {}


class Graphs:
    """For threads that work on tensors of the same few shapes on the current GPU, at most `workers` of them."""

    def __init__(self, workers: int) -> None:
        self._free: LifoQueue[_Slot] = LifoQueue()
        self._capturing, self._met, self._device = threading.Lock(), set[Hashable](), torch.cuda.current_device()
        for _ in range(min(AT_ONCE, workers)):
            self._free.put(_Slot())
        self._works = True

    def use(self) -> None:
        """Have `as_graph` launch by these graphs in this thread, from here on, and the thread work on their GPU."""
        torch.cuda.set_device(self._device)
        _here.graphs = self

    def run(self, function: Function, inputs: tuple[Tensor, ...], options: tuple[Hashable, ...]) -> list[Tensor]:
        """function(*inputs, *options) by a graph. Its operations are launched one by one where inputs of such shapes
        are met for the first time, where they cannot be captured, and where they are not on this GPU."""
        key = function, options, tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        with self._capturing:
            known = key in self._met
            self._met.add(key)
        if not known or inputs[0].device.index != self._device:
            return list(function(*inputs, *options))
        slot = self._free.get()
        try:
            with self._capturing:
                if self._works and key not in slot.captured and len(slot.captured) < MOST:
                    captured = _capture(slot, function, inputs, options)
                    self._works = captured is not None
                    if captured is not None:
                        slot.captured[key] = captured
            if key in slot.captured:
                return _replay(slot, slot.captured[key], inputs)
        finally:
            self._free.put(slot)
        return list(function(*inputs, *options))


def as_graph(function: Function, *inputs: Tensor, options: tuple[Hashable, ...] = ()) -> list[Tensor]:
    """function(*inputs, *options), launched as one where the thread uses `Graphs`.

    For functions of tensors on one GPU that wait for nothing, draw nothing, and do the same for the same shapes.
    """
    graphs: Graphs | None = getattr(_here, "graphs", None)
    return list(function(*inputs, *options)) if graphs is None else graphs.run(function, inputs, options)


def _capture(
    slot: _Slot, function: Function, inputs: tuple[Tensor, ...], options: tuple[Hashable, ...]
) -> _Captured | None:
    """None where a library cannot be captured, or memory does not suffice."""
    graph = torch.cuda.CUDAGraph()
    slot.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(slot.stream):
        try:
            kept = []
            for place, x in enumerate(inputs):
                key = place, x.shape, x.stride(), x.dtype
                if key not in slot.inputs:
                    slot.inputs[key] = torch.empty_like(x)
                kept.append(slot.inputs[key].copy_(x))
            function(*kept, *options)  # the first run loads what cannot be loaded within a capture
        except torch.OutOfMemoryError:
            return None
        try:
            graph.capture_begin(pool=slot.pool, capture_error_mode="thread_local")
            try:
                outputs = function(*kept, *options)
            finally:
                graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # capture_end that fails leaves the allocator as if it went on
                torch._C._cuda_endAllocateToPool(slot.stream.device_index, slot.pool)
            return None
    return _Captured(graph, kept, outputs)


def _replay(slot: _Slot, captured: _Captured, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    current, results = torch.cuda.current_stream(), [torch.empty_like(output) for output in captured.outputs]
    slot.stream.wait_stream(current)
    with torch.cuda.stream(slot.stream):
        for kept, given in zip(captured.inputs, inputs, strict=True):
            kept.copy_(given)
        captured.graph.replay()
        for result, output in zip(results, captured.outputs, strict=True):
            result.copy_(output)
    current.wait_stream(slot.stream)
    return results
