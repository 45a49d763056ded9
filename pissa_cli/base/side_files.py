"""What lies beside the weights of a model folder: configuration, tokenizer, licence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pissa_cli.base.configuration import read_config
from pissa_cli.base.integrity import VOCABULARIES, read_settings
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.model import DTYPES, LICENCES, Linear, head_names, skeleton
from pissa_cli.base.weights import open_weights
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json, write_json, write_text
from pissa_cli.matrices import quant
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.yamlfile import shown

TOKENIZER_CONFIG = "tokenizer_config.json"
"""Where llama.cpp, Ollama and TGI look for the chat template before, or instead of, chat_template.jinja."""
SPECIAL_TOKENS = "special_tokens_map.json"
"""Goes before that, in what older versions of transformers wrote."""
MORE_TEMPLATES = "additional_chat_templates"


def write_nf4_config(source: Path, target: Path, recipe: Recipe, linears: list[Linear]) -> None:
    """As `write_4bit_config`, for NF4."""
    packed = {layer.name for layer in linears if layer.packable}
    compute_dtype = str(DTYPES[recipe.precision]).removeprefix("torch.")
    config = partial(quant.config, recipe.model.double_quant, compute_dtype)
    write_4bit_config(source, target, recipe, packed, config)


def write_4bit_config(
    source: Path, target: Path, recipe: Recipe, packed: set[str], config: Callable[[list[str]], dict[str, Any]]
) -> None:
    """The side files of `source` beside the weights in `target`, and a config.json that says how these are stored.

    packed: names of the layers in 4 bits. config: (modules that are not) -> `quantization_config`.
    """
    copy_side_files(source, target, recipe)
    model = skeleton(source, recipe.model)
    content = read_settings(source) | task_settings(model)
    content["quantization_config"] = config(_dense_modules(model, target, packed))
    write_json(target / "config.json", content)


def _dense_modules(model: PreTrainedModel, folder: Path, packed: set[str]) -> list[str]:
    """The modules that readers may take for linear layers and that are not `packed` in `folder`: the model's own, and
    all with a matrix in the files. A router is a layer of its own kind here, for transformers 4 and vLLM a linear one.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    weights = open_weights(folder)
    matrices = [name for name, shape in weights.shapes.items() if name.endswith(".weight") and len(shape) == 2]
    dense = [name.removesuffix(".weight") for name in matrices if not weights.is_packed(name)]
    return list(dict.fromkeys([name for name in linear if name not in packed] + dense))


def task_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json has to say of a classifier beside what its backbone's says; nothing of a language model."""
    if not head_names(model):
        return {}
    keys = ("id2label", "label2id", "problem_type", "pad_token_id")
    return {"architectures": [type(model).__name__]} | {key: getattr(model.config, key) for key in keys}


def task_of(settings: dict[str, Any]) -> dict[str, Any]:
    """`task` and `labels` of a recipe's model from a config.json; nothing for a language model."""
    names = settings.get("architectures")
    if not isinstance(names, list) or not names or not str(names[0]).endswith("ForSequenceClassification"):
        return {}
    labels = settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        return {"task": "sequence-classification", "labels": [str(labels[key]) for key in sorted(labels, key=int)]}
    except (TypeError, ValueError):
        raise UsageError(
            f"config.json: id2label is {shown(labels)}, not a name for each number", "download the model again"
        ) from None


def keep_problem_type(source: Path, target: Path) -> None:
    """Have the classifier in `target` stay what that in `source` is: maybe one of several labels a text."""
    if task_of(settings := read_settings(source)):
        write_json(target / "config.json", read_settings(target) | {"problem_type": settings.get("problem_type")})


def copy_side_files(source: Path, target: Path, recipe: Recipe) -> None:
    """Copy what is not weights: configuration, tokenizer, licence, and the chat template, or the recipe's own."""
    _copy(source, target, recipe, ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", *LICENCES))


def copy_tokenizer(source: Path, target: Path, recipe: Recipe) -> None:
    """Copy the tokenizer's files, and the chat template, or the recipe's own."""
    names = ("tokenizer*", SPECIAL_TOKENS, "added_tokens.json", "chat_template*", "*.model", "*.tiktoken")
    _copy(source, target, recipe, (*VOCABULARIES, *names))


def _copy(source: Path, target: Path, recipe: Recipe, patterns: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = any(path.match(pattern) for pattern in patterns)
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if recipe.model.task == "sequence-classification":
        _write_padding(source, target, recipe)
    template = recipe.data.chat_template
    if template is not None:
        write_text(target / "chat_template.jinja", template)
        (target / "chat_template.json").unlink(missing_ok=True)
        settings = target / TOKENIZER_CONFIG
        if settings.is_file():
            write_json(settings, read_json(settings) | {"chat_template": template})
    elif (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)


def _write_padding(source: Path, target: Path, recipe: Recipe) -> None:
    """Have the tokenizer pad with what the model takes for padding: one that pools the last token looks before that.
    Not with a token that texts have, which would split them otherwise then."""
    if not any((source / name).is_file() for name in (*VOCABULARIES, TOKENIZER_CONFIG)):
        return
    pad, tokenizer = read_config(source, recipe.model).pad_token_id, load_tokenizer(source, recipe)
    if pad in (None, tokenizer.pad_token_id) or pad not in tokenizer.added_tokens_decoder:
        return
    for path in (target / TOKENIZER_CONFIG, target / SPECIAL_TOKENS):
        settings = read_json(path) if path.is_file() else {}
        if path.name == TOKENIZER_CONFIG or "pad_token" in settings:
            write_json(path, settings | {"pad_token": tokenizer.convert_ids_to_tokens(pad)})
