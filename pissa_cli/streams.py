"""What must wait for what on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """For bitsandbytes' quantization, which on a GPU runs on the default stream, whichever is the current one: after
    what comes before it there, and before what comes after."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
    default.wait_stream(current)
    yield
    current.wait_stream(default)
