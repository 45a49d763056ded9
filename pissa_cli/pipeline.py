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


def in_order(work: Callable[[T], R], items: Iterable[T], largest: int, device: torch.device) -> Iterator[R]:
    """work(item) of every item, in their order. largest: numbers in the largest tensor.

    On a CPU one thread to an item, as many as fit IN_FLIGHT_BYTES; on a GPU two items, of which one is read meanwhile.
    """
    threads, fit = torch.get_num_threads(), IN_FLIGHT_BYTES // (5 * 4 * max(largest, 1))
    workers = 2 if device.type == "cuda" else max(1, min(threads, fit))
    ahead = max(workers, min(4 * workers, fit))  # a small tensor need not wait for a large one before it
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
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
