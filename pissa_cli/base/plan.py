"""What a recipe will do to which layers; reads headers and configuration, writes nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from pissa_cli.adapters.methods import METHODS
from pissa_cli.base.attach import whole_modules
from pissa_cli.base.experts import holders_of_3d_weights
from pissa_cli.base.heads import require_order, require_pooler
from pissa_cli.base.loading import require_tensors
from pissa_cli.base.model import Linear, head_names, in_head, linear_layers, match_targets, shared_layers, skeleton
from pissa_cli.base.peft_files import peft_targets
from pissa_cli.base.tensor_names import lost_in_peft
from pissa_cli.base.weights import Weights
from pissa_cli.errors import UsageError
from pissa_cli.matrices import quant
from pissa_cli.schema.adapter_options import AdapterBase, FullOptions, first_match
from pissa_cli.schema.recipe import Recipe

STACKED = ("DbrxExpertGLU",)
"""Modules that hold the matrices of their experts one below the other, in 2-D."""


@dataclass(frozen=True)
class Plan:
    """What is known of the base, and which of its layers get an adapter. Full fine-tuning has the first five alone.

    folder: the base on disk. linears: its linear layers. num_total: its parameters. vocabulary: rows of its output
    head, 0 without one. unused: tensors left unread. targets: the layers that get an adapter; ranks, scales: r and s
    of each, by name. left_out: what can get none (`_without_adapter`). peft_targets: see `peft_files.peft_targets`.
    heads: the parts of a classifier's head. num_whole: numbers that train beside the adapter. lost_in_peft: targets
    that stock PEFT does not find in the adapter's files.
    """

    folder: Path
    linears: list[Linear]
    num_total: int
    vocabulary: int
    unused: list[str]
    targets: list[Linear] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    peft_targets: dict[str, list[str]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    num_whole: int = 0
    lost_in_peft: list[str] = field(default_factory=list)

    @property
    def widest(self) -> list[int]:
        """[out, in], each the largest over the targets."""
        return [max(layer.num_out for layer in self.targets), max(layer.num_in for layer in self.targets)]

    def num_trainable(self, recipe: Recipe) -> int:
        """Numbers that train."""
        if isinstance(recipe.adapter, FullOptions):
            return self.num_total
        trains = METHODS[recipe.adapter.method].trains
        return self.num_whole + sum(
            math.prod(shape)
            for shapes in self.factor_shapes().values()
            for key, shape in shapes.items()
            if key in trains
        )

    def num_lora(self, rank: int) -> int:
        """Numbers that LoRA of this rank would train in the same layers."""
        return sum(rank * (layer.num_out + layer.num_in) for layer in self.targets)

    def factor_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of every target, the shapes that A, B, d and b have where there are such."""
        shapes = {}
        for layer in self.targets:
            r = self.ranks[layer.name]
            shapes[layer.name] = {"A": (r, layer.num_in), "B": (layer.num_out, r), "d": (r,), "b": (layer.num_out,)}
        return shapes


def make_plan(recipe: Recipe, folder: Path, weights: Weights | None = None) -> Plan:
    """Check the base, its targets and the rank; without `weights`, from the configuration alone.

    Raises UsageError; writes nothing.
    """
    model = skeleton(folder, recipe.model)
    _require_trainable(model, recipe, folder)
    if recipe.data.classifies:
        require_order(folder, recipe)
        if weights is not None:
            require_pooler(folder, model, weights)
    linears = linear_layers(model, weights)
    unused = [] if weights is None else require_tensors(model, weights)
    if recipe.model.bits == 4:
        require_same_layout(model, "set model.bits to 16")
        require_packable(linears, "set model.bits to 16")
    adapter = recipe.adapter
    head = model.get_output_embeddings()
    num_total = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = head.weight.shape[0] if head is not None else 0
    if isinstance(adapter, FullOptions):
        return Plan(folder, linears, num_total, vocabulary, unused)
    method = METHODS[adapter.method]
    targets = match_targets([layer for layer in linears if method.experts or layer.expert is None], adapter.targets)
    _require_embeddings(model, adapter, [layer for layer in targets if layer.embedding])
    ranks = _ranks(adapter, targets)
    _require_one_matrix(targets, adapter, ranks)
    if (budget := getattr(adapter, "max_parameters", None)) is not None:
        ranks = _even_ranks(budget, targets)
    scales = {name: adapter.layer_scale(name, rank) for name, rank in ranks.items()}
    whole = whole_modules(model, adapter.modules_to_save)
    _require_apart(whole, targets, linears, recipe.model.bits)
    trained = {id(p): p.numel() for module in whole.values() for p in module.parameters(recurse=False)}
    adaptable = {layer.expert.module for layer in linears if method.experts and layer.expert is not None}
    modules = [layer.name for layer in targets if layer.expert is None and method.peft_type != "VERA"]
    return Plan(
        folder,
        linears,
        num_total,
        vocabulary,
        unused,
        targets=targets,
        ranks=ranks,
        scales=scales,
        left_out=sorted(_without_adapter(model, linears) - adaptable),
        peft_targets=peft_targets(ranks, linears, model, method.peft_type),
        heads=head_names(model),
        num_whole=sum(trained.values()),
        lost_in_peft=lost_in_peft(model, modules),
    )


