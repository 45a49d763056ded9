"""`quantize`: stream a run, or a dense model, into one 4-bit model. The NF4 store itself is `matrices.quant`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pissa_cli.adapters.start import Adapter
from pissa_cli.base.integrity import read_settings, require_finite
from pissa_cli.base.loading import load_model, load_tokenizer, require_tensors
from pissa_cli.base.model import Linear, best_device, head_names, kept_dense, linear_layers, read_weight, skeleton
from pissa_cli.base.plan import require_packable, require_same_layout
from pissa_cli.base.side_files import keep_problem_type, task_of, write_4bit_config, write_nf4_config
from pissa_cli.base.weights import ShardWriter, Weights, open_weights
from pissa_cli.data.rows import is_local
from pissa_cli.errors import UsageError
from pissa_cli.files import whole_folder, write_text
from pissa_cli.initialize import Progress
from pissa_cli.matrices import quant
from pissa_cli.matrices.svd import frobenius_norm
from pissa_cli.outputs import int4
from pissa_cli.outputs.answer_ends import write_answer_ends
from pissa_cli.outputs.card import model_card
from pissa_cli.outputs.dense import dense_tensors, rounded, written_name
from pissa_cli.outputs.probes import logit_difference, perplexity, probe_logits
from pissa_cli.outputs.trained import full_folder, load_with, read_result
from pissa_cli.run.rundir import require_free, run_of
from pissa_cli.schema.adapter_options import FullOptions
from pissa_cli.schema.data_options import held_out_sources
from pissa_cli.schema.recipe import Recipe

DENSE = "leave it in 16 bits: pissa merge"


def quantize(
    recipe: Recipe,
    model_folder: Path | None = None,
    output: Path | None = None,
    progress: Progress = lambda *_: None,
    step: int | None = None,
    form: Literal["nf4", "compressed-tensors"] = "nf4",
    double_quant: bool | None = None,
    absmax: quant.Absmax | None = None,
) -> dict[str, Any]:
    """Write a 4-bit transformers folder: of a run (its result, or its checkpoint `step`), or of a dense model.

    model_folder: that model; None for the run. double_quant, absmax: how NF4 stores; None for what the recipe's `model`
    says. output: None for the run's own `quantized/` (NF4) or `int4/` (compressed-tensors), which is replaced; any
    other with something in it is a UsageError.

    Returns sizes in bytes, the layers that stay dense, the relative Frobenius error over the quantized weights, the
    differences of logits, and the perplexity before and after: on `data.eval` where the recipe has it, else on four
    built-in prompts, which says little; None for a classifier.
    """
    recipe, folder, adapter = _source(recipe, model_folder, step)
    asked = {"double_quant": double_quant, "absmax": absmax}
    recipe = recipe.with_model(**{key: value for key, value in asked.items() if value is not None})
    nf4 = form == "nf4"
    own = run_of(recipe).quantized if nf4 else run_of(recipe).int4
    output = output or own
    require_free(output, own)
    for source in held_out_sources(recipe.data):
        is_local(source)  # or it is refused now, and not after all is done
    weights, tokenizer = open_weights(folder), load_tokenizer(folder, recipe)
    model = skeleton(folder, recipe.model)
    linears = linear_layers(model, weights)
    if model_folder is not None:  # a run's base has been looked at
        require_tensors(model, weights)
    require_same_layout(model, DENSE)
    four = _nf4(recipe, model, weights, linears) if nf4 else _compressed_tensors(recipe, weights, linears)
    dense_bytes, error, norm = 0, 0.0, 0.0
    with whole_folder(output) as target:
        writer, written = ShardWriter(target), written_name(model, weights)
        parts = dense_tensors(recipe, model, weights, adapter, partial(_part, recipe, weights, four))
        for number, part in enumerate(parts):
            dense_bytes, error, norm = dense_bytes + part.dense_bytes, error + part.error, norm + part.norm
            for name, tensor in part.tensors.items():
                writer.add(written(name), tensor)
            progress(number + 1, len(weights.files), part.name)
        writer.close()
        four.write_config(target)
        if not adapter.factors:
            keep_problem_type(folder, target)
        write_answer_ends(target, recipe)
        write_text(target / "README.md", model_card(recipe, f"quantized to 4 bits ({form})", step=step))
        compared = _before_and_after(recipe, tokenizer, folder, adapter, target)
    return {
        "path": str(output),
        "bytes": writer.total_bytes,
        "dense_bytes": dense_bytes,
        "kept_dense": kept_dense(linears, four.takes, four.block),
        "relative_error": math.sqrt(error / max(norm, 1e-300)),
        "packed_experts": nf4 and any(layer.expert and layer.packable for layer in linears),
        **compared,
    }


def _source(recipe: Recipe, model_folder: Path | None, step: int | None) -> tuple[Recipe, Path, Adapter]:
    """(the recipe, folder, adapter) of what is quantized: a run's base with its adapter, or a dense model, by its own
    task and without one."""
    if model_folder is None and not isinstance(recipe.adapter, FullOptions):
        return recipe, *read_result(recipe, step)
    folder = model_folder or full_folder(recipe, step)
    settings = read_settings(folder)
    if "quantization_config" in settings:
        raise UsageError(f"{folder}: this model is quantized already", "give the dense model, or a run folder")
    return recipe.with_model(**task_of(settings)), folder, Adapter({}, {})


class _Part(NamedTuple):
    """A weight as it is written: its tensors by name, its bytes before, and the squares of what was lost and of all."""

    name: str
    tensors: dict[str, Tensor]
    dense_bytes: int
    error: float = 0.0
    norm: float = 0.0


def _part(recipe: Recipe, weights: Weights, four: _Form, name: str, linear: Linear | None, tensor: Tensor) -> _Part:
    if name in weights.files:
        require_finite(name, tensor, weights)
    if (dtype := four.recast.get(name.split(".")[0])) is not None:
        tensor = rounded(recipe, name, tensor.float(), dtype)
    size = tensor.numel() * tensor.element_size()
    if linear is None or not four.takes(linear):
        return _Part(name, {name: tensor}, size)
    W = (tensor.T if linear.transposed else tensor).to(best_device()).float().contiguous()
    tensors, back = four.pack(name, W, tensor.dtype)
    return _Part(name, tensors, size, frobenius_norm(back.sub_(W)) ** 2, frobenius_norm(W) ** 2)


@dataclass(frozen=True)
class _Form:
    """A way to write weights in 4 bits.

    takes: whether it stores a layer. block: numbers of a row that have one scale. pack: (name on disk, W (out, in)
    fp32, dtype on disk) -> (its tensors by name, W as it reads back). write_config: writes the side files of a folder.
    recast: dtypes, by parts of the model that stay dense and are not left in their own.
    """

    takes: Callable[[Linear], bool]
    block: int
    pack: Callable[[str, Tensor, torch.dtype], tuple[dict[str, Tensor], Tensor]]
    write_config: Callable[[Path], None]
    recast: Mapping[str, torch.dtype] = field(default_factory=dict)


def _nf4(recipe: Recipe, model: PreTrainedModel, weights: Weights, linears: list[Linear]) -> _Form:
    require_packable(linears, DENSE)
    heads, section = head_names(model), recipe.model
    # transformers leaves beside NF4 what is not packed as it is on disk, and multiplies no fp32 with 16 bits
    recast = dict.fromkeys(heads, read_weight(weights, linears[0], torch.device("cpu"))[1]) if heads else {}
    return _Form(
        lambda linear: linear.packable,
        quant.BLOCK_SIZE,
        lambda name, W, dtype: quant.pack_tensors(name, quant.Store(4, dtype, section.double_quant, section.absmax), W),
        lambda target: write_nf4_config(weights.folder, target, recipe, linears),
        recast,
    )


def _compressed_tensors(recipe: Recipe, weights: Weights, linears: list[Linear]) -> _Form:
    int4.require_compressed_tensors()
    group = int4.group_size(linears)
    taken = {layer.name for layer in linears if int4.takes(layer, group)}
    return _Form(
        lambda linear: linear.name in taken,
        group,
        lambda name, W, dtype: int4.pack(name, W, dtype, group),
        lambda target: write_4bit_config(weights.folder, target, recipe, taken, partial(int4.config, group)),
    )


def _before_and_after(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter: Adapter, quantized: Path
) -> dict[str, Any]:
    """Perplexity before and after quantization, on what, and the difference of logits."""
    device = best_device()
    if adapter.factors:
        model = load_with(recipe, folder, adapter, device)
    else:
        model = load_model(folder, recipe.dense).to(device).eval()
    logits = probe_logits(model, tokenizer, recipe)
    before, data = perplexity(model, tokenizer, recipe)
    del model
    model = load_model(quantized, recipe.with_model(bits=4)).to(device).eval()
    after, _ = perplexity(model, tokenizer, recipe)
    figures = {"perplexity_before": before, "perplexity_after": after, "perplexity_data": data}
    return figures | logit_difference(logits, probe_logits(model, tokenizer, recipe))
