"""What servers read of a LoRA folder, and what they refuse or silently ignore."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pissa_cli.errors import UsageError
from pissa_cli.experts import EXPERT_PARAMETERS
from pissa_cli.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from pissa_cli.rundir import read_json
from pissa_cli.weights import load_tensors

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Server:
    """ranks: those that `--max-lora-rank` takes, empty for any; serve: its line, with {base}, {folder} and {rank}."""

    name: str
    ranks: tuple[int, ...]
    serve: str = ""


SERVERS = {
    "vllm": Server(
        "vLLM", VLLM_RANKS, "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}"
    ),
    "sglang": Server(
        "SGLang",
        (),
        "python -m sglang.launch_server --model-path {base} --max-lora-rank {rank} --lora-paths tuned={folder}",
    ),
    "tgi": Server("TGI", (), "text-generation-launcher --model-id {base} --lora-adapters tuned={folder}"),
    "llama.cpp": Server("llama.cpp", ()),
}


TAKE_TEMPLATES = ("vllm", "sglang")
"""Servers with an option --chat-template."""


def require_server(name: str) -> None:
    """UsageError for a server that is not known."""
    if name not in SERVERS:
        raise UsageError(f"--for {name}: unknown server", f"known: {', '.join(SERVERS)}")


def check_served(folder: Path, server: str, output: Path, plain: Path) -> str:
    """The line that serves the LoRA files in `folder` when they are in `output`; `plain`: the folder of their base.

    Raises UsageError, with the remedy, for files that this server refuses or would serve wrongly: all of them take one
    rank and one scale from adapter_config.json and ignore `rank_pattern` and `alpha_pattern`.
    """
    config, rules = read_json(folder / PEFT_CONFIG), SERVERS[server]
    if config["peft_type"] != "LORA":
        raise UsageError(
            f"{rules.name} serves no {config['peft_type']} adapters", "export with --as lora or --as merged"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        own = set(config[key]) - set(EXPERT_PARAMETERS)  # those are for PEFT's form of the experts
        if own:
            raise UsageError(
                f"{rules.name} ignores {key}, and would serve {len(own)} layers with a wrong scale or rank",
                "export with --uniform: one rank and one scale for all layers, the same function",
            )
    if config["modules_to_save"]:
        raise UsageError(
            f"{rules.name} takes no modules_to_save ({', '.join(config['modules_to_save'])})", "export with --as merged"
        )
    rank = config["r"]
    largest = max(rules.ranks, default=rank)
    if rank > largest:
        raise UsageError(
            f"{rules.name} serves ranks up to {largest}, this adapter has {rank}",
            f"export with --rank {largest} (recompressed, its error printed), or with --as merged",
        )
    _require_plain_keys(list(load_tensors(folder / PEFT_WEIGHTS)), rules.name)
    allowed = min((r for r in rules.ranks if r >= rank), default=rank)
    if server == "llama.cpp":
        return f"python convert_lora_to_gguf.py {shlex.quote(str(output))} --base {shlex.quote(str(plain))}"
    base, lora = (shlex.quote(str(path)) for path in (config["base_model_name_or_path"], output))
    revision = f" --revision {shlex.quote(config['revision'])}" if "revision" in config else ""
    return rules.serve.format(base=base, folder=lora, rank=allowed) + revision


def _require_plain_keys(names: list[str], server: str) -> None:
    for key in names:
        if not (key.startswith(PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise UsageError(f"{server} does not know the tensor {key}", "export with --as merged")
