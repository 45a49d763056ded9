"""Load what a run exported, from its files: the adapter on its base, or the base alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Factors
from pissa_cli.errors import UsageError
from pissa_cli.initialize import require_base
from pissa_cli.model import attach, load_model
from pissa_cli.recipe import Recipe
from pissa_cli.rundir import PROVENANCE, Run, read_json, read_peft


def load_result(run: Run, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The trained model in eval mode: `adapter/` on the base it is valid on, or `merged/` of a full fine-tuning.

    Raises UsageError if training has not finished, and if the base is not the one the adapter was made on.
    """
    if recipe.adapter.method == "full":
        if not (run.merged / "config.json").is_file():
            raise UsageError(f"{run.folder}: no trained model yet", "run `pissa train` to its end first")
        return load_model(run.merged, recipe.model, recipe.precision).to(device).eval()
    folder, config, factors = adapter_files(run)
    model = load_model(folder, recipe.model, recipe.precision).to(device)
    attach(model, factors, METHODS["lora"], config["lora_alpha"] / config["r"])
    return model.eval()


def adapter_files(run: Run) -> tuple[Path, dict[str, Any], dict[str, Factors]]:
    """(folder of the base, PEFT configuration, factors) of `adapter/`, after checking that they belong together."""
    manifest = run.read_manifest()
    if not run.adapter.is_dir():
        raise UsageError(f"{run.folder}: no trained adapter yet", "run `pissa train` to its end first")
    config, factors = read_peft(run.adapter)
    folder = require_base(run, manifest)
    expected = read_json(run.adapter / PROVENANCE)["base_fingerprint"]
    if expected not in (manifest["base"]["fingerprint"], manifest["base"].get("stored_fingerprint")):
        raise UsageError(f"{run.adapter}: this adapter was trained on another base ({expected})")
    return folder, config, factors


def load_plain_base(run: Run, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model before training, in eval mode: the dense base, or what 4-bit storage and the start make of it."""
    manifest = run.read_manifest()
    model = load_model(require_base(run, manifest), recipe.model, recipe.precision).to(device)
    if recipe.model.bits == 4:
        config, factors = read_peft(run.init)
        attach(model, factors, METHODS["lora"], config["lora_alpha"] / config["r"])
    return model.eval()
