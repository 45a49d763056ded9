"""`pissa init`."""

import shlex
from typing import Annotated, Any

import typer

from pissa_cli.cli import options
from pissa_cli.errors import UsageError


def init_command(
    target: options.Target = None,
    model: options.Model = None,
    method: options.Method = None,
    rank: options.Rank = None,
    svd: options.Svd = None,
    bits: options.Bits = None,
    seed: options.Seed = None,
    output: options.Output = None,
    report: Annotated[
        bool, typer.Option("--report", help="Spectra and 4-bit errors layer by layer: report.json, report.png.")
    ] = False,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Split the weights of a model into a frozen and a trained part; seconds, tensor by tensor."""
    loaded = options.load_recipe(
        target, set_, model=model, method=method, rank=rank, svd=svd, bits=bits, seed=seed, output=output
    )
    from pissa_cli.cli import dryrun, show
    from pissa_cli.evals.benches import check_names
    from pissa_cli.run.inputs import require_start

    check_names(loaded.recipe, loaded.sources)
    require_start(loaded.recipe)
    show.load_libraries(debug)
    if dry_run:
        dryrun.dry_run(loaded, as_json)
        return
    from pissa_cli.initialize import initialize
    from pissa_cli.outputs.trained import is_trained
    from pissa_cli.run.report import notes_of, summarize

    recipe = loaded.recipe
    if report and recipe.adapter.method == "full":
        raise UsageError("--report is about adapters; method full has none", "leave it out")
    show.say(f"init: {recipe.adapter.method} over {recipe.model.name}, {recipe.model.bits} bits, into {recipe.output}")
    with show.counting("init") as progress:
        manifest = initialize(recipe, progress)
    rows = summarize(manifest)
    result = {"path": recipe.output, **manifest, "summary": rows}
    for line in notes_of(manifest):
        show.say(line)
    counts = ""
    if "trainable" in manifest:
        counts = f"; {manifest['trainable']:,} numbers train (LoRA of rank 16: {manifest['trainable_lora_r16']:,})"
    lines = [
        f"{recipe.output}: ready in {manifest['seconds']:.1f} s{counts}",
        f"trained already; next: pissa eval {shlex.quote(recipe.output)}"
        if is_trained(recipe)
        else f"next: pissa train {shlex.quote(recipe.output)}{'' if recipe.data.train else ' --set data.train=FILE'}",
    ]
    if report:
        from pissa_cli.outputs.layer_report import by_kind, layer_report

        with show.counting("report") as progress:
            result["report"] = layer_report(recipe, progress)
        means = by_kind(result["report"]["layers"])
        if not as_json:
            show.print_table(report_table(means))
        lines.insert(1, f"{recipe.output}/report.json, report.png: layer by layer")
    show.print_result(result, as_json, lines, layer_table(rows) if rows else None)


def layer_table(rows: list[dict[str, Any]]) -> Any:
    """The layers by kind: rank, energy kept, relative error, and for NF4 the error beside plain NF4's (means)."""
    from rich.table import Table

    columns = {
        "kind": ("layer", "{}"),
        "layers": ("n", "{}"),
        "rank": ("rank", "{:g}"),
        "energy": ("energy kept", "{:.1%}"),
        "start_error": ("error", "{:.1e}"),
        "plain_nuclear": ("plain NF4", "{:.2f}"),
        "nuclear": ("ours", "{:.2f}"),
        "nuclear_reduction": ("less by", "{:.1f} %"),
    }
    present = {key: column for key, column in columns.items() if key in rows[-1]}
    table = Table(caption="plain NF4, ours: nuclear norm of the error" if "nuclear" in present else None)
    for title, _ in present.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(form.format(row[key]) if key in row else "-" for key, (_, form) in present.items()))
    return table


def report_table(means: list[dict[str, Any]]) -> Any:
    """Energy at a few ranks and, over NF4, errors by kind of layer."""
    from rich.table import Table

    ranks = [rank for rank in ("8", "32", "128") if all(rank in mean["energy"] for mean in means)]
    names = list(next((mean["errors"] for mean in means if "errors" in mean), {}))
    table = Table(caption="energy kept by rank; nuclear-norm errors, plain NF4 = 100" if names else None)
    for title in ("layer", "n", *(f"r {rank}" for rank in ranks), *names):
        table.add_column(title, justify="right")
    for mean in means:
        energy = (f"{mean['energy'][rank]:.1%}" for rank in ranks)
        errors = (f"{mean['errors'][name]:.1f}" if "errors" in mean else "-" for name in names)
        table.add_row(mean["kind"], str(mean["layers"]), *energy, *errors)
    return table
