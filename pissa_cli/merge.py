"""`merge`: stream a run into one dense model, and check it against the adapter."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.experts import holders_of_3d_weights
from pissa_cli.base.integrity import SEAL, model_facts, read_settings, sealed
from pissa_cli.base.loading import load_model, load_tokenizer
from pissa_cli.base.model import DTYPES, best_device, skeleton
from pissa_cli.base.side_files import copy_side_files, task_settings
from pissa_cli.base.weights import ShardWriter, open_weights
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.files import whole_folder, write_json, write_text
from pissa_cli.initialize import Progress
from pissa_cli.outputs.answer_ends import write_answer_ends
from pissa_cli.outputs.card import model_card
from pissa_cli.outputs.dense import dense_tensors, written_name
from pissa_cli.outputs.probes import (
    logit_difference,
    outputs_rounded,
    probe_logits,
    relative_difference,
    typical_difference,
)
from pissa_cli.outputs.trained import full_folder, load_with, read_result, trained_facts
from pissa_cli.run.rundir import PROVENANCE, require_free
from pissa_cli.run.started import open_run
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest ||difference of logits|| / ||logits|| that merged weights, or products, of this dtype explain in any."""
NOISE = 2
"""How many times what rounding alone changes in this one is allowed, where that is more."""


def merge(
    recipe: Recipe, progress: Progress = lambda *_: None, output: Path | None = None, step: int | None = None
) -> dict[str, Any]:
    """Write the dense model, W + s B A in every adapted layer, and compare its logits with the adapter's.

    It is that of the run's result, or of its checkpoint `step`, and goes into the run's `merged/`, or into `output`. A
    sum is formed in fp32 and rounded once to the dtype of the base (`dense.dense_tensors`). Of a 4-bit run W is what
    was stored, read back, so that nothing is approximated. A full fine-tuning has its `merged/` already, which gets its
    model card and nothing else.

    Returns `path`, `bytes`, and `max_logit_difference` and `relative_logit_difference` (None after full fine-tuning).
    Raises PissaError, and leaves no folder, if the logits differ by more than rounding (TOLERANCE, NOISE).
    """
    run, manifest = open_run(recipe)
    if isinstance(recipe.adapter, FullOptions):
        if step is not None or output not in (None, run.merged):
            raise UsageError("full fine-tuning has one model and no other form", f"copy {run.merged}")
        return _finish_full(recipe)
    target_folder = output or run.merged
    require_free(target_folder, run.merged)
    folder, adapter = read_result(recipe, step)
    weights, tokenizer = open_weights(folder), load_tokenizer(folder, recipe)
    with whole_folder(target_folder) as target:
        writer = ShardWriter(target)
        dtypes = {DTYPES[recipe.precision]}
        model = skeleton(folder, recipe.model)
        dense = dense_tensors(recipe, model, weights, adapter, lambda *made: made)
        written = written_name(model, weights)
        for number, (name, linear, tensor) in enumerate(dense):
            if linear is not None:
                dtypes.add(tensor.dtype)
            writer.add(written(name), tensor)
            progress(number + 1, len(weights.files), name)
        writer.close()
        copy_side_files(folder, target, recipe)
        write_answer_ends(target, recipe)
        model_config = read_settings(target) | task_settings(model)
        model_config.pop("quantization_config", None)
        write_json(target / "config.json", model_config)
        write_text(target / "README.md", model_card(recipe, "merged into one model", step=step))
        provenance: dict[str, Any] = {"method": recipe.adapter.method, "step": step}
        if step is None:
            facts = trained_facts(recipe)
            provenance |= {"step": facts["step"], "result": facts[SEAL]}
        provenance |= {"base_fingerprint": manifest["base"]["fingerprint"], **model_facts(target)}
        write_json(target / PROVENANCE, sealed(provenance))
        apart = _adapter_logits(recipe, folder, adapter, tokenizer)
        difference = _compare(recipe, apart, tokenizer, target, max(dtypes, key=TOLERANCE.__getitem__))
    return {"path": str(target_folder), "bytes": writer.total_bytes, **difference}


def _finish_full(recipe: Recipe) -> dict[str, Any]:
    folder = full_folder(recipe)
    write_text(folder / "README.md", model_card(recipe, "merged into one model"))
    size = open_weights(folder).num_bytes()
    return {"path": str(folder), "bytes": size, "max_logit_difference": None, "relative_logit_difference": None}


def _adapter_logits(recipe: Recipe, folder: Path, adapter: Adapter, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Of the adapter on its base, which is gone from memory then."""
    logits = probe_logits(load_with(recipe, folder, adapter, best_device()), tokenizer, recipe)
    gc.collect()
    return logits


def _compare(
    recipe: Recipe, apart: list[Tensor], tokenizer: PreTrainedTokenizerBase, merged: Path, coarsest: torch.dtype
) -> dict[str, float]:
    """Logits of the adapter on its base, `apart`, against those of the merged model. coarsest: of its weights and
    products."""
    together = load_model(merged, recipe.dense).to(best_device()).eval()
    logits = probe_logits(together, tokenizer, recipe)
    experts = holders_of_3d_weights(together)  # a rounding may send a token to another one
    relative = typical_difference if experts else relative_difference
    difference, allowed = relative(apart, logits), TOLERANCE[coarsest]
    if not difference <= allowed:
        with outputs_rounded(together, coarsest):
            allowed = max(allowed, NOISE * relative(logits, probe_logits(together, tokenizer, recipe)))
    if not difference <= allowed:
        raise PissaError(
            f"the merged model's logits differ from the adapter's by {difference:.1e} (allowed: {allowed:.0e})",
            "nothing was written; please report this with the recipe and the model",
        )
    return logit_difference(apart, logits)
