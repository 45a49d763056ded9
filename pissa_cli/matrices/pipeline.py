"""Work on tensor after tensor in threads, so that reading, computing and writing overlap; results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from pissa_cli.matrices.graphs import Graphs
from pissa_cli.matrices.panels import helpers

COPIES = 5  # in fp32, that may be alive of a tensor while it is worked on
IN_FLIGHT_BYTES = 2**29  # of them, on a CPU
ON_GPU = 8  # tensors at once there, in half of the free memory
SEARCH_BYTES = 2**29  # that fitting the scales of a tensor takes there
T = TypeVar("T")
R = TypeVar("R")


def in_flight(largest: int, device: torch.device) -> tuple[int, int, int]:
    """(workers, ahead, helpers): tensors to work on at once, tensors that may be begun and not yet taken, and threads
    that each worker has for its panels. largest: how many numbers the largest tensor has.

    On a CPU as many as fit into IN_FLIGHT_BYTES, one to a thread. On a GPU several as well, so that it need not wait
    for what the CPU reads, draws or factors. torch loads its linear algebra for GPUs at the first use, which is made
    here, as two threads must not do so at once.
    """
    threads, needed = torch.get_num_threads(), COPIES * 4 * max(largest, 1)
    if device.type == "cuda":
        torch.linalg.cholesky_ex(torch.eye(2, device=device))
        free, _ = torch.cuda.mem_get_info(device)
        workers = max(1, min(threads, ON_GPU, free // 2 // (needed + SEARCH_BYTES)))
        return workers, workers + 1, 1
    fit = IN_FLIGHT_BYTES // needed
    workers = max(1, min(threads, fit))
    return workers, max(workers, min(4 * workers, fit)), threads // workers  # a small one need not wait for a large one


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int, ahead: int, each: int) -> Iterator[R]:
    """work(item) of every item, in their order; workers, ahead, each: as `in_flight` gives them.

    Each worker computes on one thread of torch's, and shares out what `panels` cuts among its helpers. On a GPU it has
    a stream of its own, and a result is handed on when that has come to its end.
    """
    threads, graphs = torch.get_num_threads(), Graphs(workers) if torch.cuda.is_initialized() else None

    def begin(use_helpers: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        use_helpers()
        if graphs is not None:
            graphs.use()
            torch.cuda.set_stream(torch.cuda.Stream())

    def finished(item: T) -> R:
        result = work(item)
        if graphs is not None:
            torch.cuda.current_stream().synchronize()
        return result

    with (
        nullcontext() if graphs is None else _freed_workspaces(),
        helpers(workers * each if each > 1 else 1) as use,
        ThreadPoolExecutor(workers, initializer=begin, initargs=(use,)) as pool,
    ):
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(finished, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)


@contextmanager
def _freed_workspaces() -> Iterator[None]:
    """At its end those of cuBLAS are freed, which would stay, for each thread and stream."""
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
