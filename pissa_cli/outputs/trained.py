"""What a training has left, or would have at a checkpoint: found, checked and loaded. `result` writes it."""

from __future__ import annotations

import gc
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Adapter, as_lora
from pissa_cli.base.attach import attach, lowrank_layers, restore_whole, whole_modules
from pissa_cli.base.integrity import DISTRUST, SEAL, model_facts, not_finite, require_files, require_sealed
from pissa_cli.base.loading import load_model
from pissa_cli.base.model import dense_dtype, skeleton
from pissa_cli.base.peft_files import read_peft
from pissa_cli.base.weights import hash_file
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json
from pissa_cli.matrices.products import widens
from pissa_cli.matrices.quant import packed_weight, unpacked_linear
from pissa_cli.run.reached import latest_checkpoint, newest_facts, result_of, step_of, trained_folder
from pissa_cli.run.rundir import PROVENANCE, Run, run_of
from pissa_cli.run.started import open_run, read_start, require_base
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.checkpoint import checkpoint_tensors

UNPACKED_ON_CPU = 2**31  # bytes


def load_result(recipe: Recipe, device: torch.device, step: int | None = None) -> PreTrainedModel:
    """The trained model, or that of checkpoint `step`, in eval mode, to be scored: `adapter/` on the base it is valid
    on, or `merged/` of a full fine-tuning.

    Raises UsageError if training has not finished, and if the base is not the one the adapter was made on.
    """
    if isinstance(recipe.adapter, FullOptions):
        return load_model(full_folder(recipe, step), recipe).to(device).eval()
    return _unpacked(load_with(recipe, *read_result(recipe, step), device))


def full_folder(recipe: Recipe, step: int | None = None) -> Path:
    """`merged/` of a full fine-tuning. Raises UsageError if it is not there yet, or not as training wrote it, and for a
    checkpoint, of which there is no such folder."""
    run, _ = open_run(recipe)
    return _require_whole(trained_folder(recipe, step), _remedy(run))


def load_with(recipe: Recipe, folder: Path, adapter: Adapter, device: torch.device) -> PreTrainedModel:
    """The model in `folder` with a finished adapter that is valid on it, in eval mode."""
    model = load_model(folder, recipe).to(device)
    attach(model, adapter, METHODS["vera" if adapter.projections else "lora"], plain=False)
    restore_whole(model, adapter.saved)
    _round_factors(model, dense_dtype(recipe))
    return model.eval()


