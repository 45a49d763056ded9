"""Work on tensor after tensor in threads, so that reading, computing and writing overlap; results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

IN_FLIGHT_BYTES = 2**29  # five fp32 copies of a tensor may be alive while it is worked on
T = TypeVar("T")
R = TypeVar("R")


def in_flight(largest: int, device: torch.device) -> tuple[int, int]:
    """(tensors to work on at once, tensors begun and not yet taken), the largest of so many numbers.

    On a GPU one at once: torch loads its linear algebra there when it is first used, which two threads must not do.
    """
    fit = IN_FLIGHT_BYTES // (5 * 4 * max(largest, 1))
    workers = 1 if device.type == "cuda" else max(1, min(torch.get_num_threads(), fit))
    return workers, max(workers, min(4 * workers, fit))  # a small tensor need not wait for a large one before it


def in_order(
    work: Callable[[T], R], items: Iterable[T], workers: int, ahead: int, threads_each: int = 1
) -> Iterator[R]:
    """work(item) of every item, in their order: `workers` at once, each with so many threads of torch's."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads_each,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)
