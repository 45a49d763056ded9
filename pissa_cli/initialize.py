"""`init`: split every target weight, tensor by tensor from disk, and record how it was done."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pissa_cli import __version__
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Factors, Layer, Start, as_lora
from pissa_cli.base.folder import local_base
from pissa_cli.base.integrity import hashes, require_finite, sealed, settings_hash
from pissa_cli.base.model import SMALL_FILES, Linear, best_device, kept_dense, resolve_base
from pissa_cli.base.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, PeftWriter, peft_config
from pissa_cli.base.plan import Plan, make_plan
from pissa_cli.base.ranks import with_auto_ranks
from pissa_cli.base.side_files import write_nf4_config
from pissa_cli.base.weights import Fingerprint, ShardWriter, Weights, fingerprint, open_weights
from pissa_cli.errors import PissaError
from pissa_cli.files import whole_folder, write_json, write_text
from pissa_cli.matrices import quant
from pissa_cli.matrices.panels import converted, minus, minus_product
from pissa_cli.matrices.pipeline import in_flight, in_order
from pissa_cli.matrices.svd import frobenius_norm, nuclear_norm
from pissa_cli.process import keep_freed_memory, release_freed_memory
from pissa_cli.run.inputs import require_place
from pissa_cli.run.reached import start_of
from pissa_cli.run.rundir import Run, run_of
from pissa_cli.run.started import FORMAT, frozen_base, open_run, require_init
from pissa_cli.schema.adapter_options import FullOptions, ScaledBase
from pissa_cli.schema.recipe import Recipe
from pissa_cli.schema.recipe_file import dump

START_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
Progress = Callable[[int, int, str], None]
"""Called with (tensors done, tensors in all, name of the tensor)."""


def initialize(recipe: Recipe, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Make the run folder of `recipe` and return its manifest; a run of the same recipe is left as it is.

    Raises UsageError for bad input and for a folder that holds something else; nothing is written then.
    """
    run = run_of(recipe)
    if run.exists():
        manifest = open_run(recipe)[1]
        require_init(run, manifest)
        return manifest
    require_place(run)
    plan, weights = plan_start(recipe)
    if isinstance(recipe.adapter, ScaledBase) and recipe.adapter.rank == "auto":
        plan = with_auto_ranks(recipe.adapter, plan, weights, progress)
    manifest = _write_run(recipe, plan, weights, run, progress)
    release_freed_memory()
    return manifest


def plan_start(recipe: Recipe) -> tuple[Plan, Weights]:
    """The plan of a new run, and the weights of its base. What is wrong by the configuration of a base on the Hub costs
    no download of its weights."""
    if local_base(recipe.model) is None:
        make_plan(recipe, resolve_base(recipe.model, SMALL_FILES))
    weights = open_weights(resolve_base(recipe.model))
    return make_plan(recipe, weights.folder, weights), weights


def _write_run(recipe: Recipe, plan: Plan, weights: Weights, run: Run, progress: Progress) -> dict[str, Any]:
    began = time.monotonic()
    adapter = recipe.adapter
    base: dict[str, Any] = {
        "name": recipe.model.name,
        "revision": recipe.model.revision,
        "folder": str(plan.folder.resolve()),
        "settings": settings_hash(plan.folder),
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": _versions(),
        "start": start_of(recipe),
        "base": base,
        "method": adapter.method,
        "unused": plan.unused,
    }
    with whole_folder(run.folder) as folder:
        staged = Run(folder)
        if isinstance(adapter, FullOptions):
            base["fingerprint"] = fingerprint(weights.folder)
        else:
            manifest |= _split(recipe, plan, weights, staged, progress)
            base |= manifest.pop("stored")
        manifest["seconds"] = round(time.monotonic() - began, 3)
        write_text(staged.recipe, dump(recipe))
        manifest = sealed(manifest)
        write_json(staged.manifest, manifest)
    return manifest


def _split(recipe: Recipe, plan: Plan, weights: Weights, staged: Run, progress: Progress) -> dict[str, Any]:
    """Write `init/` and, for NF4, `base/` of `staged`, which becomes the run; returns what the manifest says of it."""
    method, four = METHODS[recipe.adapter.method], recipe.model.bits == 4
    config = peft_config(
        peft_type=method.peft_type,
        base=frozen_base(recipe),
        revision=recipe.model.revision,
        ranks=plan.ranks,
        scales=plan.scales,
        targets=plan.peft_targets,
        fan_in_fan_out=not four and any(layer.transposed and not layer.embedding for layer in plan.targets),
        seed=recipe.seed,
        heads=plan.heads,
    )
    embeddings = frozenset(layer.name for layer in plan.targets if layer.embedding)
    start = PeftWriter(staged.init, config, plan.factor_shapes(), embeddings=embeddings)
    store = ShardWriter(staged.base) if four else None
    whole, stored = Fingerprint(), Fingerprint()
    figures = {}
    for number, item in enumerate(_work(recipe, plan, weights)):
        whole.add(item.tensor, item.original)
        if item.factors is not None:
            start.add(item.name, item.factors)
            figures[item.name] = item.figures
        if store is not None:
            for name, tensor in item.stored.items():
                stored.add(name, tensor)
                store.add(name, tensor)
        progress(number + 1, len(weights.files), item.tensor)
    start.close()
    facts = {"fingerprint": whole.digest(), "bytes": weights.num_bytes()}
    if store is not None:
        store.close()
        facts |= {"stored_fingerprint": stored.digest(), "stored_bytes": store.total_bytes}
        write_nf4_config(plan.folder, staged.base, recipe, plan.linears)
        facts["stored_settings"] = settings_hash(staged.base)
    return {
        "init_hashes": hashes(staged.init, (PEFT_CONFIG, PEFT_WEIGHTS)),
        "passes": recipe.passes,
        "widest": plan.widest,
        "trainable": plan.num_trainable(recipe),
        "trainable_lora_r16": plan.num_lora(16),
        "layers": [figures[layer.name] for layer in plan.targets],
        "left_out": plan.left_out,
        "lost_in_peft": plan.lost_in_peft,
        "kept_dense": kept_dense(plan.linears, lambda layer: layer.packable, quant.BLOCK_SIZE) if four else {},
        "packed_experts": four and any(layer.expert and layer.packable for layer in plan.linears),
        "stored": facts,
    }


