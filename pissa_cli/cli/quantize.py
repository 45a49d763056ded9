"""`pissa quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from pissa_cli.cli import options
from pissa_cli.errors import UsageError


def quantize_command(
    target: options.Target = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the 4-bit model.")] = None,
    double_quant: options.DoubleQuant = None,
    absmax: options.Absmax = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a 4-bit (NF4) model from a run, or from a dense model folder (then --output names the result)."""
    model = Path(target) if target and (Path(target) / "config.json").is_file() else None
    if model is not None:
        if not output:
            raise UsageError(f"{target} is a model, not a run", "say where its 4-bit form goes: --output FOLDER")
        loaded = options.load_recipe(None, set_, model=target, output=output)
    else:
        loaded = options.load_recipe(target, set_)
        options.require_one_run(target, loaded)
    from pissa_cli.cli import dryrun, show
    from pissa_cli.run import reached
    from pissa_cli.run.rundir import require_free, run_of

    if model is None and (not dry_run or run_of(loaded.recipe).exists()):
        reached.require_trained(loaded.recipe)
    own = run_of(loaded.recipe).quantized
    written = Path(output) if output else own
    require_free(written, own)
    show.load_libraries(debug)
    if dry_run:
        dryrun.dry_run(loaded, as_json)
        return
    from pissa_cli.quantize import quantize
    from pissa_cli.run.report import lost_in_4_bits

    with show.counting("quantize") as progress:
        result = quantize(loaded.recipe, model, written, progress, double_quant=double_quant, absmax=absmax)
    before, after = result["perplexity_before"], result["perplexity_after"]
    lines = [
        f"{result['path']}: {result['bytes'] / 2**20:,.1f} MiB (dense: {result['dense_bytes'] / 2**20:,.1f} MiB)",
        *lost_in_4_bits(result),
    ]
    if before is not None:
        lines.append(f"perplexity {before:.3f} -> {after:.3f} on {result['perplexity_data']}")
    show.print_result(result, as_json, lines)
