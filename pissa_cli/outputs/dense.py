"""The weights of a result in whole, W + s B A in the dtype of the base, one by one and under the names of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.model import Linear, best_device, head_names, in_head, linear_layers, read_weight
from pissa_cli.base.tensor_names import names_on_disk
from pissa_cli.base.weights import Weights
from pissa_cli.errors import UsageError
from pissa_cli.matrices.panels import DROPPED, minus_product, rounded_at_random
from pissa_cli.matrices.pipeline import in_flight, in_order
from pissa_cli.matrices.svd import generator
from pissa_cli.schema.recipe import Recipe

T = TypeVar("T")


def dense_tensors(
    recipe: Recipe,
    model: PreTrainedModel,
    weights: Weights,
    adapter: Adapter,
    then: Callable[[str, Linear | None, Tensor], T],
) -> Iterator[T]:
    """then(name on disk, layer if it is linear, trained weight) of every weight of the base, in the order of its files.

    The trained weight is W + s B A, or what trained whole, in the dtype on disk and with 4-bit storage undone; what did
    not train comes as it is. model: the skeleton of the base. In 16 bits what was trained is rounded at random, by the
    seed: rounding to the nearest would lose most of a small change. The head of a classifier is in fp32, and comes last
    if the base has none. Several threads call `then`. Raises UsageError for the adapter of another base.
    """
    layers = linear_layers(model, weights)
    linears, device = {layer.tensor: layer for layer in layers}, best_device()
    missing = set(adapter.factors) - {layer.name for layer in layers}
    if missing:
        raise UsageError(
            f"the adapter has a layer {min(missing)} that {weights.folder} lacks",
            "that is not its base model: name that one, --set model.name=FOLDER",
        )
    whole = dict(_on_disk(model, weights, adapter))

    def work(name: str) -> T:
        linear = linears.get(name)
        if name in whole:
            tied = min(other for other, tensor in whole.items() if torch.equal(tensor, whole[name]))
            dtype = torch.float32 if in_head(name, model) else weights.dtypes[name]
            return then(name, linear, rounded(recipe, tied, whole[name].float(), dtype))
        if linear is None or (not weights.is_packed(name) and linear.name not in adapter.factors):
            return then(name, linear, weights.read(name))
        W, dtype = read_weight(weights, linear, device)
        if linear.name in adapter.factors:
            A, B = adapter.pair(linear.name, W.shape, device)
            W = rounded(recipe, name, minus_product(W, B, A, -1.0), dtype)
        return then(name, linear, (W.T if linear.transposed else W).to(dtype).contiguous().cpu())

    names = [name for name in weights.files if name in whole or not any(owner in linears for owner in _owners(name))]
    worked_on = [layer for layer in layers if not layer.embedding or layer.name in adapter.factors]
    workers, ahead, each = in_flight(max(layer.num_out * layer.num_in for layer in worked_on), device)
    yield from in_order(work, names, workers, max(2, ahead), each)
    for name in sorted(whole.keys() - weights.files.keys()):
        yield then(name, None, whole[name].float())


def rounded(recipe: Recipe, name: str, W: Tensor, dtype: torch.dtype) -> Tensor:
    """W (any shape, fp32), the tensor of a name, rounded to another dtype as `dense_tensors` does."""
    return rounded_at_random(W, dtype, generator(recipe.seed, name)) if dtype in DROPPED else W.to(dtype)


def _on_disk(model: PreTrainedModel, weights: Weights, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of what trained whole. Of a tied parameter some files hold one name, some both."""
    first = {name for name, _ in model.named_parameters()}
    disk_name = names_on_disk(model, weights)
    for name, tensor in adapter.saved.items():
        if in_head(name, model):
            yield name, tensor
        elif on_disk := disk_name(name, required=False):
            yield on_disk, tensor
        elif name in first:
            raise UsageError(
                f"{weights.folder}: no tensor for {name}, which trained whole",
                "its files name it in a way of their own; please report it with the model",
            )


def _owners(name: str) -> Iterator[str]:
    """a.b.c -> a.b, a: the tensors that `name` may be a part of, as the scales of an NF4 weight are."""
    while name := name.rpartition(".")[0]:
        yield name


def written_name(model: PreTrainedModel, weights: Weights) -> Callable[[str], str]:
    """Under which name a tensor of `weights` is written. The files of a backbone alone (BERT's) may lack its prefix;
    beside a head they get it, as transformers 4 takes no mixture."""
    prefix = f"{model.base_model_prefix}."
    if not head_names(model) or any(name.startswith(prefix) for name in weights.files):
        return lambda name: name
    return lambda name: name if in_head(name, model) else f"{prefix}{name}"