def _without_adapter(model: PreTrainedModel, linears: list[Linear]) -> set[str]:
    """The names of what holds matrices and gets no adapter, or one for each expert; routers and heads do not count."""
    known, output = {layer.name for layer in linears}, model.get_output_embeddings()
    others = {layer.name for layer in linears if layer.bypassed or layer.textless}
    for name, module in model.named_modules():
        otherwise = isinstance(module, nn.Linear) and module is not output  # torch's own are known, or share a weight
        otherwise |= isinstance(module, nn.Conv1d) and module.kernel_size == (1,)  # SqueezeBERT's
        if (otherwise or type(module).__name__ in STACKED) and name not in known and not in_head(name, model):
            others.add(name)
    others = {name for name in others if "router" not in name.split(".")}  # Llama 4's, PhiMoE's and LongCat's
    return holders_of_3d_weights(model) | shared_layers(model) | others


def _require_trainable(model: PreTrainedModel, recipe: Recipe, folder: Path) -> None:
    """UsageError for a base that is quantized already, or cannot be trained for the task, or as is asked for."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError(
            f"{folder}: this model is quantized already", "start from the dense model; model.bits: 4 quantizes"
        )
    gaps = any(str(name).endswith("ForMaskedLM") for name in model.config.architectures or [])
    if recipe.model.task == "causal-lm" and gaps and not getattr(model.config, "is_decoder", False):
        raise UsageError(
            f"{folder}: a model that fills gaps, whose tokens see those that follow, and none that writes",
            "train it with model.task: sequence-classification, or use a model that writes from left to right",
        )
    if recipe.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"train.gradient_checkpointing: transformers has none for {type(model).__name__}", "remove it")


def _require_apart(whole: Iterable[str], targets: list[Linear], linears: list[Linear], bits: int) -> None:
    """UsageError for modules that train whole and have an adapter as well, hold experts, or are stored in 4 bits."""
    twice = set(whole) & {layer.expert.module if layer.expert else layer.name for layer in targets}
    if twice:
        raise UsageError(
            f"adapter.modules_to_save: {min(twice)} has an adapter as well", "take it out of adapter.targets"
        )
    experts = {layer.expert.module for layer in linears if layer.expert} & set(whole)
    if experts:
        raise UsageError(
            f"adapter.modules_to_save: {min(experts)} holds experts, which train with adapters only",
            "name their layers in adapter.targets",
        )
    packed = {layer.name for layer in linears if layer.packable} & set(whole) if bits == 4 else set()
    if packed:
        raise UsageError(
            f"adapter.modules_to_save: {min(packed)} is stored in 4 bits and cannot train",
            "give it an adapter (adapter.targets), or set model.bits to 16",
        )


def require_same_layout(model: PreTrainedModel, hint: str) -> None:
    """UsageError for a model of which transformers makes another one for quantized weights."""
    for module in model.modules():
        if (kind := type(module).__name__) in MODULES_TO_PATCH_FOR_QUANTIZATION:
            raise UsageError(f"4 bits: transformers puts layers of another layout in the place of {kind}", hint)


def require_packable(linears: list[Linear], hint: str) -> None:
    """UsageError for a model of which 4 bits would leave every layer as it is."""
    if not any(layer.packable for layer in linears):
        raise UsageError(
            "4 bits: none of this model's layers can be stored in NF4, for their class or for rows that are no whole "
            f"blocks of {quant.BLOCK_SIZE}",
            hint,
        )


def _require_one_matrix(targets: list[Linear], adapter: AdapterBase, ranks: dict[str, int]) -> None:
    """UsageError for what PEFT's form of the experts cannot hold: gate without up, and scales that differ.

    Ranks that differ it cannot hold either, but refuses them itself.
    """
    experts = [(layer, layer.expert.part) for layer in targets if layer.expert is not None]
    parts = {part: layer.kind for layer, part in experts}
    for part, other in (("gate", "up"), ("up", "gate")):
        if part in parts and other not in parts:
            raise UsageError(
                f"adapter.targets: of the experts {parts[part]} is adapted and its twin is not; PEFT cannot hold that",
                "name both of gate and up, or neither",
            )
    for down in (False, True):
        names = [layer.name for layer, part in experts if (part == "down") == down]
        scales = {adapter.layer_scale(name, ranks[name]) for name in names}
        if len(scales) > 1 and len({ranks[name] for name in names}) == 1:
            raise UsageError(
                f"adapter.alpha_pattern: gives the experts' {'down' if down else 'gate and up'} more than one alpha, "
                "which PEFT cannot hold",
                "give all experts the same",
            )


def _require_embeddings(model: PreTrainedModel, adapter: AdapterBase, layers: list[Linear]) -> None:
    """UsageError for an embedding that this method cannot adapt, or that is the output head's weight as well."""
    for layer in layers:
        if not METHODS[adapter.method].embeddings:
            raise UsageError(
                f"adapter.targets: {layer.name} is an embedding, which method {adapter.method} does not adapt",
                "use method lora, or train it whole: adapter.modules_to_save",
            )
        head = model.get_output_embeddings()
        if head is not None and head.weight is model.get_submodule(layer.name).weight:
            raise UsageError(
                f"adapter.targets: {layer.name} is tied to the output head; merging would change both",
                "train it whole: adapter.modules_to_save",
            )


