"""LoRA (arXiv 2106.09685), Init[A]: A random, B = 0, the weight unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli import quant
from pissa_cli.adapters.start import Factors, Layer, Method, Start
from pissa_cli.svd import generator


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), so Var = 1 / (3 in), PEFT's default (Kaiming with a = sqrt 5)."""
    num_out, num_in = weight.shape
    bound = num_in**-0.5
    A = torch.empty(layer.rank, num_in).uniform_(-bound, bound, generator=generator(layer.seed, layer.name))
    factors = {"A": A.to(weight.device), "B": weight.new_zeros(num_out, layer.rank)}
    return Start(factors, quant.pack(layer.store, weight))


def on_plain_base(now: Factors, _start: Factors) -> tuple[Tensor, Tensor]:
    return now["A"], now["B"]


LORA = Method(start=start, trains=frozenset({"A", "B"}), moves_base=False, on_plain_base=on_plain_base)
