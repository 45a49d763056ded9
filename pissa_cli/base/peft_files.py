"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pissa_cli.adapters.start import Adapter, Factors, Projections
from pissa_cli.adapters.vera import projections
from pissa_cli.base.experts import EXPERT_PARAMETERS, peft_remaps
from pissa_cli.base.model import Linear
from pissa_cli.base.weights import StreamWriter, load_tensors
from pissa_cli.files import read_json, write_json

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR_NAMES = {
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "VERA": {"d": "vera_lambda_d", "b": "vera_lambda_b"},
    "SVFIT": {"A": "lora_A.weight", "B": "lora_B.weight", "d": "svfit_d"},
}
"""By `peft_type`: how the files call a factor. PEFT has no SVFIT and refuses it, as it must: read as LoRA, `init/` of
such a run would be wrong."""
PROJECTION_NAMES = ("base_model.vera_A", "base_model.vera_B")
EMBEDDING_NAMES = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
Shapes = dict[str, dict[str, tuple[int, ...]]]
"""layer -> factor -> shape."""


class PeftWriter:
    """Writes the two files, the factors layer by layer as they come; config: see `peft_config`."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        shapes: Shapes,
        saved: dict[str, Tensor] | None = None,
        embeddings: frozenset[str] = frozenset(),
        projections: Projections | None = None,
    ) -> None:
        """saved: parameters of `modules_to_save`, written at once; embeddings: names of layers that are embeddings.

        projections are written where the configuration says `save_projection`.
        """
        saved, self._embeddings = saved or {}, embeddings
        self._names = TENSOR_NAMES[config["peft_type"]]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PEFT_CONFIG, config)
        full = {self._key(n, k): factors[k] for n, factors in shapes.items() for k in self._names}
        at_once = {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
        if config.get("save_projection") and projections is not None:
            at_once |= dict(zip(PROJECTION_NAMES, projections.whole(), strict=True))
        full |= {name: tuple(tensor.shape) for name, tensor in at_once.items()}
        self._writer = StreamWriter(folder / PEFT_WEIGHTS, full)
        for name, tensor in at_once.items():
            self._writer.add(name, tensor)

    def add(self, layer: str, factors: Factors) -> None:
        for key, factor in factors.items():
            self._writer.add(self._key(layer, key), factor)

    def close(self) -> None:
        self._writer.close()

    def _key(self, layer: str, key: str) -> str:
        return f"{PREFIX}{layer}.{(EMBEDDING_NAMES if layer in self._embeddings else self._names)[key]}"


def write_peft(folder: Path, adapter: Adapter, config: dict[str, Any]) -> None:
    """Write a whole adapter."""
    shapes = {n: {key: tuple(f.shape) for key, f in factors.items()} for n, factors in adapter.factors.items()}
    writer = PeftWriter(folder, config, shapes, adapter.saved, adapter.embeddings, adapter.projections)
    for name, factors in adapter.factors.items():
        writer.add(name, factors)
    writer.close()


def read_peft(folder: Path, widest: Sequence[int] | None = None) -> tuple[dict[str, Any], Adapter]:
    """The configuration and the adapter of a folder whose files are those that were written, fp32.

    widest: (out, in) of VeRA's projections.
    """
    config, tensors = read_json(folder / PEFT_CONFIG), load_tensors(folder / PEFT_WEIGHTS)
    factors: dict[str, Factors] = {}
    saved: dict[str, Tensor] = {}
    embeddings = set()
    stored = [tensors.pop(name).float() for name in PROJECTION_NAMES if name in tensors]
    suffixes = [*TENSOR_NAMES[config["peft_type"]].items(), *EMBEDDING_NAMES.items()]
    for full, tensor in tensors.items():
        key, suffix = next(((k, suffix) for k, suffix in suffixes if full.endswith(f".{suffix}")), (None, ""))
        name = full.removeprefix(PREFIX)
        if key is None:
            saved[name] = tensor
            continue
        layer = name.removesuffix(f".{suffix}")
        if suffix in EMBEDDING_NAMES.values():
            embeddings.add(layer)
        factors.setdefault(layer, {})[key] = tensor.float()
    scales = {layer: _scale(config, layer, rank_of(found)) for layer, found in factors.items()}
    shared = None
    if config["peft_type"] == "VERA":
        assert widest is not None, "VeRA's projections need the widest layer"
        seed, rank = config["projection_prng_key"], config["r"]
        shared = Projections(*stored) if len(stored) == 2 else projections(seed, rank, *widest)
    return config, Adapter(factors, scales, shared, saved, frozenset(embeddings))


def peft_config(
    peft_type: str,
    base: str,
    revision: str | None,
    ranks: dict[str, int],
    scales: dict[str, float],
    targets: dict[str, list[str]],
    fan_in_fan_out: bool,
    seed: int,
    saved: Iterable[str] = (),
    heads: Sequence[str] = (),
    save_projection: bool = False,
) -> dict[str, Any]:
    """adapter_config.json of an adapter: r and lora_alpha of most layers, and patterns for the others.

    `init_lora_weights` is always true: any other value makes PEFT decompose the base again on loading. VeRA's
    projections are made again from `seed`, or stored with `save_projection`. saved: names of whole trained parameters;
    heads: the parts of a classifier's head, of which PEFT saves all or nothing. revision: of a base on the Hub.
    targets: `target_modules`, and where there are such `target_parameters`, by whose names PEFT looks up patterns.
    """
    alphas = {name: float(f"{scales[name] * rank:.15g}") for name, rank in ranks.items()}  # 16 / 49 * 49 is below 16
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        **({"revision": revision} if revision and not Path(base).is_absolute() else {}),
        "r": rank,
        **targets,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "modules_to_save": sorted({_module(name, heads) for name in saved}) or None,
        "inference_mode": True,
    }
    if peft_type == "VERA":
        return config | {"projection_prng_key": seed, "save_projection": save_projection, "vera_dropout": 0.0}
    parameters = targets.get("target_parameters", [])  # which PEFT looks up by their own names
    layers = {name: name for name in ranks} | {name: name.removesuffix(".weight") for name in parameters}
    rank_pattern = {n: ranks[layer] for n, layer in layers.items() if ranks.get(layer, rank) != rank}
    alpha_pattern = {n: alphas[layer] for n, layer in layers.items() if alphas.get(layer, alpha) != alpha}
    remapped = EXPERT_PARAMETERS[0] not in parameters
    for parameter, times, layer in _expert_parameters(ranks):
        known = times if remapped else 1  # what PEFT takes r and alpha times by itself
        if times * ranks[layer] != known * rank or times * alphas[layer] != known * alpha:
            rank_pattern[parameter], alpha_pattern[parameter] = times * ranks[layer], times * alphas[layer]
    return config | {
        "lora_alpha": _tidy(alpha),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {name: _tidy(value) for name, value in alpha_pattern.items()},
    }


def peft_targets(
    targets: Iterable[str], layers: list[Linear], model: PreTrainedModel, peft_type: str
) -> dict[str, list[str]]:
    """How adapter_config.json names the layers `targets`: `target_modules`, and `target_parameters` where they are
    needed. targets: full names of some of the `layers` of the model.

    `target_modules` are kinds of layer (q_proj) if these name exactly those layers, else the full names. For LoRA, PEFT
    takes some kinds for those of 3-D experts (`peft_remaps`). Other layers of such a kind (shared experts, layers
    without experts, a router) are named in `target_parameters`, which PEFT leaves as they are. So are 3-D parameters
    themselves where it would not come upon them.
    """
    names = set(targets)
    remapped = peft_remaps(model) if peft_type != "VERA" else set()
    experts = {layer.name: layer.expert.part for layer in layers if layer.expert is not None and layer.name in names}
    apart = {layer.name for layer in layers if layer.name in names - set(experts) and layer.kind in remapped}
    rest = names - apart - (set() if remapped else set(experts))
    kinds = {name.rsplit(".", 1)[-1] for name in rest}
    seen = {
        layer.name for layer in layers if layer.kind in kinds and (layer.kind in remapped) == (layer.expert is not None)
    }
    known = {layer.name for layer in layers}
    seen |= {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds and name not in known}
    parameters = {f"{name}.weight" for name in apart}
    if experts and not remapped:
        parameters |= set(EXPERT_PARAMETERS)
    elif experts and "down" not in experts.values():
        parameters.add(EXPERT_PARAMETERS[1])  # PEFT puts the adapter of gate and up inside that of down
    found = {"target_modules": sorted(kinds if seen == rest else rest)}
    return found | ({"target_parameters": sorted(parameters)} if parameters else {})


def reader_of(config: dict[str, Any], layers: Iterable[str]) -> str:
    """Who loads an adapter of these layers. Of those with experts 0.18 leaves some out without a word."""
    experts = any(".experts." in name for name in layers)
    return "PEFT 0.20 or later" if experts or config.get("target_parameters") else "PEFT"


def _module(parameter: str, heads: Sequence[str]) -> str:
    top = parameter.split(".")[0]
    return top if top in heads else parameter.rpartition(".")[0]


def _expert_parameters(layers: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """(3-D parameter, how many of an expert's matrices it holds, one layer that is such a matrix), where there are."""
    found = {name.rpartition(".")[2]: name for name in layers if ".experts." in name}
    for kind, parameter, times in (("gate_proj", 0, 2), ("w1", 0, 2), ("down_proj", 1, 1), ("w2", 1, 1)):
        if kind in found:
            yield EXPERT_PARAMETERS[parameter], times, found[kind]


def rank_of(factors: Factors) -> int:
    """r of a layer."""
    return int(factors["A" if "A" in factors else "d"].shape[0])


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    if config["peft_type"] == "VERA":
        return 1.0
    return float(config["alpha_pattern"].get(layer, config["lora_alpha"]) / rank)


def _tidy(value: float) -> float:
    return int(value) if value == int(value) else value
