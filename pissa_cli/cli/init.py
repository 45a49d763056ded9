"""`pissa init`."""

from __future__ import annotations

from typing import Any

from pissa_cli.cli.options import (
    Bits,
    Debug,
    DryRun,
    Json,
    Method,
    Model,
    Output,
    Rank,
    Seed,
    Set,
    Svd,
    Target,
    load_recipe,
)


def init_command(
    target: Target = None,
    model: Model = None,
    method: Method = None,
    rank: Rank = None,
    svd: Svd = None,
    bits: Bits = None,
    seed: Seed = None,
    output: Output = None,
    set_: Set = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Split the weights of a model into a frozen and a trained part; seconds, tensor by tensor."""
    loaded = load_recipe(
        target, set_, model=model, method=method, rank=rank, svd=svd, bits=bits, seed=seed, output=output
    )
    from pissa_cli.cli import dryrun, show

    show.quiet_libraries(debug)
    if dry_run:
        dryrun.dry_run(loaded, as_json)
        return
    from pissa_cli.initialize import initialize
    from pissa_cli.report import summarize

    recipe = loaded.recipe
    show.say(f"init: {recipe.adapter.method} over {recipe.model.name}, {recipe.model.bits} bits, into {recipe.output}")
    with show.counting("init") as progress:
        manifest = initialize(recipe, progress)
    rows = summarize(manifest)
    result = {"path": recipe.output, **manifest, "summary": rows}
    lines = [
        f"{recipe.output}: ready in {manifest['seconds']:.1f} s",
        f"next: pissa train {recipe.output} --set data.train=FILE",
    ]
    show.print_result(result, as_json, lines, layer_table(rows) if rows else None)


def layer_table(rows: list[dict[str, Any]]) -> Any:
    """The layers by kind: rank, energy kept, and how far the start is from the base."""
    from rich.table import Table

    columns = {
        "kind": ("layer", "{}"),
        "layers": ("count", "{}"),
        "rank": ("rank", "{}"),
        "energy": ("energy kept", "{:.1%}"),
        "start_error": ("relative error", "{:.2e}"),
        "plain_nuclear": ("plain NF4, nuclear", "{:.2f}"),
        "nuclear": ("ours", "{:.2f}"),
        "nuclear_reduction": ("less by", "{:.1f} %"),
        "plain_frobenius": ("plain NF4, Frobenius", "{:.3f}"),
        "frobenius": ("ours", "{:.3f}"),
        "frobenius_reduction": ("less by", "{:.1f} %"),
    }
    present = {key: column for key, column in columns.items() if key in rows[0]}
    table = Table()
    for title, _ in present.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(form.format(row[key]) for key, (_, form) in present.items()))
    return table
