"""LoRA (arXiv 2106.09685): one factor random, the other zero, the weight unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli.adapters.start import Layer, Method, Start
from pissa_cli.matrices import quant
from pissa_cli.matrices.svd import generator

DEFAULT = {"init": "A", "distribution": "kaiming"}
"""Options for layers of other methods that have nothing to start from."""


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `init` (A: A random, B zero; B: the other way round) and `distribution` (kaiming, gaussian).

    Variances: kaiming is PEFT's default for A, U(-1/sqrt(in), 1/sqrt(in)), so Var = 1 / (3 in); gaussian has 1 / in
    for A. B's columns see r inputs: U(-1/sqrt(r), 1/sqrt(r)), Var = 1 / (3 r), and 1 / r. Those are the orders
    Theta(1/n) and Theta(1) of Hayou et al. (arXiv 2406.08447) for Init[A] and Init[B]. An embedding's input is one-hot,
    so that A sees one number: in = 1 there.
    """
    num_out, num_in = weight.shape
    source = generator(layer.seed, layer.name)
    shape, fan_in = (num_out, layer.rank), layer.rank
    if options["init"] == "A":
        shape, fan_in = (layer.rank, num_in), 1 if layer.embedding else num_in
    drawn = torch.empty(shape)
    if options["distribution"] == "kaiming":
        drawn.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=source)
    else:
        drawn.normal_(std=fan_in**-0.5, generator=source)
    drawn = drawn.to(weight.device)
    factors = {"A": drawn, "B": weight.new_zeros(num_out, layer.rank)}
    if options["init"] == "B":
        factors = {"A": weight.new_zeros(layer.rank, num_in), "B": drawn}
    return Start(factors, quant.pack(layer.store, weight))


LORA = Method(start=start, trains=frozenset({"A", "B"}), embeddings=True)
