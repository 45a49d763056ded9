"""Find a base model, its linear layers and their tensors on disk; `loading` loads it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.lowrank import LINEAR_SUBCLASSES
from pissa_cli.base.bypassed import casts_to, is_bypassed
from pissa_cli.base.configuration import context_of, read_config
from pissa_cli.base.experts import Expert, expert_layers
from pissa_cli.base.folder import local_base, require_model_folder
from pissa_cli.base.tensor_names import DiskName, names_on_disk
from pissa_cli.base.weights import Weights
from pissa_cli.errors import UsageError, first_line, in_one_line
from pissa_cli.matrices import quant
from pissa_cli.schema.recipe import ModelSection, Recipe
from pissa_cli.schema.recipe_file import names_in, shipped

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
"""By `model.task`."""
UNREAD = "weight"
"""Of a layer with this in its name transformers 5.17 does not find the NF4 scales (newer versions: at its end)."""
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that go where a model goes."""
SMALL_FILES = ["*.json", "*.py"]
HUB_FILES = [*SMALL_FILES, "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", *LICENCES]


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model.

    name: of the module; tensor: of its weight on disk. num_out, num_in: the weight is (out, in), on disk (in, out) if
    `transposed`, as GPT-2's Conv1D and embeddings are. embedding: the linear map of one-hot vectors, out = its width,
    in = the size of the vocabulary. bypassed: see `is_bypassed`. dense: transformers never stores it in NF4, cannot
    read it back, or `casts_to` its dtype. textless: in a part of the model that takes no text, as pictures' towers do.
    expert: the matrix of an expert that it is, if it is one.
    """

    name: str
    tensor: str
    num_out: int
    num_in: int
    transposed: bool
    embedding: bool = False
    bypassed: bool = False
    dense: bool = False
    textless: bool = False
    expert: Expert | None = None

    @property
    def packable(self) -> bool:
        """Whether it can be stored in NF4."""
        return not (self.embedding or self.bypassed or self.dense) and self.num_out > 1 and quant.packable(self.num_in)

    @property
    def kind(self) -> str:
        """The last part of the name, e.g. q_proj."""
        return self.name.rsplit(".", 1)[-1]


def resolve_base(section: ModelSection, files: list[str] = HUB_FILES) -> Path:
    """The folder of the base model; one on the Hub is downloaded (as far as `files` match) to the shared cache.

    Raises UsageError as `local_base`, and for a model that cannot be reached.
    """
    if (folder := local_base(section)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    unwanted = ["consolidated*", "adapter_*", "*/*"]
    try:
        found = snapshot_download(
            section.name, revision=section.revision, allow_patterns=files, ignore_patterns=unwanted
        )
    except Exception as error:  # the network and the Hub raise many kinds
        near = difflib.get_close_matches(section.name, names_in(shipped("configs") / "model"), n=1)
        alias = f"; there is the alias {near[0]}" if near else ""
        raise UsageError(
            f"{section.name}: cannot get this model from the Hub ({type(error).__name__}: {first_line(error)})",
            f"check the id and the network, or give a local folder: --model path/to/folder{alias}",
        ) from None
    return require_model_folder(Path(found))


def dense_dtype(recipe: Recipe) -> torch.dtype:
    """Of the weights of a loaded model; of what is dense beside NF4 that of the products."""
    return {16: torch.bfloat16, 32: torch.float32, 4: DTYPES[recipe.precision]}[recipe.model.bits]


def skeleton(folder: Path, section: ModelSection) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights."""
    config = read_config(folder, section)
    if section.task == "causal-lm" and getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{folder}: a model of an encoder and a decoder ({config.model_type}), which are not trained to write here",
            "use a model that goes on with a text, as Llama's and GPT's kinds do",
        )
    if config.model_type == "reformer":
        raise UsageError(f"{folder}: a Reformer trains on whole chunks of tokens alone", "use another model")
    try:
        with torch.device("meta"):
            model = AUTO_CLASSES[section.task].from_config(config, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # as above
        reason = in_one_line(error).partition(" Model type should be")[0]  # one of hundreds
        raise UsageError(
            f"{folder}: transformers makes no {section.task} model of its config.json ({reason})",
            "set model.task to what the model can do, or use another model",
        ) from None
    return cast(PreTrainedModel, model)


def head_names(model: PreTrainedModel) -> list[str]:
    """The parts of a classifier beside its backbone, e.g. [pooler, classifier]; none of a causal language model."""
    if model.get_output_embeddings() is not None:
        return []
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    return [name for name in parts if name != model.base_model_prefix]


def in_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a module or parameter of this name is in one of `head_names`."""
    return name.split(".")[0] in head_names(model)


def shared_layers(model: PreTrainedModel) -> set[str]:
    """The names of linear layers that have one weight together, as in Zamba's blocks; the head has that of no layer."""
    linear = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    pairs = (set(pair) for pair in model.all_tied_weights_keys.items())
    return {name.removesuffix(".weight") for pair in pairs if pair <= linear for name in pair}


def linear_layers(model: PreTrainedModel, weights: Weights | None = None) -> list[Linear]:
    """Every linear layer and every embedding of a model, in its order; with `weights`, by their tensors on disk.

    Linear are torch's own Linear, transformers' Conv1D, LINEAR_SUBCLASSES and the matrices of experts; other subclasses
    may compute otherwise. Left out are the output head, a classifier's head, and layers that share one weight
    (`shared_layers`), which every adapter would move. Raises UsageError for a tensor that is missing, has another
    shape, or is no floating-point weight.
    """
    output, shared = model.get_output_embeddings(), shared_layers(model)
    towers = tuple(
        f"{name}."
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and "text" not in part.input_modalities
    )
    layers = []
    if weights is not None:
        disk_name = names_on_disk(model, weights)
        _require_numbers(model, weights, disk_name)
    for name, module in model.named_modules():
        embedding = type(module) is nn.Embedding
        transposed = embedding or isinstance(module, Conv1D)
        subclass = type(module).__name__ in LINEAR_SUBCLASSES
        linear = type(module) is nn.Linear or subclass or transposed
        if linear and module is not output and name not in shared and not in_head(name, model):
            shape: torch.Size = module.weight.shape
            num_in, num_out = shape if transposed else reversed(shape)
            tensor = f"{name}.weight"
            if weights is not None:
                if embedding and tensor in model.all_tied_weights_keys and not disk_name(tensor, required=False):
                    continue  # T5's encoder.embed_tokens: `shared` by another name
                tensor = disk_name(tensor)
                if not weights.is_packed(tensor) and weights.shapes[tensor] != tuple(shape):
                    raise UsageError(
                        f"{weights.files[tensor]}: {tensor} is {weights.shapes[tensor]}, config.json makes it "
                        f"{tuple(shape)}",
                        "the weights and config.json do not belong together; download the model again",
                    )
            parent, _, kind = name.rpartition(".")
            holder = model.get_submodule(parent)
            bypassed = not embedding and is_bypassed(holder, kind)
            dense = UNREAD in name or name.endswith(tuple(model._keep_in_fp32_modules or ())) or casts_to(holder, kind)
            facts = (transposed, embedding, bypassed, subclass or dense, name.startswith(towers))
            layers.append(Linear(name, tensor, num_out, num_in, *facts))
    for name, expert, shape in expert_layers(model):
        tensor = f"{name}.weight"
        if weights is not None:
            tensor = disk_name(tensor, required=False)
        if weights is None or weights.is_packed(tensor) or weights.shapes.get(tensor) == tuple(shape):
            layers.append(Linear(name, tensor, shape[0], shape[1], False, expert=expert))
    return layers


def _require_numbers(model: PreTrainedModel, weights: Weights, disk_name: DiskName) -> None:
    """UsageError for a parameter whose tensor is of a dtype that has to be decoded first, and is not NF4."""
    for parameter, _ in model.named_parameters():
        name = disk_name(parameter, required=False)
        dtype = weights.dtypes.get(name)
        if dtype not in (None, *WEIGHT_DTYPES) and not weights.is_packed(name):
            raise UsageError(
                f"{weights.files[name]}: {name} is {str(dtype).removeprefix('torch.')}",
                "weights have to be floating-point numbers of 16 or 32 bits: load it in transformers and save it so",
            )


def read_stored(weights: Weights, layer: Linear, device: torch.device) -> quant.Packed | Tensor:
    """The weight of a layer as it is on disk: NF4, or dense (transposed, where the layer is)."""
    parts = [name for name in quant.member_names(layer.tensor) if name in weights.files]
    if len(parts) == 1:
        return weights.read(layer.tensor).to(device)
    return quant.unpack(layer.tensor, {name: weights.read(name).to(device) for name in parts})


def read_weight(weights: Weights, layer: Linear, device: torch.device) -> tuple[Tensor, torch.dtype]:
    """W (out, in) of a layer in fp32, NF4 undone, and the dtype it has (dense) or reads back as (NF4)."""
    stored = read_stored(weights, layer, device)
    if isinstance(stored, quant.Packed):
        return quant.read(stored), stored.state.dtype
    W = stored.float()
    return (W.T if layer.transposed else W), stored.dtype


def match_targets(layers: list[Linear], targets: str | list[str]) -> list[Linear]:
    """The layers that `adapter.targets` names: all linear ones, or those whose name is or ends in one of the list.

    A vector, as the gate of a shared expert, is not among all linear ones: a low rank cannot be below its own. Neither
    is what is bypassed; that is refused if it is named. What is textless is never chosen: it would train nothing.

    Raises UsageError, listing the kinds of linear layers there are, for an entry that matches none.
    """
    layers = [layer for layer in layers if not layer.textless]
    linears = [layer for layer in layers if not layer.embedding and min(layer.num_out, layer.num_in) > 1]
    if targets == "all-linear" and linears:
        return [layer for layer in linears if not layer.bypassed]
    if not linears:
        raise UsageError(
            "adapter.targets: this model has no layer of torch's Linear or transformers' Conv1D",
            "it cannot get adapters; use --method full",
        )
    chosen: dict[str, Linear] = {}
    for target in targets:
        found = [layer for layer in layers if layer.name == target or layer.name.endswith(f".{target}")]
        if not found:
            kinds = ", ".join(sorted({layer.kind for layer in linears}))
            raise UsageError(
                f"adapter.targets: '{target}' matches no linear layer", f"ends of names, no patterns: {kinds}"
            )
        chosen |= {layer.name: layer for layer in found}
    bypassed = next((layer.name for layer in chosen.values() if layer.bypassed), None)
    if bypassed is not None:
        raise UsageError(
            f"adapter.targets: {bypassed} would train nothing: the model takes its weight past an adapter",
            "leave it out",
        )
    return [layer for layer in layers if layer.name in chosen]


def num_parameters(model: nn.Module) -> int:
    """All parameters, counting an NF4 weight by the numbers it stands for."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def context_length(folder: Path, section: ModelSection) -> int | None:
    """Tokens the model can see, where its configuration says. RoBERTa counts positions from its padding's number on."""
    length = context_of(read_config(folder, section))
    if length is not None and section.task == "sequence-classification":
        for name, module in skeleton(folder, section).named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return length - int(module.padding_idx) - 1
    return length


def kept_dense(layers: list[Linear], takes: Callable[[Linear], bool], block: int) -> dict[str, str]:
    """The linear layers that a store in 4 bits, with a scale for each `block` numbers, does not take: why, by name."""
    rows, other = f"rows of no whole blocks of {block}", "read otherwise by the model"
    return {
        layer.name: "one output, as of gates" if layer.num_out == 1 else rows if layer.num_in % block else other
        for layer in layers
        if not (layer.embedding or takes(layer))
    }


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
