"""Load a base model, dense or NF4, and its tokenizer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.adapters.lowrank import multiply_in_fp32
from pissa_cli.base.configuration import no_panic, read_config
from pissa_cli.base.experts import Expert, one_by_one, set_part, without_expert_weights
from pissa_cli.base.model import (
    AUTO_CLASSES,
    DTYPES,
    best_device,
    dense_dtype,
    head_names,
    in_head,
    linear_layers,
    read_stored,
    skeleton,
)
from pissa_cli.base.weights import Weights, open_weights
from pissa_cli.errors import UsageError, in_one_line
from pissa_cli.matrices import quant
from pissa_cli.matrices.products import widens
from pissa_cli.matrices.svd import generator
from pissa_cli.schema.recipe import ModelSection, Recipe


def load_model(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """The base with its weights on the CPU: dense in the dtype of `model.bits`, or NF4 from a run's `base/`.

    What NF4 leaves dense (embeddings, norms, head) gets the dtype of the products. The head of a classifier that is not
    in the files starts from the recipe's seed; that of a regression is in fp32.
    """
    gc.collect()  # a model before this one: its layers may hold themselves (`multiply_in_fp32`, bitsandbytes')
    section, dtype, products = recipe.model, dense_dtype(recipe), DTYPES[recipe.precision]
    experts = _packed_experts(folder, section) if section.bits == 4 else {}
    kind = AUTO_CLASSES[section.task]
    if experts:
        kind = without_expert_weights(type(skeleton(folder, section)))
    try:
        model, loading = kind.from_pretrained(
            folder,
            config=read_config(folder, section),
            dtype=dtype,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers' readers raise what they like
        unread = "check that the folder is whole and that this version of transformers knows the model"
        raise UsageError(
            f"{folder}: transformers cannot load this model ({in_one_line(error)})",
            "install what it asks for" if isinstance(error, ImportError) else unread,
        ) from None
    _new_head(model, _to_make_anew(folder, model, loading), recipe.seed)  # of a classifier with other classes as well
    for expert, module in experts.items():
        set_part(model, expert, module)
    if section.bits == 4:  # transformers leaves the dense weights of a bitsandbytes checkpoint in the dtype on disk
        strict = model._keep_in_fp32_modules_strict
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(part in name for part in strict):
                parameter.data = parameter.data.to(dtype)
    quant.set_compute_dtype(model, products)
    if best_device().type == "cpu":
        multiply_in_fp32(model, products)
        if widens(dtype, model.device):
            one_by_one(model)
    if section.task == "sequence-classification" and len(section.labels) == 1:
        _make_exact(model, folder)
    return cast(PreTrainedModel, model)


def require_tensors(model: PreTrainedModel, weights: Weights) -> list[str]:
    """UsageError for tensors that a dense model lacks, which transformers finds as it loads it without content. Returns
    those that it leaves unread, but for the heads of other tasks. model: its skeleton."""
    empty = {
        name: torch.empty(shape, dtype=weights.dtypes[name], device="meta") for name, shape in weights.shapes.items()
    }
    try:
        _, loading = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception:  # `load_model` says what is wrong where it comes from the files
        return []
    _to_make_anew(weights.folder, model, loading)
    own = f"{model.base_model_prefix}." if head_names(model) else ""
    return sorted(name for name in loading["unexpected_keys"] if name.startswith(own))


def _to_make_anew(folder: Path, model: PreTrainedModel, loading: dict[str, Any]) -> list[str]:
    """The parameters of a classifier's head that are to be made anew, by what transformers says of its loading.
    UsageError for others that the files lack."""
    unlike = {name if isinstance(name, str) else name[0] for name in loading["mismatched_keys"]}
    absent = sorted({*loading["missing_keys"], *unlike})
    missing = [name for name in absent if not in_head(name, model)]
    if missing:
        shown = [f"{name}, of another shape" if name in unlike else name for name in missing[:3]]
        names = ", ".join(shown) + (", ..." if len(missing) > 3 else "")
        raise UsageError(
            f"{folder}: {len(missing)} tensors of the model are not in its files ({names})",
            "the checkpoint is incomplete, or config.json is another model's: download it again",
        )
    return [name for name in absent if name not in missing]


@torch.no_grad()
def _make_exact(model: PreTrainedModel, folder: Path) -> None:
    """Have the head of a regression hold the values on disk, and compute, in fp32: in bf16 2000 is followed by 2008."""
    stored = open_weights(folder)
    for part in head_names(model):
        for inside, module in model.get_submodule(part).named_modules(prefix=part):
            for key, parameter in module.named_parameters(recurse=False):
                parameter.data, name = parameter.float(), f"{inside}.{key}"
                if stored.shapes.get(name) == tuple(parameter.shape):
                    parameter.copy_(stored.read(name))
                module.forward = partial(_in_fp32, type(module).forward, module)


def _in_fp32(forward: Callable[..., Tensor], module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return forward(module, x.float())


@torch.no_grad()
def _new_head(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Start parameters of a classifier's head as transformers does, but from the seed and the name: matrices normal
    with the configuration's `initializer_range`, biases zero, scales of norms one."""
    std = getattr(model.config, "initializer_range", None) or 0.02
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator(seed, name)) * std
        else:
            values = torch.full(parameter.shape, float(name.endswith("weight")))
        parameter.copy_(values)


def _packed_experts(folder: Path, section: ModelSection) -> dict[Expert, nn.Module]:
    """A linear layer for every matrix of every expert, where any of them is in NF4; else none."""
    weights = open_weights(folder)
    if not any(".experts." in name and name.endswith(".absmax") for name in weights.files):
        return {}
    modules: dict[Expert, nn.Module] = {}
    for layer in linear_layers(skeleton(folder, section), weights):
        if layer.expert is None:
            continue
        stored = read_stored(weights, layer, torch.device("cpu"))
        if isinstance(stored, quant.Packed):
            modules[layer.expert] = quant.linear(stored)
            continue
        modules[layer.expert] = nn.Linear(layer.num_in, layer.num_out, bias=False, device="meta")
        modules[layer.expert].weight = nn.Parameter(stored, requires_grad=False)
    return modules


def load_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the base, padding on the right, with the chat template of the recipe if that gives one."""
    section = recipe.model
    try:
        with no_panic(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
            tokenizer("A text, ein Wörtchen and 12.")
    except UsageError:
        raise
    except Exception as error:  # transformers' and tokenizers' readers raise what they like
        hint = "the folder needs the tokenizer's files, e.g. tokenizer.json and tokenizer_config.json"
        if any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file():
            hint = "it has a sentencepiece model alone: pip install 'pissa[sentencepiece]'"
        raise UsageError(f"{folder}: no usable tokenizer ({in_one_line(error)})", hint) from None
    if tokenizer.eos_token_id is None and section.task == "causal-lm":
        raise UsageError(
            f"{folder}: the tokenizer has no end-of-text token (eos_token)",
            "name one in the model's tokenizer_config.json: eos_token",
        )
    tokenizer.chat_template = recipe.data.chat_template or tokenizer.chat_template
    return cast(PreTrainedTokenizerBase, tokenizer)
