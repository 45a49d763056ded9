"""`train`: one loop. Load the base and the start, take steps, save what is needed to take them again."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from pissa_cli import report
from pissa_cli.adapter_options import FullOptions
from pissa_cli.adapters.methods import METHODS
from pissa_cli.attach import attach, lowrank_layers, train_whole
from pissa_cli.checkpoint import Names, restore_checkpoint, save_checkpoint
from pissa_cli.data import collate, micro_batches, padding
from pissa_cli.errors import Interrupted, PissaError
from pissa_cli.examples import Examples
from pissa_cli.experts import holders_of_3d_weights
from pissa_cli.exported import write_result
from pissa_cli.guards import (
    chunks_loss,
    packs,
    probe_loss,
    require_padding_unseen,
    require_same_loss,
)
from pissa_cli.initialize import Progress, read_start, require_base
from pissa_cli.loading import load_model
from pissa_cli.loss import autocast, summed_loss
from pissa_cli.model import num_parameters
from pissa_cli.optim import learning_rate, make_optimizer
from pissa_cli.prepare import Watch, prepare
from pissa_cli.process import keep_freed_memory, peak_memory, process_state, stop_signals
from pissa_cli.recipe import Recipe
from pissa_cli.recipe_file import dump
from pissa_cli.rundir import Run, write_text
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
    packed: bool
    chunked: bool
    watch: Watch
    micro_batch_size: int


def train(
    recipe: Recipe, resume: bool = False, watch: Watch = lambda _: None, init_progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Train by the recipe, initializing first where that was not done. Returns the figures of the run.

    Raises UsageError for bad input, Interrupted after the checkpoint that follows SIGINT or SIGTERM, and PissaError
    for a loss that is not finite and for a disk that fails; earlier checkpoints stay whole.
    """
    state = process_state()
    keep_freed_memory()
    with state.main_process_first():
        start = prepare(recipe, resume, *((watch, init_progress) if state.is_main_process else ()))
    manifest, tokenizer, examples, held_out, checkpoint = start
    run = Run(Path(recipe.output))
    if state.is_main_process:
        write_text(run.recipe, dump(recipe))
    model = load_model(require_base(run, manifest, recipe), recipe.model, recipe.precision, recipe.seed)
    pad_id = padding(model, tokenizer)
    trainer = _set_up(run, manifest, recipe, model, examples, pad_id, checkpoint is None, watch)
    first_step = 0
    if checkpoint:
        first_step = restore_checkpoint(checkpoint, trainer.names, _plain(trainer.optimizer), examples.digest())
    if state.is_main_process:
        _trim_metrics(run, first_step)
    figures = _loop(run, trainer, held_out, first_step, watch)
    facts = {name: loaded.facts() for name, loaded in (("train", examples), ("eval", held_out)) if loaded is not None}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    with state.main_process_first():
        if state.is_main_process:
            report.loss_picture(run.metrics, run.folder / "loss.png")
            figures["result"] = str(write_result(recipe, trained, trainer.total_steps, facts))
    return figures | {"data": facts}


