"""Under which names files hold a model's parameters, and PEFT looks for an adapter's."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pissa_cli.base.weights import Weights
from pissa_cli.errors import UsageError


class DiskName(Protocol):
    """The tensor of a parameter; where there is none, UsageError, or if it is not `required`, ''."""

    def __call__(self, parameter: str, required: bool = True) -> str: ...


def names_on_disk(model: PreTrainedModel, weights: Weights) -> DiskName:
    """By the parameter's own name, without the base model's prefix (GPT-2's `transformer.`) or with it, or by one that
    transformers renames as it loads (Gemma 3's `language_model.model.`)."""
    prefix = model.base_model_prefix

    @functools.cache
    def renamed() -> dict[str, str]:
        found = {}
        transforms = get_model_conversion_mapping(model)
        for name in weights.files:
            given = name
            for transform in transforms:
                given, matched = transform.rename_source_key(given)
                if matched is not None and not isinstance(transform, WeightRenaming):
                    break  # its content is converted as well
            else:
                found[given] = name
        return found

    def disk_name(parameter: str, required: bool = True) -> str:
        forms = parameter, parameter.removeprefix(f"{prefix}."), f"{prefix}.{parameter}"
        for name in forms:
            if name in weights.files:
                return name
        for name in forms:
            if name in renamed():
                return renamed()[name]
        if required:
            raise UsageError(
                f"{weights.folder}: no tensor for {parameter}: it is missing, or under a name that is not understood",
                "if transformers loads this folder, save it from there, by save_pretrained(NEW, "
                "save_original_format=False), and copy the tokenizer's files into NEW; else download it again",
            )
        return ""

    return disk_name


def lost_in_peft(model: PreTrainedModel, layers: Iterable[str]) -> list[str]:
    """Those of these modules whose LoRA PEFT does not find: it renames an adapter's tensors as transformers does those
    of a checkpoint, though they go by the names of modules already."""
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return []
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    lost = []
    for layer in layers:
        key = given = f"{layer}.lora_A.default.weight"
        for renaming in renamings:
            given, _ = renaming.rename_source_key(given)
        if not key.endswith(given):  # what lost a prefix alone gets it back
            lost.append(layer)
    return lost
