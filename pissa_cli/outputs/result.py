"""The result of a training, written: `adapter/` in PEFT files, or of full fine-tuning the model in `merged/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pissa_cli.base.integrity import hashes, model_facts, not_finite, read_settings, sealed
from pissa_cli.base.model import head_names
from pissa_cli.base.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, peft_config, rank_of, reader_of, write_peft
from pissa_cli.base.side_files import copy_side_files, copy_tokenizer, task_settings
from pissa_cli.base.weights import let_read
from pissa_cli.errors import PissaError
from pissa_cli.files import whole_folder, write_json, write_text
from pissa_cli.outputs.answer_ends import write_answer_ends
from pissa_cli.outputs.card import model_card
from pissa_cli.outputs.trained import exported_adapter
from pissa_cli.run.reached import result_of
from pissa_cli.run.report import PACKED_EXPERTS
from pissa_cli.run.rundir import PROVENANCE
from pissa_cli.run.started import frozen_base, open_run, read_start, require_base
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe


def write_result(
    recipe: Recipe, model: PreTrainedModel, trained: dict[str, Tensor], step: int, data: dict[str, Any]
) -> Path:
    """Write `adapter/` in PEFT files (or, for full fine-tuning, the model in `merged/`) and return its path.

    trained: the values in whole of what trains in `model`, by the names that checkpoints give it. What it came from
    (method, step, `data`, base) goes into pissa.json beside it.
    """
    spoilt = next((name for name, tensor in trained.items() if not_finite(tensor)), None)
    if spoilt is not None:
        raise PissaError(
            f"training has diverged at its end: {spoilt} holds NaN or infinite values",
            f"begin a new run (another --output) with a lower train.lr (now {recipe.lr:g})",
        )
    facts = {"method": recipe.adapter.method, "step": step, "data": data}
    write = _write_full if isinstance(recipe.adapter, FullOptions) else _write_adapter
    write(recipe, model, trained, facts)
    return result_of(recipe)


def _write_full(recipe: Recipe, model: PreTrainedModel, trained: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """The model in `merged/`, with the settings of its base."""
    run, manifest = open_run(recipe)
    with whole_folder(run.merged) as folder:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        first = {parameter: name for name, parameter in model.named_parameters()}  # of tied ones
        state = {n: trained[first[parameters[n]]] if n in parameters else t for n, t in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
        base, written = require_base(manifest, recipe), read_settings(folder)
        copy_side_files(base, folder, recipe)  # over those that transformers wrote in the form of its own version
        settings = read_settings(base)
        if settings.get("model_type") != written["model_type"]:  # the language model alone of one that sees, too
            settings = written
        settings |= task_settings(model) | {"architectures": written["architectures"]}
        dtype = "torch_dtype" if "torch_dtype" in settings else "dtype"
        write_json(folder / "config.json", settings | {dtype: str(model.dtype).removeprefix("torch.")})
        for file in folder.glob("*.safetensors"):
            let_read(file)
        write_answer_ends(folder, recipe)
        facts |= {"base_fingerprint": manifest["base"]["fingerprint"], **model_facts(folder)}
        write_json(folder / PROVENANCE, sealed(facts))


def _write_adapter(recipe: Recipe, model: PreTrainedModel, trained: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """The adapter in `adapter/`: over a dense base made valid on the plain base, for PiSSA at rank 2r; over NF4 on
    `base/`."""
    (run, manifest), adapter = open_run(recipe), recipe.adapter
    assert not isinstance(adapter, FullOptions)
    config, start = read_start(run, manifest)
    result = exported_adapter(recipe, model, start, trained)
    config = peft_config(
        peft_type="VERA" if result.projections else "LORA",
        base=frozen_base(recipe),
        revision=recipe.model.revision,
        ranks={name: rank_of(factors) for name, factors in result.factors.items()},
        scales=start.scales,
        targets={key: config[key] for key in ("target_modules", "target_parameters") if key in config},
        fan_in_fan_out=config["fan_in_fan_out"],
        seed=recipe.seed,
        saved=result.saved,
        heads=head_names(model),
        save_projection=getattr(adapter, "save_projection", False),
    )
    facts |= {
        "trained_rank": adapter.rank,
        "exported_rank": config["r"],
        "valid_on": frozen_base(recipe),
        "base_fingerprint": manifest["base"]["stored_fingerprint" if recipe.model.bits == 4 else "fingerprint"],
    }
    if recipe.model.bits == 4:
        write_answer_ends(run.base, recipe)
    with whole_folder(run.adapter) as folder:
        write_peft(folder, result, config)
        copy_tokenizer(require_base(manifest, recipe), folder, recipe)
        what = f"exported as an adapter for {reader_of(config, result.factors)}"
        if recipe.doubles_rank:
            what += ", of twice the rank: what was trained, less what it started from"
        if manifest.get("packed_experts"):
            what += f", on `base/`: {PACKED_EXPERTS}"
        write_text(folder / "README.md", model_card(recipe, what, "peft", facts["step"]))
        facts["hashes"] = hashes(folder, (PEFT_CONFIG, PEFT_WEIGHTS))
        write_json(folder / PROVENANCE, sealed(facts))
