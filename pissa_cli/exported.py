"""What a run exports: written at the end of training, loaded from its files by everything after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pissa_cli.adapter_options import FullOptions
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Adapter, as_lora
from pissa_cli.checkpoint import latest_checkpoint, step_of
from pissa_cli.errors import UsageError
from pissa_cli.initialize import copy_side_files, open_run, read_start, require_base
from pissa_cli.model import attach, load_model, lowrank_layers
from pissa_cli.peft_files import peft_config, rank_of, read_peft, write_peft
from pissa_cli.recipe import Recipe
from pissa_cli.rundir import PROVENANCE, Run, read_json, whole_folder, write_json


def write_result(recipe: Recipe, model: PreTrainedModel, step: int, data: dict[str, Any]) -> Path:
    """Write `adapter/` in PEFT files (or, for full fine-tuning, the model in `merged/`) and return its path.

    What it came from (method, step, `data`, base) goes into pissa.json beside it.
    Over a dense base the adapter is made valid on the plain base, for PiSSA at rank 2r; over NF4 on `base/`.
    """
    run, manifest = open_run(recipe)
    adapter = recipe.adapter
    if isinstance(adapter, FullOptions):
        with whole_folder(run.merged) as folder:
            copy_side_files(require_base(run, manifest, recipe), folder)
            model.save_pretrained(folder)
            write_json(folder / PROVENANCE, {"method": "full", "step": step, "data": data})
        return run.merged
    config, start = read_start(run, manifest)
    method = METHODS[adapter.method]
    factors = {}
    for name, layer in lowrank_layers(model).items():
        now = {key: factor.detach().cpu() for key, factor in layer.factors().items()}
        factors[name] = method.on_plain_base(now, start.factors[name]) if recipe.model.bits != 4 else as_lora(now)
    result = Adapter(factors, start.scales, start.projections)
    config = peft_config(
        peft_type="VERA" if method.share else "LORA",
        base=config["base_model_name_or_path"],
        ranks={name: rank_of(layer) for name, layer in factors.items()},
        scales=start.scales,
        targets=config["target_modules"],
        fan_in_fan_out=config["fan_in_fan_out"],
        seed=recipe.seed,
    )
    provenance = {
        "method": adapter.method,
        "step": step,
        "data": data,
        "trained_rank": adapter.rank,
        "exported_rank": config["r"],
        "valid_on": config["base_model_name_or_path"],
        "base_fingerprint": manifest["base"]["stored_fingerprint" if recipe.model.bits == 4 else "fingerprint"],
    }
    with whole_folder(run.adapter) as folder:
        write_peft(folder, result, config)
        write_json(folder / PROVENANCE, provenance)
    return run.adapter


def load_result(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The trained model in eval mode: `adapter/` on the base it is valid on, or `merged/` of a full fine-tuning.

    Raises UsageError if training has not finished, and if the base is not the one the adapter was made on.
    """
    if isinstance(recipe.adapter, FullOptions):
        run, _ = open_run(recipe)
        if not (run.merged / "config.json").is_file():
            raise UsageError(f"{run.folder}: no trained model yet", "run `pissa train` to its end first")
        return load_model(run.merged, recipe.model, recipe.precision).to(device).eval()
    folder, adapter = adapter_files(recipe)
    model = load_model(folder, recipe.model, recipe.precision).to(device)
    attach(model, adapter, METHODS["vera" if adapter.projections else "lora"], plain=False)
    return model.eval()


def trained_steps(recipe: Recipe) -> int:
    """Steps behind the result of a run that was trained to its end."""
    run = Run(Path(recipe.output))
    folder = run.merged if isinstance(recipe.adapter, FullOptions) else run.adapter
    return int(read_json(folder / PROVENANCE)["step"])


def adapter_files(recipe: Recipe) -> tuple[Path, Adapter]:
    """(folder of the base, adapter) of `adapter/`, after checking that they belong together."""
    run, manifest = open_run(recipe)
    if not run.adapter.is_dir():
        raise UsageError(f"{run.folder}: no trained adapter yet", "run `pissa train` to its end first")
    _, adapter = read_peft(run.adapter, manifest["widest"])
    folder = require_base(run, manifest, recipe)
    provenance = read_json(run.adapter / PROVENANCE)
    newest = latest_checkpoint(run)
    if newest is not None and step_of(newest) > provenance["step"]:
        raise UsageError(
            f"{run.adapter}: holds step {provenance['step']}, but the run has gone on to {newest.name}",
            "finish it with `pissa train --resume` first",
        )
    expected = provenance["base_fingerprint"]
    if expected not in (manifest["base"]["fingerprint"], manifest["base"].get("stored_fingerprint")):
        raise UsageError(f"{run.adapter}: this adapter was trained on another base ({expected})")
    return folder, adapter


def load_plain_base(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model before training, in eval mode: the dense base, or what 4-bit storage and the start make of it."""
    run, manifest = open_run(recipe)
    model = load_model(require_base(run, manifest, recipe), recipe.model, recipe.precision).to(device)
    if recipe.model.bits == 4:
        attach(model, read_start(run, manifest)[1], METHODS[recipe.adapter.method], plain=False)
    return model.eval()