def _loop(run: Run, trainer: Trainer, held_out: Examples | None, first_step: int, watch: Watch) -> dict[str, Any]:
    section, accelerator, began, tokens = trainer.recipe.train, trainer.accelerator, time.time(), 0
    last_saved, losses, held_out_loss = first_step, [], None
    digest = trainer.examples.digest()
    with stop_signals() as asked, run.metrics.open("a", encoding="utf-8") as metrics:

        def note(event: dict[str, Any]) -> None:
            if accelerator.is_main_process:
                metrics.write(json.dumps(event) + "\n")
                metrics.flush()
                watch(event)

        for step in range(first_step, trainer.total_steps):
            step_began = time.time()
            lr = learning_rate(step, trainer.total_steps, section, trainer.recipe.lr)
            loss, grad_norm, step_tokens = train_step(trainer, step, lr)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                kept = f"step {last_saved} is saved" if last_saved else "no checkpoint was saved yet"
                raise PissaError(
                    f"step {step + 1}: training has diverged (loss {loss}, gradient norm {grad_norm}); {kept}",
                    f"lower train.lr (now {trainer.recipe.lr:g}) or train.max_grad_norm, and check the data",
                )
            losses.append(loss)
            tokens += step_tokens
            seconds = time.time() - step_began
            event = {"step": step + 1, "steps": trainer.total_steps, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            done = step + 1 == trainer.total_steps
            if held_out and (done or (section.eval_every and (step + 1) % section.eval_every == 0)):
                event["eval_loss"] = held_out_loss = evaluate_loss(trainer, held_out)
            note(event | {"tokens": step_tokens, "seconds": round(seconds, 4), "memory_bytes": peak_memory()})
            stopped = _any(accelerator, asked())
            if done or stopped or (section.save_every and (step + 1) % section.save_every == 0):
                if accelerator.is_main_process:
                    save_checkpoint(run, step + 1, trainer.names, _plain(trainer.optimizer), digest, section.keep)
                accelerator.wait_for_everyone()
                last_saved = step + 1
            if stopped and not done:
                raise Interrupted(f"stopped at step {step + 1} of {trainer.total_steps}", "go on with --resume")
    return {
        "steps": trainer.total_steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_loss": held_out_loss,
        "seconds": round(time.time() - began, 3),
        "tokens": tokens,
        "peak_memory_bytes": peak_memory(),
    }


def train_step(trainer: Trainer, step: int, lr: float) -> tuple[float, float, int]:
    """One optimizer step over `batch_size` examples: (loss averaged over target tokens, gradient norm, tokens).

    Micro-batches that do not fit into memory are halved from here on; the step stays the same.
    """
    accelerator, examples, section = trainer.accelerator, trainer.examples, trainer.recipe.train
    indices = step_examples(step, len(examples), trainer.recipe)
    while True:
        try:
            total = _accumulate(trainer, step, indices)
            break
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            if trainer.micro_batch_size == 1 or accelerator.num_processes > 1:  # others wait in the middle of a step
                raise
            trainer.micro_batch_size //= 2
            trainer.watch({"note": f"out of memory: micro-batches of {trainer.micro_batch_size} examples from here on"})
        torch.cuda.empty_cache()
    grad_norm = accelerator.clip_grad_norm_(trainer.model.parameters(), section.max_grad_norm)
    loss_value, norm_value = float(accelerator.reduce(total, "sum")), float(grad_norm)
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss_value, norm_value, sum(examples.length(i) for i in indices)


def _accumulate(trainer: Trainer, step: int, indices: list[int]) -> Tensor:
    """Gradients of a step's loss, by micro-batches over this process's share; returns its part of the loss."""
    accelerator, examples = trainer.accelerator, trainer.examples
    num_targets = sum(examples.num_targets(i) for i in indices)
    share = indices[accelerator.process_index :: accelerator.num_processes]
    chunks = micro_batches(examples, share or indices[:1], trainer.micro_batch_size, trainer.packed)
    counts = float(bool(share))  # a process without an example takes part with a loss of zero
    seed_step(trainer.recipe.seed, step, accelerator.process_index)
    trainer.model.train()
    total = torch.zeros((), device=accelerator.device)
    for number, chunk in enumerate(chunks):
        last = number + 1 == len(chunks)
        with contextlib.nullcontext() if last else accelerator.no_sync(trainer.model):
            loss = _summed_loss(trainer, examples, chunk) * counts / num_targets
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    return total


@torch.no_grad()
def evaluate_loss(trainer: Trainer, examples: Examples) -> float:
    """The loss averaged over all target tokens of `examples`, without dropout."""
    trainer.model.eval()
    chunks = micro_batches(examples, list(range(len(examples))), trainer.micro_batch_size, trainer.packed)
    mine = chunks[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
    total = torch.zeros((), device=trainer.accelerator.device, dtype=torch.float64)
    for chunk in mine:
        total += _summed_loss(trainer, examples, chunk)
    total = trainer.accelerator.reduce(total, "sum")
    return float(total) / sum(examples.num_targets(i) for i in range(len(examples)))


def _summed_loss(trainer: Trainer, examples: Examples, chunk: list[int]) -> Tensor:
    batch = collate(examples, chunk, trainer.pad_id, trainer.packed)
    device = trainer.accelerator.device
    with autocast(trainer.recipe.model.bits, trainer.recipe.precision, device):
        return summed_loss(trainer.model, {key: tensor.to(device) for key, tensor in batch.items()}, trainer.chunked)


def _set_up(
    run: Run,
    manifest: dict[str, Any],
    recipe: Recipe,
    model: PreTrainedModel,
    examples: Examples,
    pad_id: int,
    fresh: bool,
    watch: Watch,
) -> Trainer:
    """Put the model on its device, make it train what the method trains, and give that an optimizer."""
    unused = bool(holders_of_3d_weights(model))  # an expert may get no token
    ways = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    accelerator = Accelerator(kwargs_handlers=[ways])
    num_base, model = num_parameters(model), model.to(accelerator.device)
    probe = partial(probe_loss, recipe, model, examples, pad_id, accelerator.device)
    packed = packs(recipe, model.eval(), examples, pad_id, accelerator.device)
    if recipe.data.classifies:
        require_padding_unseen(recipe, model, examples, pad_id, accelerator.device)
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
        if before is not None:
            require_same_loss(before, probe(packed), recipe.precision)
    chunked = chunks_loss(model, examples)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in lowrank_layers(model).values():
            layer.keeps_weight = True
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in lowrank_layers(model).items():
        names |= {p: f"{name}.{key}" for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
    total_steps = count_steps(len(examples), recipe)
    trainable = sum(parameter.numel() for parameter in names)
    steps = f"{total_steps} steps of {recipe.train.batch_size} examples"
    if accelerator.is_main_process:
        processes = f", in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        watch({"note": f"{trainable:,} parameters train, the base has {num_base:,}; {steps}{processes}"})
    optimizer = make_optimizer(names, recipe)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    parts = (recipe, accelerator, prepared, optimizer, names, examples, pad_id, total_steps, packed, chunked)
    return Trainer(*parts, watch, recipe.train.micro_batch_size)


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is true in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _trim_metrics(run: Run, first_step: int) -> None:
    """Drop the lines of steps that are about to be taken again, and a line that a killed process left half-written."""
    if not run.metrics.is_file():
        return
    kept = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= first_step:
                kept.append(line)
    write_text(run.metrics, "".join(f"{line}\n" for line in kept))
