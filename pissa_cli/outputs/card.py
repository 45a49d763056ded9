"""The README.md of what is exported: where it came from, how, and with what figures."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pissa_cli import __version__
from pissa_cli.base.model import SMALL_FILES, resolve_base
from pissa_cli.data.tokenize import TEMPLATE
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json
from pissa_cli.run.report import left_by_peft, read_metrics
from pissa_cli.run.rundir import Run, run_of
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.data_options import sources_of
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.recipe_file import load


def model_card(recipe: Recipe, what: str, library: str = "transformers", step: int | None = None) -> str:
    """README.md of a run's export; `what` it is, e.g. "merged into one model"; step: of a checkpoint.

    With the recipe the run was trained by; of local paths only the last part is anyone's business, of the judge's
    address nothing.
    """
    run = run_of(recipe)
    if run.exists():
        recipe = load(recipe.output, {}).recipe
    name = recipe.model.name
    local = Path(name).exists()
    front: dict[str, Any] = {"library_name": library, "tags": ["pissa"]}
    if not local:
        front["base_model"] = name
    if licence := _licence(recipe):
        front["license"] = licence
    if on_hub := [source for source in sources_of(recipe.data.train) if not Path(source).exists()]:
        front["datasets"] = list(dict.fromkeys(source.partition(":")[0] for source in on_hub))
    method = recipe.adapter.method
    rank = "" if isinstance(recipe.adapter, FullOptions) else f", rank {recipe.adapter.rank}"
    base = Path(name).name if local else name
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""]
    if not run.exists():
        return "\n".join([*lines, f"# {base}", "", f"{base}, {what} with `pissa {__version__}`.", ""])
    lines += [f"# {default_repo(recipe)}", "", f"{base}, fine-tuned with `pissa {__version__}` (method {method}{rank})"]
    lines += [f"and {what}.", ""]
    if library == "peft" and (lost := run.read_manifest().get("lost_in_peft")):
        note = left_by_peft(lost)
        lines += [f"{note[0].upper()}{note[1:]}.", ""]
    if figures := _figures(run, step):
        lines += ["| figure | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in figures), ""]
    if prompt := _prompt(recipe):
        lines += ["## Prompt", "", *prompt, ""]
    content = recipe.model_dump(mode="json")
    content["train"]["lr"] = recipe.lr
    del content["eval"]["judge_url"]  # may have a password in it
    public = yaml.safe_dump(_without_folders(content), sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "## Recipe", "", "```yaml", public.rstrip(), "```", ""])


def _prompt(recipe: Recipe) -> list[str]:
    """How to ask the model, as it was in training; nothing where the rows say it all."""
    if recipe.data.format == "chat":
        how = "A conversation in the tokenizer's chat template. Answers end as its turns do: where you generate, name"
        return [f"{how} that token (`eos_token_id`, `stop_token_ids`) or text, unless generation_config.json has it."]
    if recipe.data.format != "alpaca":
        return []
    template, _, _ = (recipe.data.template or TEMPLATE).partition("{output}")
    return ["```", template, "```"]


def _without_folders(value: Any) -> Any:
    """The same with the last part alone of every absolute path and of `output`-like relative ones that exist here."""
    if isinstance(value, dict):
        return {key: _without_folders(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_folders(child) for child in value]
    if isinstance(value, str) and (Path(value).is_absolute() or ("/" in value and os.path.lexists(value))):
        return Path(value).name
    return value


def default_repo(recipe: Recipe) -> str:
    """<base>-<method>-r<rank>, without the user."""
    base = recipe.model.name.rstrip("/").rsplit("/", 1)[-1]
    rank = "" if isinstance(recipe.adapter, FullOptions) else f"-r{recipe.adapter.rank}"
    return f"{base}-{recipe.adapter.method}{rank}"


def _figures(run: Run, step: int | None) -> list[tuple[str, str]]:
    """Loss of training and on held-out data up to a step (default: the last), and what `eval` found of that one."""
    rows: list[tuple[str, str]] = []
    if run.metrics.is_file():
        events = [event for event in read_metrics(run.metrics) if step is None or event["step"] <= step]
        losses = [event["loss"] for event in events if event["loss"] is not None]
        step = events[-1]["step"] if events else step
        if losses:
            rows.append(("steps", str(events[-1]["step"])))
            rows.append(("training loss, first and last step", f"{losses[0]:.4f}, {losses[-1]:.4f}"))
        held_out = [event["eval_loss"] for event in events if "eval_loss" in event]
        if held_out:
            rows.append(("held-out loss", f"{held_out[-1]:.4f}"))
    scored = run.scores
    for path in sorted(scored.rglob("result.json")):
        if path.relative_to(scored).parts[0] in ("base", "samples"):
            continue
        with suppress(UsageError, KeyError, TypeError, ValueError):  # a damaged one is no figure of the model
            result = read_json(path)
            if result["step"] != step:
                continue
            spread = f" ± {result['stderr']:.2f}" if result["stderr"] is not None else ""
            bench = path.parent.relative_to(scored / f"step-{step}" if f"step-{step}" in path.parts else scored)
            rows.append((f"{bench}, {result['metric']}, n = {result['n']}", f"{result['score']:.2f}{spread}"))
    return rows


def _licence(recipe: Recipe) -> str | None:
    """What the base's own model card says, where it is at hand."""
    try:
        text = (resolve_base(recipe.model, [*SMALL_FILES, "README.md"]) / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1])
        return str(front["license"])
    except (UsageError, OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None
