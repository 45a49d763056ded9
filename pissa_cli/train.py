"""`train`: one loop. Load the base and the start, take steps, save what is needed to take them again."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pissa_cli.base.loading import load_model
from pissa_cli.data.examples import Examples
from pissa_cli.errors import Interrupted, PissaError
from pissa_cli.files import locked, write_text
from pissa_cli.initialize import Progress
from pissa_cli.outputs.result import write_result
from pissa_cli.process import keep_freed_memory, peak_memory, process_state, stop_signals
from pissa_cli.run.reached import resume_hint, sections_of
from pissa_cli.run.report import draw_losses
from pissa_cli.run.rundir import PICTURE, Run, clear_leftovers, run_of
from pissa_cli.run.started import require_base
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe, TrainSection
from pissa_cli.schema.recipe_file import dump
from pissa_cli.training.assembly import assemble
from pissa_cli.training.batches import padding
from pissa_cli.training.checkpoint import (
    lowest_held_out,
    remove_old,
    restore_checkpoint,
    save_checkpoint,
    trained_values,
    whole_checkpoint,
)
from pissa_cli.training.faults import Faults
from pissa_cli.training.optim import learning_rate
from pissa_cli.training.prepare import prepare
from pissa_cli.training.sharding import asked_by_accelerate
from pissa_cli.training.steps import step_examples
from pissa_cli.training.trainer import Trainer, evaluate_loss, form_gradients, tell_idle, update

Watch = Callable[[dict[str, Any]], None]
"""Called with what goes to metrics.jsonl, and with {"note": text} for what the person watching should know."""
SAVE_SECONDS, SAVE_SHARE = 600, 20
"""Where the recipe does not say when, the next checkpoint comes so long after the last, or so many times what that took
to write. Twice as long if a held-out loss is to come before: the checkpoint with the lowest is kept."""


def train(
    recipe: Recipe, resume: bool = False, watch: Watch = lambda _: None, init_progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Train by the recipe, initializing first where that was not done. Returns the figures of the run.

    Raises UsageError for bad input, Interrupted after the checkpoint that follows SIGINT, SIGTERM or SIGHUP, and
    PissaError for a loss that is not finite, a disk that fails and a run folder that is gone; earlier checkpoints stay
    whole.
    """
    state = process_state()
    keep_freed_memory()
    first = state.is_main_process
    layout = asked_by_accelerate() or ("fsdp2" if recipe.train.shard else "copies")  # before transformers reads that
    run, full = run_of(recipe), isinstance(recipe.adapter, FullOptions)

    def say(text: str) -> None:
        if first:
            watch({"note": text})

    with contextlib.ExitStack() as lock:
        with state.main_process_first():
            manifest, tokenizer, examples, held_out = prepare(recipe, resume, say, init_progress)
            if first:
                lock.enter_context(locked(run.checkpoints))
                clear_leftovers(run)
            checkpoint, lines = whole_checkpoint(run)  # set aside by the first process, the others see what is left
            for line in lines:
                say(line)
            if first:
                remove_old(run, recipe.train.keep, not full)  # as a training killed just before it would have done
        say("loading the model, and trying it out before the first step")
        model = load_model(require_base(manifest, recipe), recipe)
        pad_id = padding(model, tokenizer)
        trainer = assemble(manifest, recipe, model, examples, pad_id, checkpoint, layout, say)
        first_step = _restore(trainer, checkpoint) if checkpoint else 0
        with state.main_process_first():
            seen = _trim_metrics(run, first_step, first)
            if first:  # nothing is left that could refuse it
                write_text(run.recipe, dump(recipe))
        if first_step == trainer.total_steps:
            say(f"all {first_step} steps are taken; for more raise train.steps or train.epochs")
        figures = _loop(run, trainer, held_out, first_step, Faults(recipe, seen), watch)
        facts = {name: part.facts() for name, part in (("train", examples), ("eval", held_out)) if part is not None}
        trained = trained_values(trainer.names, first)
        with state.main_process_first():
            if first:
                result = write_result(recipe, model, trained, trainer.total_steps, facts)
                figures["result"] = str(result)
                lowest = lowest_held_out(run)
                if lowest is not None and lowest[0] != trainer.total_steps:
                    kept = not full and (run.checkpoints / f"step-{lowest[0]}").is_dir()
                    figures["lowest"] = {"step": lowest[0], "eval_loss": lowest[1], "kept": kept}
                before = [folder.name for folder in run.made_from_result if folder.is_dir() and folder != result]
                if before and first_step < trainer.total_steps:
                    say(f"{', '.join(before)}: of before these steps; make them again")
                draw_losses({run.folder.name: run.metrics}, run.folder / PICTURE)
    return {"method": recipe.adapter.method, "lr": recipe.lr, **figures, "data": facts}


