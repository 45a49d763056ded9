"""What lies beside the weights of a model folder: configuration, tokenizer, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa_cli import quant
from pissa_cli.model import DTYPES, Linear, skeleton
from pissa_cli.recipe import Recipe
from pissa_cli.rundir import read_json, write_json


def write_nf4_config(source: Path, target: Path, recipe: Recipe, linears: list[Linear], double_quant: bool) -> None:
    """The side files of `source` in `target`, and a config.json that says which layers are NF4 and which are not."""
    copy_side_files(source, target)
    names = {layer.name for layer in linears if layer.packable}
    modules = skeleton(source, recipe.model.trust_remote_code).named_modules()
    dense = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D) and name not in names]
    content = read_json(source / "config.json")
    compute_dtype = str(DTYPES[recipe.precision]).removeprefix("torch.")
    content["quantization_config"] = quant.config(double_quant, compute_dtype, dense)
    write_json(target / "config.json", content)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, chat template, licence."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".model", ".txt", ".jinja", ".py") or path.name.startswith("LICENSE")
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
