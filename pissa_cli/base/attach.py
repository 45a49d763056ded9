"""Make a model train an adapter: low-rank layers around its linear ones, and modules that train whole."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.function import Gate
from pissa_cli.adapters.lowrank import LowRank, LowRankEmbedding, Siblings
from pissa_cli.adapters.start import Adapter, Method
from pissa_cli.base.experts import expert_layers, part_of, set_part
from pissa_cli.base.model import in_head
from pissa_cli.base.tensor_names import names_on_disk
from pissa_cli.base.weights import Weights
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.schema.recipe import Recipe

GATED = (
    "down_proj = self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x})); return down_proj",
    "return self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))",
)


def attach(model: PreTrainedModel, adapter: Adapter, method: Method, plain: bool, dropout: float = 0.0) -> None:
    """Put a low-rank layer around every layer that `adapter` names.

    For a method that moves the base and a `plain` base, the weights become the residuals W - s B A of these (initial)
    factors; those of `base/` are residuals already. Frozen parameters stop requiring gradients.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    experts = {name: expert for name, expert, _ in expert_layers(model)}
    for name, layer_factors in adapter.factors.items():
        expert = experts.get(name)
        base = modules.get(name) if expert is None else part_of(model, expert)
        if base is None:
            raise UsageError(
                f"the adapter has a layer {name} that the model lacks",
                "that is not its base model: name that one, --set model.name=FOLDER",
            )
        if isinstance(base, LowRank):
            raise PissaError(f"{name} has an adapter already", "attach to a model that was loaded anew")
        if method.moves_base and plain:
            subtract(base, adapter, name)
        device = cast(Tensor, base.weight).device
        here = {key: factor.to(device) for key, factor in layer_factors.items()}
        kind = LowRankEmbedding if isinstance(base, nn.Embedding) else LowRank
        layer = kind(base, here, method.trains, adapter.scales[name], dropout, adapter.projections)
        layer.name = name
        parent, _, child = name.rpartition(".")
        if expert is None:
            setattr(modules[parent], child, layer)
        else:
            set_part(model, expert, layer)


def compute_together(model: nn.Module, recipe: Recipe, forward: Callable[[], Any]) -> None:
    """`share_inputs`, and `join_gates`: not under checkpointing and the compiler, which have ways of their own, nor
    under autocast, where the dtype of an activation depends on its operations."""
    share_inputs(model, forward)
    if not (recipe.train.gradient_checkpointing or recipe.train.torch_compile or recipe.autocasts):
        join_gates(model)


