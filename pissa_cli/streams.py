"""Which stream of a GPU waits for which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """For calls of bitsandbytes' quantization, which run on the GPU's default stream, whichever is the current one:
    before the block the default stream waits for the current one, after it the other way round. Nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
    default.wait_stream(current)
    yield
    current.wait_stream(default)
