"""A model made ready to train, and what one step of it is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from pissa_cli import zero
from pissa_cli.adapter_options import FullOptions
from pissa_cli.adapters.methods import METHODS
from pissa_cli.attach import (
    attach,
    checkpoint_activations,
    forget_shared,
    join_gates,
    joins_gates,
    lowrank_layers,
    share_inputs,
    train_whole,
)
from pissa_cli.batches import collate, micro_batches, on_device
from pissa_cli.checkpoint import Names
from pissa_cli.errors import UsageError
from pissa_cli.examples import Examples
from pissa_cli.experts import has_experts
from pissa_cli.guards import (
    START_TOLERANCE,
    chunks_loss,
    packs,
    probe_loss,
    require_causal,
    require_padding_unseen,
    require_same_loss,
)
from pissa_cli.initialize import read_start, require_base
from pissa_cli.kernels import compile_blocks, misses_liger, use_liger, wants_liger
from pissa_cli.loss import autocast, autocast_inside, summed_loss
from pissa_cli.model import num_parameters
from pissa_cli.optim import make_optimizer
from pissa_cli.prepare import Watch
from pissa_cli.recipe import Recipe
from pissa_cli.rundir import Run
from pissa_cli.sharding import FSDPModule, Layout, shard, whole
from pissa_cli.steps import count_steps, seed_step, step_examples
from pissa_cli.weights import open_weights


@dataclass
class Trainer:
    """What a training step needs. `micro_batch_size` is the recipe's, or what memory has room for."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: Names
    examples: Examples
    pad_id: int
    total_steps: int
    missed: int
    packed: bool
    chunked: bool
    watch: Watch
    micro_batch_size: int


def set_up(
    run: Run,
    manifest: dict[str, Any],
    recipe: Recipe,
    model: PreTrainedModel,
    examples: Examples,
    pad_id: int,
    fresh: bool,
    missed: int,
    layout: Layout,
    watch: Watch,
) -> Trainer:
    """Put the model on its device, make it train what the method trains, and give that an optimizer.

    missed: as in `step_examples`. layout: what each of several processes has of it.
    """
    unused = has_experts(model)
    ways = DistributedDataParallelKwargs(find_unused_parameters=unused)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ways])
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says: it would divide every gradient
    if layout != "copies" and accelerator.num_processes == 1:
        watch({"note": "a single process has the whole model"})
        layout = "copies"
    sharded, deepspeed = layout != "copies", layout.startswith("zero")
    if sharded:
        _require_spreadable(recipe, unused, deepspeed)
    num_base = num_parameters(model)
    if accelerator.device.type != "cpu":  # which Accelerate calls cpu:0, and to() would copy every weight
        model.to(accelerator.device)
    probe = partial(probe_loss, recipe, model, examples, pad_id, accelerator.device)
    if wants_liger(recipe.train) and use_liger(model, recipe.train, probe, START_TOLERANCE[recipe.precision]):
        watch({"note": "norms, rotary embeddings and MLPs run by Liger's kernels"})
    elif misses_liger(recipe.train):
        advice = "with it most models take a fifth less time for a step: pip install 'pissa[liger]'"
        watch({"note": f"liger-kernel is not installed; {advice}"})
    packed = packs(recipe, model.eval(), examples, pad_id, accelerator.device)
    if recipe.data.classifies:
        require_padding_unseen(recipe, model, examples, pad_id, accelerator.device)
    else:
        require_causal(recipe, model, examples, accelerator.device)
    if recipe.data.packing == "auto" and not packed and not recipe.data.classifies:
        watch({"note": "examples are padded: packed ones would see each other, or cost more, in this model"})
    if isinstance(recipe.adapter, FullOptions):
        model.requires_grad_(True)
    else:
        before = probe(packed) if fresh and recipe.model.bits != 4 else None
        _, start = read_start(run, manifest)
        plain, dropout = recipe.model.bits != 4, getattr(recipe.adapter, "dropout", 0.0)
        attach(model, start, METHODS[recipe.adapter.method], plain, dropout)
        train_whole(model, recipe.adapter.modules_to_save, open_weights(require_base(run, manifest, recipe)))
        if layout != "zero-3":  # where a layer's parameters are there only while it runs itself
            share_inputs(model, partial(probe, packed))
            if joins_gates(recipe):
                join_gates(model)
        if before is not None:
            require_same_loss(before, probe(packed), recipe.precision)
    head = model.get_output_embeddings()
    trains_head = head is not None and head.weight.requires_grad
    aside = (unused and accelerator.num_processes > 1) or layout == "zero-3"  # neither finds it outside of the model
    chunked = chunks_loss(model, examples) and not (aside and trains_head)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if recipe.train.torch_compile:
        compile_blocks(model, accelerator.device)
    if layout == "fsdp2":
        shard(model, accelerator.device, accelerator.num_processes)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in lowrank_layers(model).items():
        names |= {p: f"{name}.{key}" for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
    total_steps = count_steps(len(examples), recipe, missed)
    trainable = sum(parameter.numel() for parameter in names)
    steps = f"{total_steps} steps of {recipe.train.batch_size} examples"
    processes = f", in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    processes += " that share the model" if sharded else ""
    watch({"note": f"{trainable:,} parameters train, the base has {num_base:,}; {steps}{processes}"})
    frozen = [*(name for name, p in model.named_parameters() if not p.requires_grad), *dict(model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # each process has read its own
    optimizer = make_optimizer(names, recipe)
    if accelerator.num_processes > 1 and not sharded and not unused:
        ways.find_unused_parameters = not _reaches_all(recipe, model, examples, pad_id, accelerator.device, chunked)
    if deepspeed:
        autocast_inside(model, recipe, accelerator.device)
        prepared = zero.initialize(model, optimizer, int(layout[-1]), recipe.train.max_grad_norm, accelerator.device)
        optimizer = prepared.optimizer
    else:
        optimizer = accelerator.prepare(optimizer)
        prepared = model if sharded else accelerator.prepare_model(model, device_placement=False)
    return Trainer(
        recipe=recipe,
        accelerator=accelerator,
        model=prepared,
        optimizer=optimizer,
        names=names,
        examples=examples,
        pad_id=pad_id,
        total_steps=total_steps,
        missed=missed,
        packed=packed,
        chunked=chunked,
        watch=watch,
        micro_batch_size=recipe.train.micro_batch_size,
    )


def _require_spreadable(recipe: Recipe, experts: bool, deepspeed: bool) -> None:
    """UsageError for what does not go with a model that is spread over the processes."""
    if recipe.train.optimizer != "adamw":
        raise UsageError("bitsandbytes' optimizer cannot be spread over processes", "set train.optimizer to adamw")
    if experts:
        raise UsageError(
            "the experts of this model cannot be spread over processes: one process may use some that another does not",
            "train without sharding: each process then has the whole model",
        )
    if deepspeed and recipe.train.on_fault != "stop":
        raise UsageError("DeepSpeed cannot take a step back", "set train.on_fault to stop, or share the model by FSDP2")
    if deepspeed and recipe.train.torch_compile:
        raise UsageError("train.torch_compile: not under DeepSpeed", "set it to false, or share the model by FSDP2")


def _reaches_all(
    recipe: Recipe, model: PreTrainedModel, examples: Examples, pad_id: int, device: torch.device, chunked: bool
) -> bool:
    """Whether an example gives every parameter that trains a gradient. A model may have parts that no text reaches.

    In training mode: in the other one nothing is checkpointed, and every layer keeps the weight that it read.
    """
    batch = on_device(collate(examples, [0], pad_id, packing=False), device)
    with autocast(recipe, device):
        loss = summed_loss(model.train(), batch, chunked)
    loss.backward()
    reached = all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad()
    return reached


def form_gradients(trainer: Trainer, step: int) -> tuple[float, float, int]:
    """The gradients of a step over `batch_size` examples, clipped: (loss averaged over target tokens, gradient norm
    before, tokens).

    Micro-batches that do not fit into memory are halved from here on; the step stays the same.
    """
    accelerator, examples, section = trainer.accelerator, trainer.examples, trainer.recipe.train
    indices = step_examples(step, len(examples), trainer.recipe, trainer.missed)
    while True:
        try:
            total = _accumulate(trainer, step, indices)
            break
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            forget_shared(trainer.model)
            if trainer.micro_batch_size == 1 or accelerator.num_processes > 1:  # others wait in the middle of a step
                raise
            trainer.micro_batch_size //= 2
            trainer.watch({"note": f"out of memory: micro-batches of {trainer.micro_batch_size} examples from here on"})
        torch.cuda.empty_cache()
    if zero.spreads(trainer.model):  # which clips in its step
        grad_norm = zero.gradient_norm(trainer.names)
    else:
        grad_norm = float(whole(accelerator.clip_grad_norm_(trainer.model.parameters(), section.max_grad_norm)))
    return float(accelerator.reduce(total, "sum")), grad_norm, sum(examples.length(i) for i in indices)


def update(trainer: Trainer, lr: float) -> None:
    """Move the parameters by the gradients that were formed."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    trainer.optimizer.step()


def _accumulate(trainer: Trainer, step: int, indices: list[int]) -> Tensor:
    """Gradients of a step's loss, by micro-batches over this process's share; returns its part of the loss."""
    accelerator, examples = trainer.accelerator, trainer.examples
    num_targets = sum(examples.num_targets(i) for i in indices)
    chunks = _own_chunks(trainer, examples, indices)
    seed_step(trainer.recipe.seed, step, accelerator.process_index)
    trainer.model.train()
    total = torch.zeros((), device=accelerator.device)
    for number, (chunk, counts) in enumerate(chunks):
        last = number + 1 == len(chunks)
        alone = zero.spreads(trainer.model) or last
        with contextlib.nullcontext() if alone else accelerator.no_sync(trainer.model):
            loss = _summed_loss(trainer, examples, chunk) * float(counts) / num_targets
            if zero.spreads(trainer.model):
                zero.backward(trainer.model, loss * accelerator.num_processes, last)
            else:
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    return total


@torch.no_grad()
def evaluate_loss(trainer: Trainer, examples: Examples) -> float:
    """The loss averaged over all target tokens of `examples`, without dropout."""
    trainer.model.eval()
    total = torch.zeros((), device=trainer.accelerator.device, dtype=torch.float64)
    for chunk, counts in _own_chunks(trainer, examples, list(range(len(examples)))):
        total += _summed_loss(trainer, examples, chunk) * float(counts)
    total = trainer.accelerator.reduce(total, "sum")
    if isinstance(trainer.model, FSDPModule):
        trainer.model.reshard()  # which only a backward pass does by itself
    return float(total) / sum(examples.num_targets(i) for i in range(len(examples)))


def _own_chunks(trainer: Trainer, examples: Examples, indices: list[int]) -> list[tuple[list[int], bool]]:
    """The micro-batches of this process's share, and whether each counts.

    Every process has as many, since they meet in each one; a process with fewer repeats one that does not count.
    """
    processes, size = trainer.accelerator.num_processes, trainer.micro_batch_size
    shares = [indices[process::processes] for process in range(processes)]
    chunks = [micro_batches(examples, share, size, trainer.packed) if share else [] for share in shares]
    mine = chunks[trainer.accelerator.process_index]
    idle = mine[0] if mine else indices[:1]
    return [(chunk, True) for chunk in mine] + [(idle, False)] * (max(map(len, chunks)) - len(mine))


def _summed_loss(trainer: Trainer, examples: Examples, chunk: list[int]) -> Tensor:
    batch = collate(examples, chunk, trainer.pad_id, trainer.packed)
    device = trainer.accelerator.device
    with autocast(trainer.recipe, device):
        return summed_loss(trainer.model, on_device(batch, device), trainer.chunked)