def _round_factors(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have the factors in `dtype`, to which the products of every token would round them again, where all do."""
    if widens(dtype, model.device):
        return
    for layer in lowrank_layers(model).values():
        if layer.weight.dtype != torch.float32:
            for factor in layer.factors().values():
                factor.data = factor.data.to(dtype)


def _unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with the NF4 weights of adapted layers as they read back, which every token would do anew; as they are
    where that takes more than half of a GPU's free memory, or UNPACKED_ON_CPU."""
    torch.cuda.empty_cache()  # what a model before this one had is free, too
    layers = lowrank_layers(model).values()
    packed = {layer: found for layer in layers if (found := packed_weight(layer.base)) is not None}
    size = sum(found.state.shape.numel() * found.state.dtype.itemsize for found in packed.values())
    free = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else UNPACKED_ON_CPU
    if packed and size <= free:
        for layer, found in packed.items():
            layer.base = unpacked_linear(found, layer.bias)
        gc.collect()  # a layer of bitsandbytes and its weight hold one another
    return model


def trained_facts(recipe: Recipe) -> dict[str, Any]:
    """What a training that reached its end says of its result: `step`, `data`, and a seal over these and its files."""
    folder = full_folder(recipe) if isinstance(recipe.adapter, FullOptions) else trained_folder(recipe)
    return _provenance(folder, _remedy(run_of(recipe)))


def result_hash(recipe: Recipe, step: int | None = None) -> str:
    """Of a run's result, or of its checkpoint `step`: one training ends at the same step as another."""
    if step is None:
        return str(trained_facts(recipe)[SEAL])
    return hash_file(run_of(recipe).checkpoints / f"step-{step}" / "state.json")


def is_trained(recipe: Recipe) -> bool:
    """Whether a training has reached its end in the run of a recipe."""
    return result_of(recipe).is_dir()


def _require_whole(folder: Path, hint: str) -> Path:
    """A model folder of ours, if it is as it was written; else UsageError."""
    facts = _provenance(folder, hint)
    if any(facts.get(key) != value for key, value in model_facts(folder).items()):
        raise UsageError(f"{folder}: its weights, config.json or vocabulary are not what was written", hint)
    return folder


def _provenance(folder: Path, hint: str) -> dict[str, Any]:
    return require_sealed(read_json(folder / PROVENANCE), folder / PROVENANCE, hint)


def _remedy(run: Run) -> str:
    """What to do where the result of a run is not as it was written."""
    if latest_checkpoint(run) is None:
        return DISTRUST
    return f"`pissa train {shlex.quote(str(run.folder))} --resume` writes it anew from the newest checkpoint"


def trained_on(recipe: Recipe) -> str:
    """The hash of the examples that a run was trained on, by its newest checkpoint, else by its result; empty where
    there is neither."""
    known = newest_facts(run_of(recipe))["data"]
    return known or (trained_facts(recipe)["data"]["train"]["hash"] if is_trained(recipe) else "")


def merged_folder(recipe: Recipe) -> Path:
    """`merged/` of a run. Raises UsageError if it is not there, or is of another step or training than the result."""
    run = run_of(recipe)
    if not (run.merged / PROVENANCE).is_file():
        raise UsageError(f"{run.merged}: not there", "run `pissa merge` first")
    facts, result = read_json(run.merged / PROVENANCE), trained_facts(recipe)
    step, wanted = facts.get("step"), result["step"]
    if step != wanted:
        raise UsageError(f"{run.merged}: is of step {step}, the result of step {wanted}", "run `pissa merge` again")
    if facts.get("result", result[SEAL]) != result[SEAL]:
        raise UsageError(f"{run.merged}: is of another training than the result", "run `pissa merge` again")
    return _require_whole(run.merged, "run `pissa merge` again")


def read_result(recipe: Recipe, step: int | None = None) -> tuple[Path, Adapter]:
    """(folder of the base, adapter) of a run's result, or of its checkpoint `step`."""
    return read_adapter(recipe) if step is None else read_checkpoint(recipe, step)


def read_adapter(recipe: Recipe) -> tuple[Path, Adapter]:
    """(folder of the base, adapter) of `adapter/`, after checking that they belong together."""
    run, manifest = open_run(recipe)
    provenance = _provenance(trained_folder(recipe), _remedy(run))
    require_files(run.adapter, provenance["hashes"], _remedy(run))
    _, adapter = read_peft(run.adapter, manifest["widest"])
    folder = require_base(manifest, recipe)
    newest = latest_checkpoint(run)
    if newest is not None and step_of(newest) > provenance["step"]:
        raise UsageError(
            f"{run.adapter}: holds step {provenance['step']}, but the run has gone on to {newest.name}",
            "finish it with `pissa train --resume` first",
        )
    expected = provenance["base_fingerprint"]
    if expected not in (manifest["base"]["fingerprint"], manifest["base"].get("stored_fingerprint")):
        raise UsageError(
            f"{run.adapter}: this adapter was trained on another base ({expected})",
            "this folder is not of this run; train again, or bring its own adapter/ back",
        )
    return folder, adapter


def read_checkpoint(recipe: Recipe, step: int) -> tuple[Path, Adapter]:
    """What `read_adapter` would give, had training ended at checkpoint `step`."""
    run, manifest = open_run(recipe)
    folder = trained_folder(recipe, step)
    _, start = read_start(run, manifest)
    trained = checkpoint_tensors(folder)
    trains = METHODS[recipe.adapter.method].trains
    for name, factors in start.factors.items():
        for key in trains & factors.keys():
            found = trained.get(f"{name}.{key}")
            if found is None or found.shape != factors[key].shape:
                raise UsageError(
                    f"{folder}: is of another run: {name}.{key} is missing or of another shape",
                    "use a checkpoint of this run",
                )
            if not_finite(found):
                raise UsageError(f"{folder}: {name}.{key} holds NaN or infinite values", "use another checkpoint")
    base = require_base(manifest, recipe)
    return base, exported_adapter(recipe, skeleton(base, recipe.model), start, trained)


def exported_adapter(recipe: Recipe, model: PreTrainedModel, start: Adapter, trained: dict[str, Tensor]) -> Adapter:
    """The adapter as files hold it: over dense weights valid on the plain base (PiSSA's at rank 2r), over NF4 on
    `base/`.

    model: the one that trained, or a skeleton of it. start: the adapter at step 0. trained: what trained, by the names
    that checkpoints give it.
    """
    assert not isinstance(recipe.adapter, FullOptions)
    method, factors = METHODS[recipe.adapter.method], {}
    for name, before in start.factors.items():
        now = {k: trained[f"{name}.{k}"] if k in method.trains else factor for k, factor in before.items()}
        factors[name] = as_lora(now) if recipe.model.bits == 4 else method.on_plain_base(now, before)
    whole = whole_modules(model, recipe.adapter.modules_to_save)
    first = {parameter: name for name, parameter in model.named_parameters()}  # of tied ones
    saved = {f"{n}.{key}": trained[first[p]] for n, m in whole.items() for key, p in m.named_parameters(recurse=False)}
    return Adapter(factors, start.scales, start.projections, saved, start.embeddings)


def load_plain_base(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model before training, in eval mode: the dense base, or what 4-bit storage and the start make of it."""
    run, manifest = open_run(recipe)
    model = load_model(require_base(manifest, recipe), recipe).to(device)
    if recipe.model.bits == 4:
        attach(model, read_start(run, manifest)[1], METHODS[recipe.adapter.method], plain=False)
    return _unpacked(model.eval())
