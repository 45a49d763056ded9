"""`--dry-run`: the resolved recipe with the source of every value, what would train, and the memory it would take."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pissa_cli.cli.show import print_result
from pissa_cli.recipe_file import Loaded, listing


def dry_run(loaded: Loaded, as_json: bool) -> None:
    """Print the plan; reads the configuration of the base, writes nothing."""
    from pissa_cli.model import SMALL_FILES, resolve_base
    from pissa_cli.plan import make_plan, memory_estimate

    recipe = loaded.recipe
    planned = make_plan(recipe, resolve_base(recipe.model, SMALL_FILES))
    estimate = memory_estimate(recipe, planned)
    result: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "sources": {key: source for key, _, source in listing(loaded)},
        "base": str(planned.folder),
        "layers": len(planned.targets),
        "trainable": planned.num_trainable(recipe),
        "parameters": planned.num_total,
        "memory_bytes": estimate,
    }
    table = Table(title="recipe", title_justify="left")
    for column in ("key", "value", "from"):
        table.add_column(column, overflow="fold")
    for row in listing(loaded):
        table.add_row(*row)
    share = result["trainable"] / result["parameters"]
    lines = [
        f"base {planned.folder}: {result['parameters']:,} parameters, {result['trainable']:,} train ({share:.2%}), "
        f"in {result['layers']} layers",
        "memory of training, estimated: "
        + ", ".join(f"{key} {value / 2**30:.2f} GiB" for key, value in estimate.items()),
        "dry run: nothing was written",
    ]
    print_result(result, as_json, lines, table)
