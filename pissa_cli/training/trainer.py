"""What one step of training is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pissa_cli.base.attach import forget_shared
from pissa_cli.data.examples import Examples
from pissa_cli.data.tokenize import Say
from pissa_cli.schema.recipe import Recipe
from pissa_cli.training import zero
from pissa_cli.training.batches import collate, micro_batches, on_device
from pissa_cli.training.loss import autocast, summed_loss
from pissa_cli.training.optim import Names
from pissa_cli.training.sharding import whole
from pissa_cli.training.steps import seed_step, step_examples


@dataclass
class Trainer:
    """What a training step needs.

    names: the parameters that train, by the names that checkpoints give them. pad_id: the token that fills up a batch.
    missed: by how many examples the steps so far were short (`steps.step_examples`). packed: examples lie in one row
    without padding. chunked: the loss is formed in chunks of logits (`loss.summed_loss`). say: told of what happens.
    micro_batch_size: the recipe's, or what memory has room for.
    """

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
    say: Say
    micro_batch_size: int


def form_gradients(trainer: Trainer, step: int) -> tuple[float, float, int]:
    """The gradients of a step over `batch_size` examples, clipped: (loss averaged over target tokens, gradient norm
    before, tokens).

    Micro-batches that do not fit into memory are halved from here on; the step stays the same.
    """
    accelerator, examples, section = trainer.accelerator, trainer.examples, trainer.recipe.train
    indices = step_examples(step, len(examples), trainer.recipe, trainer.missed)
    total = _halving(trainer, lambda: _accumulate(trainer, step, indices))
    if zero.spreads(trainer.model):  # which clips in its step
        grad_norm = zero.gradient_norm(trainer.names)
    else:
        grad_norm = float(whole(accelerator.clip_grad_norm_(trainer.model.parameters(), section.max_grad_norm)))
    return float(accelerator.reduce(total, "sum")), grad_norm, sum(examples.length(i) for i in indices)


def _halving(trainer: Trainer, work: Callable[[], Tensor]) -> Tensor:
    """work(), with micro-batches that fit into memory."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            forget_shared(trainer.model)
            if trainer.micro_batch_size == 1 or trainer.accelerator.num_processes > 1:
                raise  # others wait in the middle of a step
            trainer.micro_batch_size //= 2
            trainer.say(f"out of memory: micro-batches of {trainer.micro_batch_size} examples from here on")
        torch.cuda.empty_cache()


def tell_idle(trainer: Trainer) -> None:
    """Say to which layers no gradient has come: towers for pictures, attention to an encoder. An expert may get the
    next tokens."""
    if zero.spreads(trainer.model):  # which keeps gradients elsewhere
        return
    idle = {name.rpartition(".")[0] for parameter, name in trainer.names.items() if parameter.grad is None}
    names = sorted(name for name in idle if ".experts." not in name)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        trainer.say(f"no text changes {len(names)} of the layers that train: {shown}")


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
    total, spread = torch.zeros((), device=accelerator.device), zero.spreads(trainer.model)
    for number, (chunk, counts) in enumerate(chunks):
        last = number + 1 == len(chunks)
        with contextlib.nullcontext() if spread or last else accelerator.no_sync(trainer.model):
            loss = micro_batch_loss(trainer, examples, chunk) * float(counts) / num_targets
            if spread:
                zero.backward(trainer.model, loss * accelerator.num_processes, last)
            else:
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    return total


@torch.no_grad()
def evaluate_loss(trainer: Trainer, examples: Examples) -> float:
    """The loss averaged over all target tokens of `examples`, without dropout. Micro-batches are halved as in a step:
    held-out rows may be longer."""

    def summed() -> Tensor:
        total = torch.zeros((), device=trainer.accelerator.device, dtype=torch.float64)
        for chunk, counts in _own_chunks(trainer, examples, list(range(len(examples)))):
            total += micro_batch_loss(trainer, examples, chunk) * float(counts)
        return total

    trainer.model.eval()
    total = trainer.accelerator.reduce(_halving(trainer, summed), "sum")
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


def micro_batch_loss(trainer: Trainer, examples: Examples, chunk: list[int]) -> Tensor:
    """The loss of a micro-batch, summed over its target tokens; chunk: its examples."""
    batch = collate(examples, chunk, trainer.pad_id, trainer.packed)
    device = trainer.accelerator.device
    with autocast(trainer.recipe, device):
        return summed_loss(trainer.model, on_device(batch, device), trainer.chunked)
