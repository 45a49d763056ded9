"""VeRA (arXiv 2310.11454): one frozen random pair A, B for all layers; each trains a vector d (r,) and b (out,)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pissa_cli.adapters.start import Layer, Method, Projections, Start
from pissa_cli.matrices import quant


def start(weight: Tensor, layer: Layer, options: Mapping[str, Any]) -> Start:
    """options: `d_initial`, the paper's 0.1 (section 3.3). b = 0, so the weight is unchanged; s = 1."""
    d = torch.full((layer.rank,), options["d_initial"], device=weight.device)
    return Start({"d": d, "b": weight.new_zeros(weight.shape[0])}, quant.pack(layer.store, weight))


def projections(seed: int, rank: int, num_out: int, num_in: int) -> Projections:
    """A (r, in), then B (out, r), from one CPU generator: Kaiming uniform with gain sqrt 2, Var = 2 / fan in.

    As PEFT draws them for `projection_prng_key`, at the largest sizes among the adapted layers, so that the same seed
    gives the same matrices there; layers use A[:, :in] and B[:out].
    """
    source = torch.Generator().manual_seed(seed)
    pair = []
    for shape in ((rank, num_in), (num_out, rank)):
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
        pair.append(torch.empty(shape).uniform_(-bound, bound, generator=source))
    return Projections(*pair)


VERA = Method(
    start=start,
    trains=frozenset({"d", "b"}),
    rank_limit="none",
    peft_type="VERA",
    experts=False,  # PEFT would leave them out of its files without a word
)
