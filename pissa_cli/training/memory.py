"""The memory that training takes, forecast: one step over tensors without content, of which every block is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AttentionMaskInterface, PreTrainedModel

from pissa_cli.adapters.lowrank import multiply_in_fp32
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Adapter, Method, Projections
from pissa_cli.base.attach import attach, checkpoint_activations, compute_together, make_trainable
from pissa_cli.base.configuration import context_of
from pissa_cli.base.model import DTYPES, Linear, best_device, dense_dtype, num_parameters, skeleton
from pissa_cli.base.peft_files import TENSOR_NAMES
from pissa_cli.base.plan import Plan
from pissa_cli.errors import in_one_line
from pissa_cli.heap import KERNELS
from pissa_cli.matrices import quant
from pissa_cli.matrices.products import has_amx, has_fast_bf16
from pissa_cli.process import peak_memory
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training.batches import row_length
from pissa_cli.training.kernels import wants_liger
from pissa_cli.training.ledger import Heap, Ledger, Operations
from pissa_cli.training.loss import autocast, loss_at, summed_loss
from pissa_cli.training.optim import Names, make_optimizer
from pissa_cli.training.packing import BY_SEQUENCE, attend_by_sequence, attend_in_fp32, takes_positions, without_mask
from pissa_cli.training.sharding import blocks_of

KINDS = ("weights", "factors", "gradients", "optimizer", "activations", "logits")
WORKSPACES = 3  # of cuBLAS and cuBLASLt, in the threads that run the forward and the backward pass
KERNEL, AMX_KERNEL = 900_000, 1_500_000  # bytes of one that oneDNN makes for products of bf16 numbers of one shape
PASSES = 2  # over a micro-batch on a CPU: what the first leaves behind makes the heap grow in the second


@dataclass(frozen=True)
class Forecast:
    """Bytes by what takes them, and their sum as `total`; why they are a guess, else None; cuda or cpu."""

    bytes: dict[str, int]
    rough: str | None
    device: str


def forecast(recipe: Recipe, plan: Plan, processes: int) -> Forecast:
    """The most memory that one of `processes` processes holds while it trains with micro-batches of full length: of the
    GPU where there is one, else of the process. A guess, which `rough` says, where the model cannot be run over tensors
    without content, is spread over the processes, or runs by Liger's kernels."""
    device, sharded = best_device(), recipe.train.shard and processes > 1
    if recipe.model.bits == 4:  # fills the caches of bitsandbytes with content
        quant.pack(quant.Store(4, torch.float32, double_quant=True), torch.zeros(1, quant.BLOCK_SIZE))
    libraries = peak_memory() + _kernels(recipe, device) if device.type == "cpu" else WORKSPACES * _workspace(device)
    heap = Heap() if device.type == "cpu" else None
    liger = "Liger's kernels are not counted" if wants_liger(recipe.train) else None
    rough = "the processes share the model" if sharded else liger
    try:
        found = _step(recipe, plan, processes, heap, device)
    except Exception as error:  # a model raises what it likes where it looks at the numbers
        found, rough = _rough(recipe, plan), f"the model cannot be run without content: {in_one_line(error)}"
    if heap is not None and not heap.works:
        rough = rough or "the heap of this system cannot be foreseen"
    if sharded:
        found |= _spread(recipe, plan, found, processes)
    found["libraries"] = libraries
    return Forecast(found | {"total": sum(found.values())}, rough, device.type)


def _workspace(device: torch.device) -> int:
    """What torch sets aside for a handle of cuBLAS (`CUBLAS_WORKSPACE_CONFIG` unset)."""
    return 2**25 if torch.cuda.get_device_capability(device) in ((9, 0), (10, 0)) else 2**23 + 2**17