@dataclass(frozen=True)
class _Item:
    """One tensor of the base after init: the original, what `base/` holds of it, by the names of the base's own files,
    and the factors of its start; all on the CPU."""

    tensor: str
    name: str
    original: Tensor
    stored: dict[str, Tensor]
    factors: Factors | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def _work(recipe: Recipe, plan: Plan, weights: Weights) -> Iterator[_Item]:
    """Every tensor of the base in file order."""
    keep_freed_memory()
    linears = {layer.tensor: layer for layer in plan.linears}
    largest = max(t.num_out * t.num_in for t in plan.linears if not t.embedding or t.name in plan.ranks)

    def work(tensor: str) -> _Item:
        return _one_tensor(recipe, plan, weights, tensor, linears.get(tensor))

    return in_order(work, weights.files, *in_flight(largest, best_device()))


def _one_tensor(recipe: Recipe, plan: Plan, weights: Weights, tensor: str, linear: Linear | None) -> _Item:
    """linear: the layer whose weight the tensor is, where it is one."""
    original = weights.read(tensor)
    adapted = linear is not None and linear.name in plan.ranks
    four = recipe.model.bits == 4 and linear is not None and linear.packable
    if linear is None or not (adapted or four):
        require_finite(tensor, original, weights)
        return _Item(tensor, tensor, original, {tensor: original})
    W = original.to(best_device())
    require_finite(tensor, W, weights)
    W = converted(W, torch.float32)
    W = W.T.contiguous() if linear.transposed else W
    dtype = {4: original.dtype, 16: torch.bfloat16, 32: torch.float32}[recipe.model.bits]
    store = quant.Store(4 if four else 16, dtype, recipe.model.double_quant, recipe.model.absmax)
    if not adapted:
        return _Item(tensor, linear.name, original, _stored(linear, quant.pack(store, W)))
    layer = Layer(linear.name, plan.ranks[linear.name], plan.scales[linear.name], recipe.seed, store, linear.embedding)
    options = {**recipe.adapter.model_dump(), "passes": recipe.passes if four else 1}
    start = METHODS[recipe.adapter.method].start(W, layer, options)
    figures = {"name": linear.name, "kind": linear.kind, "shape": [linear.num_out, linear.num_in], "rank": layer.rank}
    figures |= start.figures | _errors(W, start, layer)
    stored = _stored(linear, start.frozen) if recipe.model.bits == 4 else {}
    factors = {key: factor.cpu() for key, factor in start.factors.items()}
    return _Item(tensor, linear.name, original, stored, factors, figures)


def _stored(linear: Linear, frozen: quant.Packed | Tensor) -> dict[str, Tensor]:
    """The tensors of a frozen weight (out, in), as the base's files name and lay them out."""
    if isinstance(frozen, Tensor):
        return {linear.tensor: (frozen.T.contiguous() if linear.transposed else frozen).cpu()}
    return {name: part.cpu() for name, part in frozen.tensors(linear.tensor).items()}


def _errors(W: Tensor, start: Start, layer: Layer) -> dict[str, float]:
    """How far the start, frozen part and s B A together, is from W: `start_error`, relative in the Frobenius norm. For
    NF4 also `frobenius` and `nuclear`, its norms, and `plain_frobenius` and `plain_nuclear`, those of W stored in NF4
    as it is. Raises PissaError where the error of a dense store is more than rounding."""
    error = minus(quant.read(start.frozen), W)
    factors = as_lora(start.factors)
    if "A" in factors:  # VeRA's b is zero, so that its projections add nothing
        minus_product(error, layer.scale * factors["B"], factors["A"], -1.0, into=error)
    norm = frobenius_norm(error)
    relative = norm / max(frobenius_norm(W), 1e-30)
    if layer.store.bits == 4:
        figures = {"start_error": relative, "frobenius": norm, "nuclear": nuclear_norm(error)}
        error = quant.lost(W, "largest")
        return figures | {"plain_frobenius": frobenius_norm(error), "plain_nuclear": nuclear_norm(error)}
    if not relative <= START_TOLERANCE[layer.store.dtype]:
        raise PissaError(
            f"{layer.name}: the split does not give the weight back (relative error {relative:.1e})",
            "try --svd exact, and please report it with the model",
        )
    return {"start_error": relative}


def _versions() -> dict[str, str]:
    found = {"pissa": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # 16 bits need no bitsandbytes
            found[package] = importlib.metadata.version(package)
    return found