def _ranks(adapter: AdapterBase, targets: list[Linear]) -> dict[str, int]:
    """r of every target; UsageError for a rank no layer can have, and for a pattern that matches nothing."""
    limit = METHODS[adapter.method].rank_limit
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key, {}):
            if not any(first_match({pattern: True}, layer.name, False) for layer in targets):
                kinds = ", ".join(sorted({layer.kind for layer in targets}))
                raise UsageError(f"adapter.{key}: '{pattern}' matches no adapted layer", f"these are adapted: {kinds}")
    ranks = {}
    for layer in targets:
        rank, smallest = adapter.layer_rank(layer.name), min(layer.num_out, layer.num_in)
        if limit == "error" and rank > smallest:
            raise _above(rank, layer, adapter, targets)
        ranks[layer.name] = min(rank, smallest) if limit == "lowered" else rank
    return ranks


def _even_ranks(budget: int, targets: list[Linear]) -> dict[str, int]:
    """Until init chooses them: ranks that spend `adapter.max_parameters`, the same in all layers that are large enough
    but for one more in some. UsageError for a budget below rank 1 in every layer."""
    costs = {layer.name: layer.num_out + layer.num_in for layer in targets}
    most = {layer.name: min(layer.num_out, layer.num_in) for layer in targets}

    def spent(rank: int) -> int:
        return sum(min(rank, most[name]) * cost for name, cost in costs.items())

    if (least := spent(1)) > budget:
        raise UsageError(
            f"adapter.max_parameters: {budget:,} is less than rank 1 in every layer takes ({least:,})",
            "raise it, or name fewer layers in adapter.targets",
        )
    even = bisect_right(range(1, max(most.values()) + 1), budget, key=spent)
    ranks, left = {}, budget - spent(even)
    for name, cost in costs.items():
        more = even < most[name] and cost <= left
        ranks[name], left = min(even, most[name]) + more, left - more * cost
    return ranks


def _above(rank: int, layer: Linear, adapter: AdapterBase, targets: list[Linear]) -> UsageError:
    """For a rank that a layer cannot have, with those that the targets can."""
    where = f"{rank} is above the smallest dimension of {layer.name} ({layer.num_out} x {layer.num_in})"
    if rank != adapter.rank:
        least = min(layer.num_out, layer.num_in)
        return UsageError(f"adapter.rank_pattern: {where}", f"use at most {least}")
    most: dict[str, int] = {}
    for target in targets:
        most[target.kind] = min(target.num_out, target.num_in, most.get(target.kind, rank))
    pattern, least = ", ".join(f"{kind}: {r}" for kind, r in most.items() if r < rank), min(most.values())
    return UsageError(
        f"adapter.rank: {where}",
        f"lower it there alone, adapter.rank_pattern: {{{pattern}}}, or use at most {least}, which all "
        "targets take, or fewer targets (adapter.targets)",
    )