def _kernels(recipe: Recipe, device: torch.device) -> int:
    """What oneDNN keeps of them: as many as it may, as rows of examples have many lengths."""
    kept = int(KERNELS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
    size = AMX_KERNEL if has_amx() else KERNEL
    return kept * size if recipe.precision == "bf16" and has_fast_bf16(device) else 0


def _spread(recipe: Recipe, plan: Plan, found: dict[str, int], processes: int) -> dict[str, int]:
    """The entries of `found` that change if the processes share the model. Each has its share of all that lasts. In
    whole it has what is in no block, and two blocks, the one that computes and the next, with their gradients, and all
    of that once more as it is sent (`gathered`). While it is loaded, the model is whole (`loading`)."""
    blocks = [num_parameters(block) for block in blocks_of(skeleton(plan.folder, recipe.model))]
    alone = (plan.num_total - sum(blocks) + 2 * max(blocks, default=0)) / plan.num_total
    changed = {kind: found[kind] // processes for kind in ("weights", "factors", "gradients", "optimizer")}
    changed["gathered"] = int(2 * alone * sum(found[kind] for kind in ("weights", "factors", "gradients")))
    at_first = sum(found.values()) if found.get("loading") else found["weights"]
    changed["loading"] = max(0, at_first - sum((found | changed | {"loading": 0}).values()))
    return changed


def _rough(recipe: Recipe, plan: Plan) -> dict[str, int]:
    """Bytes that training takes, by what takes them; activations are a rough figure for full-length examples."""
    compute, dense = DTYPES[recipe.precision].itemsize, dense_dtype(recipe).itemsize
    linears = [layer for layer in plan.linears if not layer.embedding]
    in_linears = sum(layer.num_in * layer.num_out for layer in linears)
    packed = 0.5 + (0.127 if recipe.model.double_quant else 0.5) / 8 if recipe.model.bits == 4 else dense
    trainable = plan.num_trainable(recipe)
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    layers = len({layer.name.rpartition(".")[0] for layer in linears})
    per_token = sum(layer.num_in + layer.num_out for layer in linears) * compute
    if recipe.train.gradient_checkpointing:
        per_token = 2 * per_token // max(1, layers // 2)
    full, factors = isinstance(recipe.adapter, FullOptions), plan.num_whole
    if not full:
        with torch.device("meta"):
            adapter = _adapter(plan, METHODS[recipe.adapter.method])
        shared = adapter.projections.whole() if adapter.projections else ()
        factors += sum(f.numel() for f in chain(shared, *(layer.values() for layer in adapter.factors.values())))
    return {
        "weights": int(in_linears * packed + (plan.num_total - in_linears) * dense),
        "factors": 4 * factors,
        "gradients": trainable * (dense if full else 4),
        "optimizer": trainable * (2 if recipe.train.optimizer == "paged-adamw-8bit" else 8),
        "activations": tokens * per_token,
        "logits": tokens * plan.vocabulary * (compute + 8),
    }


def _step(recipe: Recipe, plan: Plan, processes: int, heap: Heap | None, device: torch.device) -> dict[str, int]:
    """The very code of a step runs, in FakeTensorMode. Raises what torch and the model do where they need content."""
    ledger, section = Ledger(heap), recipe.train
    share = math.ceil(section.batch_size / processes)
    size = min(section.micro_batch_size, share)
    model = skeleton(plan.folder, recipe.model)  # some cast a part of themselves, which no fake tensor bears
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), ledger:
        loading = _fill(model, recipe, plan, ledger)
        chunked = not recipe.data.classifies and _chunks(model)
        packed = _pack_examples(recipe, model)
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        ledger.kind = "gradients"
        buckets = [torch.empty_like(parameter) for parameter in names if processes > 1 and not section.shard]
        for parameter in names:
            parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.name(cast(Tensor, p.grad), "gradients"))
        ledger.kind = "optimizer"
        step = _optimizer_step(names, recipe, device)
        step()
        ledger.peak = ledger.now.copy()
        for _ in range(PASSES if heap else 1):
            if share <= size:
                model.zero_grad()
            ledger.kind = "activations"
            with autocast(recipe, device):
                loss = _loss(recipe, model.train(), size, packed, chunked, ledger)
            ledger.kind = "activations"
            loss.backward()
            ledger.kind = "optimizer"
            step()
        del buckets
    found = {kind: ledger.peak[kind] for kind in KINDS}
    if heap is not None:
        found["heap"] = max(0, heap.growth() - ledger.peak.total())
        found["loading"] = max(0, loading - sum(found.values()))
    return found


def _fill(model: PreTrainedModel, recipe: Recipe, plan: Plan, ledger: Ledger) -> int:
    """Set up a model on the meta device as `train` does, without content. Returns the bytes that it takes on the CPU
    while it is loaded: its own, and those of its files where they have another dtype."""
    ledger.kind = "weights"
    stored = model.config.dtype or torch.float32
    dtype = dense_dtype(recipe)
    _give_storage(model, dtype)
    files = plan.num_total * stored.itemsize if recipe.model.bits != 4 and stored != dtype else 0
    loading = files + ledger.now["weights"]
    if recipe.model.bits == 4:
        store = quant.Store(4, stored, recipe.model.double_quant)
        for layer in plan.linears:
            if layer.packable and layer.expert is None:
                _pack(model, layer, store)
        quant.set_compute_dtype(model, DTYPES[recipe.precision])
    if model.device.type == "cpu":
        attend_in_fp32()
        multiply_in_fp32(model, DTYPES[recipe.precision])
    if isinstance(recipe.adapter, FullOptions):
        model.requires_grad_(True)
    else:
        ledger.kind = "factors"
        method = METHODS[recipe.adapter.method]
        attach(model, _adapter(plan, method), method, False, getattr(recipe.adapter, "dropout", 0.0))
        ledger.kind = "weights"
        make_trainable(model, recipe.adapter.modules_to_save)
        ledger.kind = "activations"
        ids = torch.zeros(1, 2, dtype=torch.long)
        options = {} if recipe.data.classifies else {"use_cache": False}
        compute_together(model, recipe, partial(model.eval(), input_ids=ids, **options))
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    return loading


