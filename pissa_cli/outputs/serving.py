"""What servers read of a LoRA folder, and what they refuse or silently ignore."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pissa_cli.base.experts import EXPERT_PARAMETERS
from pissa_cli.base.integrity import read_settings
from pissa_cli.base.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from pissa_cli.base.side_files import TOKENIZER_CONFIG
from pissa_cli.errors import UsageError
from pissa_cli.files import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_WITHOUT = {
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "GPTJForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "StableLmForCausalLM",
    "Zamba2ForCausalLM",
}
"""Classes that it serves without `SupportsLoRA`, as of 0.33."""
LLAMA_CPP_UNKNOWN = {
    "BioGptForCausalLM",
    "CodeGenForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "OPTForCausalLM",
    "XGLMForCausalLM",
}
"""Classes that its converters do not have."""
SGLANG_KINDS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj"),
    *("down_proj", "in_proj", "in_proj_qkvz", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "qkvr"),
    *("wo_ud", "fc1_latent_proj", "fc2_latent_proj", "wq_b", "wk", "weights_proj"),
}
"""How its `_KNOWN_LORA_TARGET_MODULES` are called in a checkpoint, as of 0.5.23."""
SGLANG_PARTNERS = {
    "q_proj": "v_proj",
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "up_proj": "gate_proj",
    "q_a_proj": "kv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "q_a_proj",
}
"""Layers that it stacks, and the one without which it fails; it makes up a k_proj or an up_proj of zeros by itself."""
LLAMA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TGI_KINDS = dict.fromkeys(("llama", "mistral", "granite", "gemma2", "gemma3_text"), LLAMA_KINDS) | {
    "phi3": ("qkv_proj", "o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
    "starcoder2": ("o_proj", "c_proj"),
}
"""Layers that it adds an adapter to, by `model_type`, as of its commit db931fcf: it reads those of the other layers of
Qwen2 and StarCoder2, too, but asks for them by names under which it did not put them."""


@dataclass(frozen=True)
class Rules:
    """Of a server.

    ranks: those that `--max-lora-rank` takes, empty for any. serve: its line, with {base}, {folder} and {rank}.
    separators: what a path in that line cannot have. template: by which option, and from which file, it takes another
    chat template than that of the base. require: (adapted layers, the base's config.json) -> UsageError for what it
    does not take.
    """

    name: str
    ranks: tuple[int, ...] = ()
    serve: str = ""
    separators: str = ""
    template: tuple[str, str] | None = None
    require: Callable[[set[str], dict[str, Any]], None] = lambda _layers, _base: None


def check_served(folder: Path, server: str, output: Path, plain: Path, own_template: bool = False) -> str:
    """The line that serves the LoRA files in `folder` when they are in `output`; `plain`: the folder of their base;
    own_template: they come with a chat template that the base has not.

    Raises UsageError, with the remedy, for files that this server refuses or would serve wrongly: all of them take one
    rank and one scale from adapter_config.json and ignore `rank_pattern` and `alpha_pattern`, vLLM before 0.32; none
    knows layers stored as (in, out), and each of them other layers and other models.
    """
    config, rules = read_json(folder / PEFT_CONFIG), SERVERS[server]
    if config["fan_in_fan_out"]:
        raise UsageError(f"{rules.name} serves no adapters of Conv1D layers (GPT-2's)", "export with --as merged")
    for key in ("rank_pattern", "alpha_pattern"):
        own = set(config[key]) - set(EXPERT_PARAMETERS)  # those are for PEFT's form of the experts
        if own:
            raise UsageError(
                f"{rules.name}{' before 0.32' if server == 'vllm' else ''} ignores {key}, and would serve {len(own)} "
                "layers with a wrong scale or rank",
                "export with --uniform: one rank and one scale for all layers, the same function",
            )
    if config["modules_to_save"]:
        raise UsageError(
            f"{rules.name} takes no modules_to_save ({', '.join(config['modules_to_save'])})", "export with --as merged"
        )
    rank = max([config["r"], *config["rank_pattern"].values()]) if server == "vllm" else config["r"]
    largest = max(rules.ranks, default=rank)
    if rank > largest:
        fitting = largest * config["r"] // rank
        raise UsageError(
            f"{rules.name} serves ranks up to {largest}, this adapter has {rank}",
            f"export with --rank {fitting} (recompressed, its error printed), or with --as merged",
        )
    separator = next((one for one in rules.separators if one in str(output)), None)
    if separator is not None:
        raise UsageError(
            f"{rules.name} cannot read the path {output}: '{separator}' has a meaning there", "name another one by -o"
        )
    with safe_open(folder / PEFT_WEIGHTS, framework="pt") as file:
        layers = _adapted(file.offset_keys(), rules.name)
    rules.require(layers, read_settings(plain))
    allowed = min((r for r in rules.ranks if r >= rank), default=rank)
    if server == "llama.cpp":
        return f"python convert_lora_to_gguf.py {shlex.quote(str(output))} --base {shlex.quote(str(plain))}"
    base, lora = (shlex.quote(str(path)) for path in (config["base_model_name_or_path"], output))
    revision = f" --revision {shlex.quote(config['revision'])}" if "revision" in config else ""
    line = rules.serve.format(base=base, folder=lora, rank=allowed) + revision
    if not own_template or rules.template is None:
        return line
    option, file = rules.template
    return f"{line} {option} {shlex.quote(str(output / file))}"


def _adapted(tensors: list[str], server: str) -> set[str]:
    """The names of the adapted layers."""
    for key in tensors:
        if not (key.startswith(PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise UsageError(f"{server} does not know the tensor {key}", "export with --as merged")
    return {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}


def _require_vllm(_layers: set[str], base: dict[str, Any]) -> None:
    for name in VLLM_WITHOUT & set(base.get("architectures") or []):
        raise UsageError(f"vLLM has no LoRA for {name}", "export with --as merged")


def _require_sglang(layers: set[str], _base: dict[str, Any]) -> None:
    for name in sorted(layers):
        holder, _, kind = name.rpartition(".")
        if kind not in SGLANG_KINDS:
            raise UsageError(f"SGLang has no LoRA for layers such as {name}", "export with --as merged")
        if re.search("vision|visual|audio|image", name) or not re.search(r"layers\.\d+\.", name):
            raise UsageError(
                f"SGLang would miss {name}, or take it for a layer of the language model",
                "export with --as merged, or train with layers of the language model alone as adapter.targets",
            )
        partner = SGLANG_PARTNERS.get(kind)
        if partner is not None and f"{holder}.{partner}" not in layers:
            raise UsageError(
                f"SGLang stacks {name} with {partner}, which has no adapter here",
                f"export with --as merged, or train with {partner} among adapter.targets",
            )


def _require_tgi(layers: set[str], base: dict[str, Any]) -> None:
    """TGI ignores what it does not look for, without a word: other names, and kinds that are not in all layers."""
    kind_of_model = base.get("model_type")
    kinds = TGI_KINDS.get(str(kind_of_model))
    if kinds is None:
        raise UsageError(f"TGI has no LoRA for models of the type {kind_of_model}", "export with --as merged")
    having: dict[str, set[int]] = {}
    for name in sorted(layers):
        match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", name)
        if match is None or match[2] not in kinds:
            raise UsageError(
                f"TGI would ignore the adapter of {name}: in models of the type {kind_of_model} it knows "
                f"{', '.join(kinds)}",
                "export with --as merged, or train with these as adapter.targets",
            )
        having.setdefault(match[2], set()).add(int(match[1]))
    for kind, numbers in having.items():
        lacking = set(range(base.get("num_hidden_layers", 0))) - numbers
        if lacking:
            raise UsageError(
                f"TGI would ignore the adapters of {kind}, as layer {min(lacking)} has none there",
                "export with --as merged, or train with adapter.targets that name it in all layers",
            )


def _require_llama_cpp(layers: set[str], base: dict[str, Any]) -> None:
    for name in LLAMA_CPP_UNKNOWN & set(base.get("architectures") or []):
        raise UsageError(f"llama.cpp does not know {name}", "export for another server")
    for name in sorted(layers):
        if name.endswith(".kv_b_proj"):  # it is split there, as the product of A and B cannot be
            raise UsageError(
                f"llama.cpp cannot convert the adapter of {name}",
                "export with --as merged, or train without kv_b_proj among adapter.targets",
            )


SERVERS = {
    "vllm": Rules(
        "vLLM",
        VLLM_RANKS,
        serve="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}",
        separators=",",
        template=("--chat-template", "chat_template.jinja"),
        require=_require_vllm,
    ),
    "sglang": Rules(
        "SGLang",
        serve="python -m sglang.launch_server --model-path {base} --max-lora-rank {rank} --lora-paths tuned={folder}",
        template=("--chat-template", "chat_template.jinja"),
        require=_require_sglang,
    ),
    "tgi": Rules(
        "TGI",
        serve="text-generation-launcher --model-id {base} --lora-adapters tuned={folder}",
        separators="@=,",
        template=("--tokenizer-config-path", TOKENIZER_CONFIG),
        require=_require_tgi,
    ),
    "llama.cpp": Rules("llama.cpp", require=_require_llama_cpp),
}
