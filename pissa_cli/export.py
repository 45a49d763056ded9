"""`export --as lora`: a run or one of its checkpoints as a PEFT LoRA on the plain base, at any rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pissa_cli.adapters import pissa
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Adapter, Factors, as_lora, balanced
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.model import Linear, best_device, head_names, linear_layers, skeleton
from pissa_cli.base.peft_files import PeftWriter, peft_config, peft_targets, rank_of, read_peft, reader_of
from pissa_cli.base.side_files import copy_tokenizer
from pissa_cli.base.weights import open_weights
from pissa_cli.errors import UsageError
from pissa_cli.files import whole_folder, write_text
from pissa_cli.matrices.svd import SVD
from pissa_cli.outputs.answer_ends import unknown_ends
from pissa_cli.outputs.card import model_card
from pissa_cli.outputs.probes import logit_difference, probe_logits
from pissa_cli.outputs.serving import check_served
from pissa_cli.outputs.trained import load_with, read_result
from pissa_cli.run.rundir import require_free
from pissa_cli.run.started import open_run, read_start, require_plain_base
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe


def export_lora(
    recipe: Recipe,
    output: Path | None = None,
    rank: int | None = None,
    uniform: bool = False,
    server: str | None = None,
    step: int | None = None,
    check: bool = False,
) -> dict[str, Any]:
    """Write the result of a run, or of its checkpoint `step`, as PEFT LoRA files for the plain base, into the run's
    `exported/` or into `output`.

    What was learned is exact at its own rank (PiSSA's is 2r), and recompressed by SVD below that. A run over NF4 is
    valid on `base/` alone: what its 4 bits lost of W is no part of this. `uniform` gives all layers one rank and one
    scale by zero rows: the same function.

    Returns paths, ranks, `relative_error` (Frobenius, of what was learned in all weights), the line that serves it for
    `server`, where answers end and the base would go on, and with `check` the difference of logits. Raises UsageError
    for what cannot be; nothing is written then.
    """
    if isinstance(recipe.adapter, FullOptions):
        raise UsageError("full fine-tuning has no adapter", "export it with --as merged")
    run, manifest = open_run(recipe)
    output = output or run.exported
    require_free(output, run.exported)
    stored, result = read_result(recipe, step)
    adapter = result if recipe.model.bits != 4 else _learned(recipe, result)
    plain = require_plain_base(manifest, recipe)
    model = skeleton(plain, recipe.model)
    every = linear_layers(model, open_weights(plain))
    layers = [layer for layer in every if layer.name in adapter.factors]
    own = {layer.name: rank_of(adapter.factors[layer.name]) for layer in layers}
    ranks = {name: min(rank or most, most) for name, most in own.items()}
    as_it_is = not uniform and adapter.projections is None and ranks == own
    if uniform:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    config = peft_config(
        peft_type="LORA",
        base=recipe.model.name,
        revision=recipe.model.revision,
        ranks=ranks,
        scales=adapter.scales if as_it_is else dict.fromkeys(ranks, 1.0),
        targets=peft_targets(ranks, every, model, "LORA"),
        fan_in_fan_out=any(layer.transposed and not layer.embedding for layer in layers),
        seed=recipe.seed,
        saved=adapter.saved,
        heads=head_names(model),
    )
    norms = []
    with whole_folder(output) as folder:
        shapes = {layer.name: _shapes(layer, ranks[layer.name]) for layer in layers}
        writer = PeftWriter(folder, config, shapes, adapter.saved, adapter.embeddings)
        for layer in layers:
            factors = adapter.factors[layer.name]
            if not as_it_is:
                factors, missed, norm = _at_rank(adapter, layer, ranks[layer.name])
                norms.append((missed, norm))
            writer.add(layer.name, factors)
        writer.close()
        copy_tokenizer(plain, folder, recipe)
        what = f"written as a LoRA for the plain base model and {reader_of(config, ranks)}"
        write_text(folder / "README.md", model_card(recipe, what, "peft", step))
        own_template = recipe.data.chat_template is not None
        serve = check_served(folder, server, output, plain, own_template) if server else None
        compared = _compare(recipe, stored, result, plain, folder) if check else {}
    lost, whole = sum(missed**2 for missed, _ in norms), sum(norm**2 for _, norm in norms)
    return {
        "path": str(output),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "rank": config["r"],
        "ranks": [min(ranks.values()), max(ranks.values())],
        "base": recipe.model.name,
        "relative_error": math.sqrt(lost / whole) if whole else 0.0,
        "worst_relative_error": max((missed / max(norm, 1e-30) for missed, norm in norms), default=0.0),
        "serve": serve,
        "unknown_ends": unknown_ends(plain, recipe),
        **compared,
    }


def recompress(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of B A of a lower rank, A (k, in) and B (out, k), by QR of both and a k x k SVD in fp64.

    Returns A (r, in), B (out, r), and the Frobenius norms of what they miss and of B A.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    best_A, best_B = balanced(SVD(Q_B @ U[:, :rank], S[:rank], Vh[:rank] @ Q_A.T), 1.0)
    return best_A.float(), best_B.float(), float(S[rank:].norm()), float(S.norm())


def _learned(recipe: Recipe, adapter: Adapter) -> Adapter:
    """The adapter of a run over NF4, which is valid on `base/`, as the change since step 0: B' A' - B A.

    What 4 bits lost of W stays where it was. The best LoRA of W_trained - W would spend its rank on that, and drop what
    was learned at a low learning rate.
    """
    method = METHODS[recipe.adapter.method]
    if not method.moves_base:
        return adapter
    _, start = read_start(*open_run(recipe))
    factors = {}
    for name, now in adapter.factors.items():
        before = as_lora(start.factors[name])
        if "A" in method.trains:  # even of an expert that got no token: PEFT wants all of one rank
            factors[name] = pissa.on_plain_base(now, before)
        else:
            factors[name] = now | {"B": now["B"] - before["B"]}
    return replace(adapter, factors=factors)


def _shapes(layer: Linear, rank: int) -> dict[str, tuple[int, ...]]:
    return {"A": (rank, layer.num_in), "B": (layer.num_out, rank)}


def _at_rank(adapter: Adapter, layer: Linear, rank: int) -> tuple[Factors, float, float]:
    """(A and B of a layer of this rank and scale 1, norm of what they miss, norm of its change): recompressed, or with
    zero rows and columns; the norms are 0 where nothing is missed."""
    A, B = adapter.pair(layer.name, torch.Size((layer.num_out, layer.num_in)), best_device())
    missed = norm = 0.0
    if rank < A.shape[0]:
        A, B, missed, norm = recompress(A, B, rank)
    more = rank - A.shape[0]
    return {"A": functional.pad(A, (0, 0, 0, more)), "B": functional.pad(B, (0, more))}, missed, norm


def _compare(recipe: Recipe, stored: Path, adapter: Adapter, plain: Path, folder: Path) -> dict[str, float]:
    """Logits of the run against those of the exported files on the plain base."""
    device, tokenizer = best_device(), load_tokenizer(plain, recipe)
    before = probe_logits(load_with(recipe, stored, adapter, device), tokenizer, recipe)
    after = load_with(recipe.dense, plain, read_peft(folder)[1], device)
    return logit_difference(before, probe_logits(after, tokenizer, recipe))