def _loop(
    run: Run, trainer: Trainer, held_out: Examples | None, first_step: int, faults: Faults, watch: Watch
) -> dict[str, Any]:
    """Take the steps from `first_step` on, with losses on `held_out` and checkpoints between them. Returns figures."""
    section, accelerator, began, tokens = trainer.recipe.train, trainer.accelerator, time.monotonic(), 0
    saved, losses, held_out_loss = first_step, [], None
    saved_at, saving = began, 0.0
    eval_set = held_out.digest() if held_out else None
    with stop_signals() as asked, run.metrics.open("a", encoding="utf-8") as metrics:

        def record(event: dict[str, Any]) -> None:
            if accelerator.is_main_process:
                metrics.write(json.dumps(event) + "\n")
                metrics.flush()
                watch(event)

        for step in range(first_step, trainer.total_steps):
            step_began = time.monotonic()
            lr = learning_rate(step, trainer.total_steps, section, trainer.recipe.lr)
            loss, grad_norm, step_tokens = form_gradients(trainer, step)
            if step == first_step:
                tell_idle(trainer)
            event: dict[str, Any] = {
                "step": step + 1,
                "steps": trainer.total_steps,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
            }
            fault = faults.judge(step + 1, loss, grad_norm, saved)
            if fault is None:
                update(trainer, lr)
                losses.append(loss)
            else:
                event |= _leave_out(run, trainer, step + 1, fault, saved)
            trainer.optimizer.zero_grad()
            tokens += step_tokens
            seconds = time.monotonic() - step_began
            done = step + 1 == trainer.total_steps
            if held_out and (done or (section.eval_every and (step + 1) % section.eval_every == 0)):
                held_out_loss = evaluate_loss(trainer, held_out)
                if math.isfinite(held_out_loss):
                    event |= {"eval_loss": held_out_loss, "eval_set": eval_set}
                else:
                    trainer.say(f"step {step + 1}: the held-out loss is {held_out_loss}")
                    held_out_loss = None
            record(event | {"tokens": step_tokens, "seconds": round(seconds, 4), "memory_bytes": peak_memory()})
            overdue = not done and _is_overdue(section, event, time.monotonic() - saved_at, saving)
            if overdue and not _has_room(run, trainer):
                trainer.say(f"step {step + 1}: no checkpoint, as there is no room for it and for that at the end")
                overdue, saved_at = False, time.monotonic()
            stopped, overdue = _any(accelerator, asked(), overdue and accelerator.is_main_process)
            if done or stopped or overdue or (section.save_every and (step + 1) % section.save_every == 0):
                save_began = time.monotonic()
                _save(run, trainer, step + 1)
                saved, saved_at = step + 1, time.monotonic()
                saving = saved_at - save_began
            if stopped and not done:
                raise Interrupted(
                    f"stopped at step {step + 1} of {trainer.total_steps}", resume_hint(trainer.recipe.output)
                )
    return {
        "steps": trainer.total_steps,
        "steps_taken": trainer.total_steps - first_step,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_loss": held_out_loss,
        "seconds": round(time.monotonic() - began, 3),
        "tokens": tokens,
        "peak_memory_bytes": peak_memory(),
    }


def _is_overdue(section: TrainSection, event: dict[str, Any], since: float, took: float) -> bool:
    """Whether it is time for a checkpoint, where the recipe does not say when: so many seconds `since` the last one,
    which `took` that many. event: what metrics say of this step."""
    waits = 1 if "eval_loss" in event or not section.eval_every else 2
    return section.save_every is None and since > waits * max(SAVE_SECONDS, SAVE_SHARE * took)


def _save(run: Run, trainer: Trainer, step: int) -> None:
    """A checkpoint after so many steps, and what is then one too many removed; all processes take part."""
    recipe, first = trainer.recipe, trainer.accelerator.is_main_process
    taken = step_examples(step - 1, len(trainer.examples), recipe, trainer.missed)
    facts = {
        "data": trainer.examples.digest(),
        "sections": sections_of(recipe),
        "missed": trainer.missed + recipe.train.batch_size - len(taken),
    }
    save_checkpoint(run, step, trainer.names, trainer.optimizer, facts, first)
    if first:
        remove_old(run, recipe.train.keep, not isinstance(recipe.adapter, FullOptions))
        if not run.exists():
            raise PissaError(
                f"{run.folder}: moved or removed while it trained; {run.checkpoints / f'step-{step}'} is saved",
                "move that into checkpoints/ of the run, where it is now, and go on there with --resume",
            )
    trainer.accelerator.wait_for_everyone()


def _has_room(run: Run, trainer: Trainer) -> bool:
    """For two checkpoints: what trains and AdamW's two moments of it, in fp32."""
    return shutil.disk_usage(run.folder).free > 2 * 3 * 4 * sum(parameter.numel() for parameter in trainer.names)


def _leave_out(run: Run, trainer: Trainer, step: int, fault: str, saved: int) -> dict[str, Any]:
    """Take a step with a fault back, and with `rollback` those since the last checkpoint, too. What metrics say of it.

    Infinite numbers are no JSON; they stand in the fault's text.
    """
    done = "left out"
    if trainer.recipe.train.on_fault == "rollback":
        _restore(trainer, run.checkpoints / f"step-{saved}")
        done = f"back to step {saved}, and on with step {step + 1}"
    trainer.say(f"step {step}: {fault}; {done}")
    return {"loss": None, "grad_norm": None, "fault": fault, "done": done}


def _restore(trainer: Trainer, checkpoint: Path) -> int:
    return restore_checkpoint(checkpoint, trainer.names, trainer.optimizer, trainer.examples.digest())


def _any(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each is true in any process."""
    if accelerator.num_processes == 1:
        return list(flags)
    count = accelerator.reduce(torch.tensor(flags, dtype=torch.float, device=accelerator.device), "sum")
    return [bool(number) for number in count]


def _trim_metrics(run: Run, first_step: int, first: bool) -> list[tuple[float, float]]:
    """Drop the lines of steps that are about to be taken again, and a line that a killed process left half-written.

    Returns (loss, gradient norm) of the sound steps that remain. Only the `first` process writes.
    """
    kept, seen = [], []
    text = run.metrics.read_text(encoding="utf-8", errors="replace") if run.metrics.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            if event["step"] <= first_step:
                kept.append(line)
                if event["loss"] is not None:
                    seen.append((float(event["loss"]), float(event["grad_norm"])))
    if first and text:
        write_text(run.metrics, "".join(f"{line}\n" for line in kept))
    return seen
