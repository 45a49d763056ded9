"""How many steps a run takes, which examples each takes, and the random numbers of each."""

from __future__ import annotations

import math

import torch

from pissa_cli.matrices.svd import generator
from pissa_cli.schema.recipe import Recipe


def step_examples(step: int, num: int, recipe: Recipe, missed: int = 0) -> list[int]:
    """The examples of a step: `num` of them shuffled anew each epoch by (seed, epoch), cut into batches.

    missed: by how many the steps before were short, as the last is of a run that goes on for more epochs.
    """
    begin = step * recipe.train.batch_size - missed
    stop = begin + recipe.train.batch_size
    if recipe.train.steps is None:
        stop = min(stop, _examples_in_all(num, recipe))
    chosen: list[int] = []
    for epoch in range(begin // num, (stop - 1) // num + 1):
        order = torch.randperm(num, generator=generator(recipe.seed, f"epoch {epoch}"))
        chosen += order[max(begin - epoch * num, 0) : stop - epoch * num].tolist()
    return chosen


def count_steps(num: int, recipe: Recipe, missed: int = 0) -> int:
    """Optimizer steps of the whole run over `num` examples."""
    return recipe.train.steps or math.ceil((_examples_in_all(num, recipe) + missed) / recipe.train.batch_size)


def _examples_in_all(num: int, recipe: Recipe) -> int:
    return max(1, round((recipe.train.epochs or 1) * num))


def seed_step(seed: int, step: int, process: int) -> None:
    """Start the random numbers of a step (dropout's) anew, by (seed, step, process): a resumed run draws the same."""
    torch.manual_seed(generator(seed, f"step {step} of process {process}").initial_seed())
