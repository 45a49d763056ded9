"""`export --as lora`: a run or one of its checkpoints as a PEFT LoRA on the plain base, at any rank."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_cli.adapter_options import FullOptions
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Adapter, Factors, balanced
from pissa_cli.card import model_card
from pissa_cli.errors import UsageError
from pissa_cli.exported import load_with, result_files
from pissa_cli.initialize import open_run
from pissa_cli.integrity import require_model
from pissa_cli.loading import load_tokenizer
from pissa_cli.model import (
    Linear,
    best_device,
    head_names,
    linear_layers,
    peft_targets,
    read_weight,
    resolve_base,
    skeleton,
)
from pissa_cli.peft_files import PeftWriter, peft_config, rank_of, read_peft
from pissa_cli.probes import logit_difference, probe_logits
from pissa_cli.recipe import Recipe
from pissa_cli.rundir import require_free, whole_folder, write_text
from pissa_cli.serving import TAKE_TEMPLATES, check_served, require_server
from pissa_cli.side_files import copy_tokenizer
from pissa_cli.svd import SVD, frobenius_norm, truncated_svd
from pissa_cli.weights import open_weights


def export_lora(
    recipe: Recipe,
    output: Path,
    rank: int | None = None,
    uniform: bool = False,
    server: str | None = None,
    step: int | None = None,
    check: bool = False,
) -> dict[str, Any]:
    """Write the result of a run, or of its checkpoint `step`, as PEFT LoRA files for the plain base.

    Over dense weights it is exact at its own rank (PiSSA's is 2r), and recompressed by SVD below that. A run over NF4
    is valid on `base/` alone: here it is approximated, by the best LoRA of `rank` (default: that exact one's) of
    W_trained - W. `uniform` gives all layers one rank and one scale by zero rows: the same function.

    Returns paths, ranks, `relative_error` (Frobenius, of the change of all weights), the line that serves it for
    `server`, and with `check` the difference of logits. Raises UsageError for what cannot be; nothing is written then.
    """
    if isinstance(recipe.adapter, FullOptions):
        raise UsageError("full fine-tuning has no adapter", "export it with --as merged")
    if server is not None:
        require_server(server)
    run, manifest = open_run(recipe)
    require_free(output, run.folder / "exported")
    stored, adapter = result_files(recipe, step)
    plain = require_model(resolve_base(recipe.model), manifest["base"])
    model = skeleton(plain, recipe.model)
    every = linear_layers(model, open_weights(plain))
    layers = [layer for layer in every if layer.name in adapter.factors]
    ranks = {layer.name: _rank(recipe, layer, adapter.factors[layer.name], rank) for layer in layers}
    as_it_is = (
        recipe.model.bits != 4
        and not uniform
        and adapter.projections is None
        and all(ranks[name] == rank_of(factors) for name, factors in adapter.factors.items())
    )
    if uniform:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    config = peft_config(
        peft_type="LORA",
        base=recipe.model.name,
        ranks=ranks,
        scales=adapter.scales if as_it_is else dict.fromkeys(ranks, 1.0),
        targets=peft_targets(ranks, every, model, "LORA"),
        fan_in_fan_out=any(layer.transposed and not layer.embedding for layer in layers),
        seed=recipe.seed,
        saved=adapter.saved,
        heads=head_names(model),
    )
    lost = whole = worst = 0.0
    with whole_folder(output) as folder:
        shapes = {layer.name: _shapes(layer, ranks[layer.name]) for layer in layers}
        writer = PeftWriter(folder, config, shapes, adapter.saved, adapter.embeddings)
        if as_it_is:
            for name, factors in adapter.factors.items():
                writer.add(name, factors)
        else:
            for name, A, B, missed, norm in _differences(recipe, adapter, stored, plain, layers, ranks):
                lost, whole, worst = lost + missed**2, whole + norm**2, max(worst, missed / max(norm, 1e-30))
                writer.add(name, _padded(A, B, ranks[name]))
        writer.close()
        copy_tokenizer(plain, folder, recipe)
        write_text(folder / "README.md", model_card(recipe, "written as a LoRA for the plain base model", "peft", step))
        serve = check_served(folder, server) if server else None
        if serve and server in TAKE_TEMPLATES and recipe.data.chat_template is not None:
            serve += f" --chat-template {folder}/chat_template.jinja"
        compared = _compare(recipe, stored, adapter, plain, folder) if check else {}
    return {
        "path": str(output),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "rank": config["r"],
        "ranks": [min(ranks.values()), max(ranks.values())],
        "base": recipe.model.name,
        "relative_error": math.sqrt(lost / whole) if whole else 0.0,
        "worst_relative_error": worst,
        "serve": serve.replace(str(folder), str(output)) if serve else None,
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


def _rank(recipe: Recipe, layer: Linear, factors: Factors, wanted: int | None) -> int:
    """The rank of a layer's LoRA: its own (over NF4 that which PiSSA would have over dense weights), or less."""
    own = rank_of(factors)
    if recipe.model.bits == 4:
        own = min(own * (2 if METHODS[recipe.adapter.method].moves_base else 1), layer.num_out, layer.num_in)
        return min(wanted or own, layer.num_out, layer.num_in)
    return min(wanted or own, own)


def _shapes(layer: Linear, rank: int) -> dict[str, tuple[int, ...]]:
    return {"A": (rank, layer.num_in), "B": (layer.num_out, rank)}


def _padded(A: Tensor, B: Tensor, rank: int) -> Factors:
    """With zero rows and columns up to `rank`."""
    more = rank - A.shape[0]
    return {"A": torch.nn.functional.pad(A, (0, 0, 0, more)), "B": torch.nn.functional.pad(B, (0, more))}


def _differences(
    recipe: Recipe, adapter: Adapter, stored: Path, plain: Path, layers: list[Linear], ranks: dict[str, int]
) -> Iterator[tuple[str, Tensor, Tensor, float, float]]:
    """(name, A, B, norm missed, norm in all) of each layer's LoRA on the plain base."""
    device, four = best_device(), recipe.model.bits == 4
    plain_weights, stored_weights = open_weights(plain), open_weights(stored)
    stored_layers = linear_layers(skeleton(stored, recipe.model), stored_weights) if four else layers
    there = {layer.name: layer for layer in stored_layers}
    for layer in layers:
        rank = ranks[layer.name]
        A, B = adapter.pair(layer.name, torch.Size((layer.num_out, layer.num_in)), device)
        if four:
            trained, _ = read_weight(stored_weights, there[layer.name], device)
            change = torch.addmm(trained, B, A).sub_(read_weight(plain_weights, layer, device)[0])
            A, B = balanced(truncated_svd(change, min(rank, *change.shape), "fast", recipe.seed, layer.name), 1.0)
            yield layer.name, A, B, frobenius_norm(torch.addmm(change, B, A, alpha=-1)), frobenius_norm(change)
        elif rank < A.shape[0]:
            yield layer.name, *recompress(A, B, rank)
        else:
            yield layer.name, A, B, 0.0, 0.0


def _compare(recipe: Recipe, stored: Path, adapter: Adapter, plain: Path, folder: Path) -> dict[str, float]:
    """Logits of the run against those of the exported files on the plain base."""
    device, tokenizer = best_device(), load_tokenizer(plain, recipe)
    before = probe_logits(load_with(recipe, stored, adapter, device), tokenizer, recipe)
    gc.collect()
    dense = recipe.model_copy(update={"model": recipe.dense_model})
    after = load_with(dense, plain, read_peft(folder)[1], device)
    return logit_difference(before, probe_logits(after, tokenizer, recipe))