def _give_storage(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on meta; tied ones stay tied. Parameters are floating-point, of this dtype."""
    strict = model._keep_in_fp32_modules_strict or ()
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                own = torch.float32 if any(part in f"{prefix}.{key}" for part in strict) else dtype
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=own), requires_grad=False)
            if parameter is not None:
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _pack(model: PreTrainedModel, layer: Linear, store: quant.Store) -> None:
    dense = model.get_submodule(layer.name)
    packed = quant.pack(store, torch.empty(layer.num_out, layer.num_in))
    assert isinstance(packed, quant.Packed)
    with unset_fake_temporarily():  # bitsandbytes' parameters cannot be without content
        linear = quant.linear(quant.Packed(torch.empty(0, 1, dtype=torch.uint8, device="cpu"), packed.state))
    weight: Any = nn.Parameter(packed.data, requires_grad=False)
    weight.quant_state = packed.state
    linear.weight, linear.bias = weight, dense.bias
    model.set_submodule(layer.name, linear)


def _adapter(plan: Plan, method: Method) -> Adapter:
    kept = TENSOR_NAMES[method.peft_type]
    factors = {
        name: {key: torch.empty(shape) for key, shape in shapes.items() if key in kept}
        for name, shapes in plan.factor_shapes().items()
    }
    projections = None
    if method.peft_type == "VERA":
        rank, (num_out, num_in) = max(plan.ranks.values()), plan.widest
        projections = Projections(torch.empty(rank, num_in), torch.empty(num_out, rank))
    return Adapter(factors, plan.scales, projections)


def _optimizer_step(names: Names, recipe: Recipe, device: torch.device) -> Callable[[], Any]:
    """What takes a step of the optimizer; bitsandbytes', whose state has 2 bytes a number, takes none."""
    if recipe.train.optimizer != "adamw":
        states = [torch.empty(2 * parameter.numel(), dtype=torch.uint8) for parameter in names]
        return lambda: states
    optimizer = make_optimizer(names, recipe)
    for group in optimizer.param_groups:
        group["foreach"] = device.type == "cuda"  # as torch decides for tensors with content
    return optimizer.step


def _pack_examples(recipe: Recipe, model: PreTrainedModel) -> bool:
    """As `guards.pack_if_sound`, of models that are sound."""
    if not recipe.data.packing or recipe.data.classifies or not takes_positions(model):
        return False
    attend_by_sequence(model)
    return recipe.data.packing is True or without_mask(model)


@torch.no_grad()
def _chunks(model: PreTrainedModel) -> bool:
    """As `guards.chunks_loss`: whether nothing but a factor follows the head."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    after = Operations()
    hook = head.register_forward_hook(lambda *_: after.names.clear())
    with after:
        model.eval()(input_ids=torch.empty(1, 16, dtype=torch.long), use_cache=False)
    hook.remove()
    return after.names <= {"mul", "div", "_to_copy"}


def _loss(recipe: Recipe, model: PreTrainedModel, size: int, packed: bool, chunked: bool, ledger: Ledger) -> Tensor:
    """The loss of a micro-batch of `size` examples of full length, every token a target."""
    length = min(recipe.data.max_length, context_of(model.config) or recipe.data.max_length)
    lengths = [length] * size
    row = row_length(lengths)
    shape = (1, row) if packed else (size, length)
    ids = torch.empty(shape, dtype=torch.long)
    batch = {"input_ids": ids}
    if recipe.data.classifies:
        return summed_loss(model, {**batch, "attention_mask": torch.empty_like(ids), "labels": torch.empty(size)})
    if packed:
        with unset_fake_temporarily():
            sequences = torch.tensor(lengths + [row - sum(lengths)] * (row > sum(lengths)), device="cpu")
        AttentionMaskInterface.register(BY_SEQUENCE, lambda **_: sequences)
        batch["position_ids"] = torch.empty_like(ids)
    elif size > 1:
        batch["attention_mask"] = torch.empty_like(ids)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda *_: setattr(ledger, "kind", "logits"))
    targets = torch.empty(size * (length - 1), dtype=torch.long)
    keep = targets if packed else targets[: length - 1]
    return loss_at(model, batch, keep, (targets, targets), targets, chunked)
