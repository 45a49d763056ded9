"""`pissa export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pissa_cli.cli import options
from pissa_cli.errors import UsageError

if TYPE_CHECKING:
    from pissa_cli.schema.recipe import Recipe


def export_command(
    target: options.Target = None,
    form: Annotated[
        Literal["lora", "merged", "nf4", "compressed-tensors"],
        typer.Option(
            "--as",
            help="lora: PEFT LoRA on the plain base; merged: a dense model; nf4, compressed-tensors: a 4-bit model.",
        ),
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=1, help="Recompress the LoRA to this rank; the error is printed.")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank and one scale for all layers (the same function).")
    ] = False,
    server: Annotated[
        Literal["vllm", "sglang", "tgi", "llama.cpp"] | None,
        typer.Option("--for", help="Check the LoRA by the rules of a server."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    double_quant: options.DoubleQuant = None,
    absmax: options.Absmax = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the logits before and after.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write; default: inside the run.")
    ] = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a run, or one of its checkpoints, in a form that other programs load."""
    loaded = options.load_recipe(target, set_)
    options.require_one_run(target, loaded)
    from pissa_cli.cli import dryrun, show
    from pissa_cli.run import reached
    from pissa_cli.run.rundir import require_free, run_of

    if form != "lora" and (rank is not None or uniform or server is not None):
        raise UsageError(f"--rank, --uniform and --for are about LoRA files, not --as {form}", "leave them out")
    if form != "nf4" and (double_quant is not None or absmax is not None):
        raise UsageError(f"--double-quant and --absmax are about NF4, not --as {form}", "leave them out")
    if not dry_run or run_of(loaded.recipe).exists():
        reached.require_trained(loaded.recipe, checkpoint)
    recipe, run = loaded.recipe, run_of(loaded.recipe)
    own = {"lora": run.exported, "merged": run.merged, "nf4": run.quantized, "compressed-tensors": run.int4}[form]
    folder = Path(output) if output else own
    require_free(folder, own)
    show.load_libraries(debug)
    if dry_run:
        dryrun.dry_run(loaded, as_json)
        return
    from pissa_cli.export import export_lora
    from pissa_cli.merge import merge
    from pissa_cli.quantize import quantize

    with show.counting("export") as progress:
        if form == "merged":
            result = merge(recipe, progress, output=folder, step=checkpoint)
        elif form != "lora":
            result = quantize(
                recipe, None, folder, progress, step=checkpoint, form=form, double_quant=double_quant, absmax=absmax
            )
        else:
            result = export_lora(
                recipe, folder, rank=rank, uniform=uniform, server=server, step=checkpoint, check=check
            )
    show.print_result(result, as_json, _summary(recipe, form, rank, result))


def _summary(recipe: "Recipe", form: str, rank: int | None, result: dict[str, Any]) -> list[str]:
    """What was written and how exact it is, for the person watching; rank: as it was asked for."""
    from pissa_cli.run.report import lost_in_4_bits

    lines = [f"{result['path']}: {result['bytes'] / 2**20:,.1f} MiB"]
    if form == "lora":
        least, most = result["ranks"]
        ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
        error = result["relative_error"]
        exactness = f"relative error of the change {error:.2e}" if error else "exact"
        lines.append(f"LoRA of {ranks} for {result['base']}, {exactness}")
        if rank is not None and rank > most:
            lines.append(f"--rank {rank}: there is no more to write than rank {most}")
        if recipe.model.bits == 4:
            lines.append(
                "what 4-bit storage lost of the base is no part of it; exactly as it was trained, with that loss: "
                f"--as merged, or {recipe.output}/adapter on {recipe.output}/base"
            )
    elif form != "merged":
        lines += lost_in_4_bits(result)
    if result.get("relative_logit_difference") is not None:
        lines.append(f"difference of logits: {result['relative_logit_difference']:.1e} relative")
    if result.get("serve"):
        lines.append(f"serve it: {result['serve']}")
    for text, number in result.get("unknown_ends", {}).items():
        end = repr(text) if number is None else f"{text!r} (token {number})"
        how = "name it where you generate (eos_token_id, stop_token_ids or stop)"
        lines.append(f"answers end with {end}, where this base goes on: {how}")
    return lines