@torch.no_grad()
def share_inputs(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Have low-rank layers that get one and the same x computed together, as q, k and v are (`Siblings`).

    A group are layers of one module that get the very same tensor, one right after the other. `forward` shows which
    these are: it calls the model, and its last call counts. Where that calls a layer twice, its group is left alone.
    """
    groups: list[list[LowRank]] = []
    last: list[Tensor] = []
    calls: Counter[LowRank] = Counter()

    def begin(*_: Any) -> None:
        groups.clear()
        last.clear()
        calls.clear()

    def see(layer: LowRank, given: tuple[Tensor, ...]) -> None:
        same = bool(last and given) and last[0] is given[0]
        if not same or _parent(groups[-1][0]) != _parent(layer):
            groups.append([])
        groups[-1].append(layer)
        last[:] = given[:1]
        calls[layer] += 1

    layers = [m for m in model.modules() if type(m) is LowRank and not m.dropout]
    hooks = [model.register_forward_pre_hook(begin), *(layer.register_forward_pre_hook(see) for layer in layers)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    for group in groups:
        if len(group) > 1 and all(calls[layer] == 1 for layer in group):
            together = Siblings(group)
            for layer in group:
                layer.siblings = together


def _parent(layer: LowRank) -> str:
    return layer.name.rpartition(".")[0]


def join_gates(model: nn.Module) -> None:
    """In MLPs that compute down(act(gate(x)) * up(x)), have `down` form that product itself (`Gate`).

    For the backward pass gate(x) and up(x) are kept then, and neither the activation nor the product. This is for MLPs
    whose `forward` says what GATED does and no more, and whose `down` is a low-rank layer without dropout.
    """
    for module in model.modules():
        down, activation = getattr(module, "down_proj", None), getattr(module, "act_fn", None)
        fitting = type(down) is LowRank and not down.dropout and "forward" not in vars(module)
        plain = isinstance(activation, nn.Module) and not list(activation.parameters())
        if fitting and plain and _is_gated(type(module).forward):
            module.forward = partial(_gated, module)


def _gated(mlp: nn.Module, *given: Tensor, **named: Tensor) -> Tensor:
    (x,) = (*given, *named.values())
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)  # type: ignore[operator]
    y: Tensor = mlp.down_proj(up, Gate(mlp.act_fn, gate))  # type: ignore[operator, arg-type]
    return y


@cache
def _is_gated(forward: Callable[..., Any]) -> bool:
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):  # no source
        return False
    if hasattr(forward, "__wrapped__") or not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    names = list(inspect.signature(forward).parameters.values())
    said = "; ".join(ast.unparse(statement) for statement in function.body)
    plain = len(names) == 2 and all(name.kind is name.POSITIONAL_OR_KEYWORD for name in names)
    return plain and said in [way.format(x=names[1].name) for way in GATED]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have blocks run again in the backward pass instead of saving what is in them (gradient checkpointing)."""
    renamed = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.24; the other name goes with 6
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in lowrank_layers(model).values():
        layer.keeps_weight = True


def forget_shared(model: nn.Module) -> None:
    """Drop what layers of one x have computed and nobody asked for: after a forward pass that failed midway."""
    for module in model.modules():
        if isinstance(module, LowRank) and module.siblings is not None:
            module.siblings.clear()


@torch.no_grad()
def subtract(base: nn.Module, adapter: Adapter, name: str) -> None:
    """W <- W - s B A, computed in fp32 and rounded once."""
    weight = cast(nn.Parameter, base.weight)
    W = weight.T if isinstance(base, Conv1D) else weight
    A, B = adapter.pair(name, W.shape, W.device)
    W.copy_(torch.addmm(W.float(), B, A, alpha=-1))


def whole_modules(model: PreTrainedModel, names: list[str]) -> dict[str, nn.Module]:
    """What trains whole beside an adapter: the modules with parameters that `adapter.modules_to_save` names, a tied
    head with its embedding and vice versa, and the head of a classifier.

    Raises UsageError, listing what there is, for a name that matches none.
    """
    own = {name: m for name, m in model.named_modules() if name and any(True for _ in m.parameters(recurse=False))}
    chosen = {name: module for name, module in own.items() if in_head(name, model)}
    for wanted in names:
        found = {name: m for name, m in own.items() if name == wanted or name.endswith(f".{wanted}")}
        if not found:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in own}))
            raise UsageError(f"adapter.modules_to_save: '{wanted}' matches no module", f"this model has: {kinds}")
        chosen |= found
    weights = {id(p) for m in chosen.values() for p in m.parameters(recurse=False)}
    return {name: m for name, m in own.items() if any(id(p) in weights for p in m.parameters(recurse=False))}


def train_whole(model: PreTrainedModel, names: list[str], weights: Weights) -> None:
    """Make modules train in fp32, from the values on disk; they compute and give their output in the dtype they had.

    A classifier's head that is not on disk, or has other classes there, keeps the values it has.
    """
    chosen, disk_name = make_trainable(model, names), names_on_disk(model, weights)
    own = {f"{name}.{key}" for name, module in chosen.items() for key, _ in module.named_parameters(recurse=False)}
    for name in own & {name for name, _ in model.named_parameters()}:  # of tied ones, the first
        parameter = model.get_parameter(name)
        if weights.shapes.get(name) == tuple(parameter.shape) or not in_head(name, model):
            parameter.data.copy_(weights.read(disk_name(name)))


def make_trainable(model: PreTrainedModel, names: list[str]) -> dict[str, nn.Module]:
    """Make modules train in fp32, from the values they have; they compute and give their output in the dtype they had.

    Returns them by name.
    """
    chosen = whole_modules(model, names)
    modules = list(chosen.values())
    dtypes = [next(module.parameters()).dtype for module in modules]  # a tied parameter changes with the first
    for module, dtype in zip(modules, dtypes, strict=True):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()  # as module.float() does it, which fails over tensors without content
        module.requires_grad_(True)
        if dtype != torch.float32:
            module.forward = partial(_compute_in, dtype, module.forward)
    return chosen


def _compute_in(dtype: torch.dtype, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(x.device.type, dtype):
        output = forward(x, *args, **kwargs)
    if isinstance(output, tuple):  # a router's
        return tuple(part.to(dtype) if part.is_floating_point() else part for part in output)
    return output.to(dtype)


@torch.no_grad()
def restore_whole(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Put trained parameters of `modules_to_save` into a model. UsageError for one that it lacks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in saved.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UsageError(
                f"the adapter has a parameter {name} that the model lacks",
                "that is not its base model: name that one, --set model.name=FOLDER",
            )
        parameters[name].copy_(tensor)


def lowrank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The low-rank layers by the name of the linear layer they stand for."""
    return {module.name: module for module in model.modules() if isinstance(module, LowRank)}
