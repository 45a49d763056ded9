"""How far a run has come and by which recipe, looked at before torch is there."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from pissa_cli.errors import UsageError
from pissa_cli.files import read_json
from pissa_cli.run.rundir import Run, run_of
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.recipe_file import load

FACTS: dict[str, Any] = {"data": "", "sections": {}, "missed": 0}
"""What `checkpoint.save_checkpoint` writes of the training; these values stand for what a checkpoint does not say."""
LENGTH = ("steps", "epochs")
MAY_CHANGE = {"data.train", "data.eval", "data.packing"} | {
    f"train.{key}"
    for key in (
        *(*LENGTH, "eval_every", "save_every", "keep", "micro_batch_size", "gradient_checkpointing"),
        *("spike", "on_fault", "shard", "torch_compile", "use_liger_kernel"),
    )
}
"""Keys of `data` and `train` that may be others when a run goes on."""


def require_step(recipe: Recipe, resume: bool) -> None:
    """Raise as `goes_on`, for a run that was started by this recipe. For one that was started by another nothing is
    said here: `open_run` says what differs."""
    if is_started(recipe):
        goes_on(recipe, resume)


def is_started(recipe: Recipe) -> bool:
    """Whether there is a run of this recipe, by what its manifest says, of a base that goes by the same name."""
    run = run_of(recipe)
    if not run.exists():
        return False
    manifest = run.read_manifest()
    start, base = manifest.get("start"), manifest.get("base")
    if not isinstance(start, dict) or not isinstance(base, dict):
        return False
    wanted, model = start_of(recipe), recipe.model
    same = all(wanted.get(key) == value for key, value in start.items())
    return same and [base.get("name"), base.get("revision")] == [model.name, model.revision]


def start_of(recipe: Recipe) -> dict[str, Any]:
    """The values that determine the start beside the base's weights, by dotted key."""
    model = recipe.model.model_dump(mode="json", exclude={"name", "revision"})
    start = {f"model.{key}": value for key, value in model.items()}
    start |= {f"adapter.{key}": value for key, value in recipe.adapter.model_dump(mode="json").items()}
    return {**start, "seed": recipe.seed}


def goes_on(recipe: Recipe, resume: bool) -> bool:
    """Whether there are checkpoints to go on from. Refuses to overwrite a run, and to resume it with another recipe."""
    run = run_of(recipe)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        result = result_of(recipe)
        if result.is_dir():
            raise UsageError(
                f"{run.folder}: {result.name}/ is there, the checkpoints that it came from are gone",
                f"remove {result} to train anew, or use another --output",
            )
        return False
    if not resume:
        raise UsageError(
            f"{run.folder}: this run has reached {checkpoint.name}",
            f"{resume_hint(str(run.folder))} (at its end: with more steps), or use another --output",
        )
    before = sections_before(run)
    for name, section in sections_of(recipe).items():
        for key, now in section.items():
            old = before[name].get(key, now)
            if old != now and f"{name}.{key}" not in MAY_CHANGE:
                raise UsageError(
                    f"{run.folder}: {name}.{key} was {old!r} so far and is {now!r} now",
                    "resume with the same value, or start a new run with another --output",
                )
    return True


def result_of(recipe: Recipe) -> Path:
    """Where training leaves what it made: `adapter/`, or of full fine-tuning `merged/`."""
    run = run_of(recipe)
    return run.merged if isinstance(recipe.adapter, FullOptions) else run.adapter


def require_trained(recipe: Recipe, step: int | None = None) -> None:
    """UsageError where no run was made yet, or without what `trained_folder` gives."""
    run_of(recipe).read_manifest()
    trained_folder(recipe, step)


def trained_folder(recipe: Recipe, step: int | None = None) -> Path:
    """`result_of`, or the folder of checkpoint `step`. UsageError where it is not there."""
    run, full = run_of(recipe), isinstance(recipe.adapter, FullOptions)
    if step is not None:
        if full:
            raise UsageError("full fine-tuning keeps one model, no checkpoints to load", "leave out --checkpoint")
        folder = run.checkpoints / f"step-{step}"
        if not folder.is_dir():
            known = ", ".join(path.name for path in checkpoints(run))
            raise UsageError(f"{folder}: no such checkpoint", f"there are: {known or 'none'}")
        return folder
    folder, hint = result_of(recipe), "run `pissa train` to its end first"
    if not folder.is_dir():
        if (last := latest_checkpoint(run)) and not full:
            hint += f"; `pissa eval` and `pissa export` take a checkpoint: --checkpoint {step_of(last)}"
        raise UsageError(f"{run.folder}: no trained {'model' if full else 'adapter'} yet", hint)
    return folder


def sections_before(run: Run) -> dict[str, dict[str, Any]]:
    """What the run was trained by, from its newest checkpoint; by its recipe where that does not say."""
    return newest_facts(run)["sections"] or sections_of(load(str(run.folder), {}).recipe)


def sections_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What a training goes by, as in JSON, with the defaults that follow from other keys."""
    data, train = recipe.data.model_dump(mode="json"), recipe.train.model_dump(mode="json")
    follow = {"lr": recipe.lr, "head_lr": recipe.train.head_lr or recipe.lr, "precision": recipe.precision}
    return {"data": data, "train": train | follow}


def resume_hint(folder: str) -> str:
    """What to do with a run that has more steps before it."""
    return f"go on with: pissa train {shlex.quote(folder)} --resume"


def latest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint, be it damaged or not."""
    folders = checkpoints(run)
    return folders[-1] if folders else None


def newest_facts(run: Run) -> dict[str, Any]:
    """The facts in the newest checkpoint whose state can be read; FACTS where there is none."""
    for folder in reversed(checkpoints(run)):
        with suppress(UsageError):
            return facts_of(folder)
    return FACTS


def facts_of(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told. Raises UsageError for a state that cannot be read."""
    state = read_json(folder / "state.json")
    return {key: state[key] if isinstance(state.get(key), type(nothing)) else nothing for key, nothing in FACTS.items()}


def step_of(folder: Path) -> int:
    """N of checkpoints/step-N."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Run) -> list[Path]:
    """The folders step-N, the oldest first; others beside them, as copies of theirs, are left alone."""
    numbered = [(path.name.removeprefix("step-"), path) for path in run.checkpoints.glob("step-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]
