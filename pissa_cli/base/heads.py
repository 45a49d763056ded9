"""The head that a classifier starts with: that of the base, or a new one."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedModel

from pissa_cli.base.integrity import read_settings
from pissa_cli.base.model import in_head, skeleton
from pissa_cli.base.side_files import task_of
from pissa_cli.base.tensor_names import names_on_disk
from pissa_cli.base.weights import Weights, open_weights
from pissa_cli.errors import UsageError, listed
from pissa_cli.schema.recipe import Recipe


def require_order(folder: Path, recipe: Recipe) -> None:
    """UsageError for a base with a head of these very classes in another order. GLUE's numbers have theirs."""
    theirs, ours = _named(folder), recipe.model.labels
    folded, own = ([name.lower() for name in names] for names in (theirs, ours))
    if recipe.data.glue is None and folded != own and sorted(folded) == sorted(own):
        order = ", ".join(ours[own.index(name)] for name in folded)
        raise UsageError(
            f"model.labels: {folder} has a head of these classes in another order",
            f"write its order: model.labels: [{order}]; where rows hold numbers, these count in it",
        )


def require_pooler(folder: Path, model: PreTrainedModel, weights: Weights) -> None:
    """UsageError for a classifier with a pooler in its backbone over files without one, as those of a model that fills
    gaps are."""
    pooler = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.pooler.")]
    disk_name = names_on_disk(model, weights)
    if pooler and not any(disk_name(name, required=False) for name in pooler):
        raise UsageError(
            f"{folder}: no pooler in its files, by which {type(model).__name__} sees a text as one",
            "make a base with a new one, transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)"
            ".save_pretrained(NEW, save_original_format=False), and copy the tokenizer's files into NEW",
        )


def head_note(folder: Path, recipe: Recipe) -> str:
    """Where the head comes from, for the person watching."""
    model, shapes = skeleton(folder, recipe.model), open_weights(folder).shapes
    head = {name: tuple(p.shape) for name, p in model.named_parameters() if in_head(name, model)}
    if any(shapes.get(name) != shape for name, shape in head.items()):
        return "the head is new, from the seed"
    theirs, ours = _named(folder), recipe.model.labels
    if theirs and theirs != ours:
        return f"the head is the base's, whose classes are {listed(theirs)}; these are {listed(ours)}"
    return "the head is the base's"


def _named(folder: Path) -> list[str]:
    """The classes of a base that is a classifier and names them."""
    labels: list[str] = task_of(read_settings(folder)).get("labels", [])
    return [] if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels
