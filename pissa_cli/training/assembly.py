"""A model made ready to train: on its device, with what its method trains, spread over the processes there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from pissa_cli.adapters.methods import METHODS
from pissa_cli.base.attach import attach, checkpoint_activations, compute_together, lowrank_layers, train_whole
from pissa_cli.base.experts import has_experts
from pissa_cli.base.model import num_parameters
from pissa_cli.base.weights import open_weights
from pissa_cli.data.examples import Examples
from pissa_cli.data.tokenize import Say
from pissa_cli.errors import UsageError
from pissa_cli.run.reached import facts_of
from pissa_cli.run.rundir import run_of
from pissa_cli.run.started import read_start, require_base
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training import zero
from pissa_cli.training.guards import (
    LOSS_TOLERANCE,
    chunks_loss,
    pack_if_sound,
    probe_loss,
    require_causal,
    require_padding_unseen,
    require_same_loss,
    runs_in_bf16,
)
from pissa_cli.training.kernels import compile_blocks, misses_liger, use_liger, wants_liger
from pissa_cli.training.loss import autocast_inside
from pissa_cli.training.optim import Names, make_optimizer
from pissa_cli.training.packing import attend_in_fp32
from pissa_cli.training.sharding import Layout, shard
from pissa_cli.training.steps import count_steps
from pissa_cli.training.trainer import Trainer, micro_batch_loss


def assemble(
    manifest: dict[str, Any],
    recipe: Recipe,
    model: PreTrainedModel,
    examples: Examples,
    pad_id: int,
    checkpoint: Path | None,
    layout: Layout,
    say: Say,
) -> Trainer:
    """Put the model on its device, make it train what the method trains, and give that an optimizer.

    checkpoint: where the run goes on from; None for one that begins. layout: what each of several processes has of it.
    """
    experts = has_experts(model)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=experts)
    # whatever the environment says: it would divide every gradient, compile the model whole, and multiply in TF32
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=[ddp])
    accelerator.gradient_accumulation_steps = 1
    device, alone = accelerator.device, accelerator.num_processes == 1
    if layout != "copies" and alone:
        say("a single process has the whole model")
        layout = "copies"
    sharded, deepspeed = layout != "copies", layout.startswith("zero")
    if sharded:
        _require_spreadable(recipe, experts, deepspeed)
    num_base = num_parameters(model)
    if device.type == "cpu":  # which Accelerate calls cpu:0, and to() would copy every weight
        attend_in_fp32()
    else:
        model.to(device)
    with runs_in_bf16(model, recipe.precision):
        chunked = chunks_loss(model, examples)
        probe = partial(probe_loss, recipe, model, examples, pad_id, chunked)
        _take_kernels(recipe, model, probe, say)
        packed = _settle_packing(recipe, model, examples, pad_id, probe, say)
        if isinstance(recipe.adapter, FullOptions):
            model.requires_grad_(True)
        else:
            fresh, apart = checkpoint is None, layout == "zero-3"
            _add_adapter(manifest, recipe, model, partial(probe, packed), fresh, apart)
    head = model.get_output_embeddings()
    trains_head = head is not None and head.weight.requires_grad
    inside = (experts and not alone) or layout == "zero-3"  # what trains has to be used within the model there
    chunked = chunked and type(head) is nn.Linear and not (inside and trains_head)  # it may have an adapter by now
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if recipe.train.torch_compile:
        compile_blocks(model, device)
    if layout == "fsdp2":
        shard(model, device, accelerator.num_processes)
    names = _trained(model)
    missed = 0 if checkpoint is None else facts_of(checkpoint)["missed"]
    total_steps = count_steps(len(examples), recipe, missed)
    trainable = sum(parameter.numel() for parameter in names)
    steps = f"{total_steps} steps of {recipe.train.batch_size} examples"
    processes = "" if alone else f", in {accelerator.num_processes} processes"
    processes += " that share the model" if sharded else ""
    say(f"{trainable:,} parameters train, the base has {num_base:,}; {steps}{processes}")
    trainer = Trainer(
        recipe=recipe,
        accelerator=accelerator,
        model=model,
        optimizer=make_optimizer(names, recipe),
        names=names,
        examples=examples,
        pad_id=pad_id,
        total_steps=total_steps,
        missed=missed,
        packed=packed,
        chunked=chunked,
        say=say,
        micro_batch_size=recipe.train.micro_batch_size,
    )
    if deepspeed:
        autocast_inside(model, recipe, device)
        engine = zero.initialize(model, trainer.optimizer, int(layout[-1]), recipe.train.max_grad_norm, device)
        trainer.model, trainer.optimizer = engine, engine.optimizer
    elif not sharded:
        _copy_to_all(trainer, ddp)
    return trainer


def _add_adapter(
    manifest: dict[str, Any],
    recipe: Recipe,
    model: PreTrainedModel,
    probe: Callable[[], float],
    fresh: bool,
    apart: bool,
) -> None:
    """Put the adapter of `init/` around the layers, and let it and `modules_to_save` train.

    probe: a loss of the model, which over dense weights may not change where the run is `fresh`. apart: a layer's
    parameters are there only while it runs itself.
    """
    assert not isinstance(recipe.adapter, FullOptions)
    plain = recipe.model.bits != 4
    before = probe() if fresh and plain else None
    _, start = read_start(run_of(recipe), manifest)
    attach(model, start, METHODS[recipe.adapter.method], plain, getattr(recipe.adapter, "dropout", 0.0))
    train_whole(model, recipe.adapter.modules_to_save, open_weights(require_base(manifest, recipe)))
    if not apart:
        compute_together(model, recipe, probe)
    if before is not None:
        require_same_loss(before, probe(), recipe.precision)


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


def _take_kernels(recipe: Recipe, model: PreTrainedModel, probe: Callable[[], float], say: Say) -> None:
    """Liger's kernels where they are wanted and leave the loss, `probe`, as it is. UsageError where they were asked for
    and do not."""
    if wants_liger(recipe.train):
        try:
            if use_liger(model, recipe.train, probe, LOSS_TOLERANCE[recipe.precision]):
                say("norms, rotary embeddings and MLPs run by Liger's kernels")
        except UsageError as error:
            if recipe.train.use_liger_kernel is True:
                raise
            say(f"going on without Liger's kernels: {error.message} ({error.hint})")
    elif misses_liger(recipe.train):
        advice = "with it most models take a fifth less time for a step: pip install 'pissa[liger]'"
        say(f"liger-kernel is not installed; {advice}")


def _settle_packing(
    recipe: Recipe, model: PreTrainedModel, examples: Examples, pad_id: int, probe: Callable[..., float], say: Say
) -> bool:
    """As `pack_if_sound`. UsageError for a model that sees what it should not: padding, or what follows."""
    packed = pack_if_sound(recipe, model.eval(), examples, probe)
    if recipe.data.classifies:
        require_padding_unseen(recipe, model, examples, pad_id)
    else:
        require_causal(recipe, model, examples)
        if recipe.data.packing == "auto" and not packed:
            say("examples are padded: packed ones would see each other, or cost more, in this model")
    return packed


def _trained(model: PreTrainedModel) -> Names:
    """What trains, by the names that checkpoints give it."""
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in lowrank_layers(model).items():
        names |= {p: f"{name}.{key}" for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
    return names


def _copy_to_all(trainer: Trainer, ddp: DistributedDataParallelKwargs) -> None:
    """Have each process train a copy of the model, which may have parts that no text reaches."""
    model, processes = trainer.model, trainer.accelerator.num_processes
    frozen = [*(name for name, p in model.named_parameters() if not p.requires_grad), *dict(model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # each process has read its own
    if processes > 1 and not ddp.find_unused_parameters:
        _one_pass(trainer)
        ddp.find_unused_parameters = any(p.grad is None for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    trainer.model = trainer.accelerator.prepare_model(model, device_placement=False)
    if processes > 2 and not ddp.find_unused_parameters:
        # after its first pass DDP adds gradients up in another order: that pass is none of the training
        _one_pass(trainer)
        trainer.model.zero_grad()


def _one_pass(trainer: Trainer) -> None:
    """Gradients of an example's loss.

    In training mode: in the other one nothing is checkpointed, and every layer keeps the weight that it read.
    """
    trainer.model.train()
    micro_batch_loss(trainer, trainer.examples, [0]).backward()
