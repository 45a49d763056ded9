"""A training step of VeRA beside LoRA's, and beside PEFT's VeRA: the same layers and tokens, ratios in one run.

python tests/bench_vera.py PAGE.md

Settings of the papers (VeRA, table 8 and appendix): LoRA r = 64; VeRA r = 1024, and 256 and 64 beside it.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.adapters.start import Factors, Projections
from pissa_cli.process import keep_freed_memory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (64, 256, 1024)
ROUNDS = 4
SHAPES = [(768, 2048, 2, torch.float32), (768, 2048, 2, torch.bfloat16), (2048, 5632, 1, torch.bfloat16)]
ROWS, LENGTH = 8, 256


def base(width: int, wide: int, layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    heads = width // 64
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(vocab_size=1000, hidden_size=width, intermediate_size=wide, **shape)
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def adapted(model: nn.Module, method: str, rank: int, widest: int) -> nn.Module:
    shared = Projections(torch.randn(rank, widest) / widest**0.5, torch.randn(widest, rank) / rank**0.5)
    for name, layer in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in TARGETS and isinstance(layer, nn.Linear):
            out, inn = layer.weight.shape
            factors: Factors = {"d": torch.full((rank,), 0.1), "b": torch.zeros(out)}
            if method == "lora":
                factors = {"A": torch.randn(rank, inn) / inn**0.5, "B": torch.zeros(out, rank)}
            made = LowRank(layer, factors, frozenset(factors), 1.0, 0.0, shared if method == "vera" else None)
            setattr(model.get_submodule(parent), kind, made)
    return model


def step(model: nn.Module, ids: Tensor, autocast: bool) -> float:
    model.zero_grad()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids).logits.float().square().mean()
    loss.backward()
    return time.perf_counter() - began


def main() -> None:
    keep_freed_memory()
    page, kept = Path(sys.argv[1]), []
    lines = ["| shape | dtype | what | ms a step | over LoRA |", "|---|---|---|---|---|"]
    for width, wide, layers, dtype in SHAPES:
        shape = (width, wide, layers, dtype)
        ids = torch.randint(0, 1000, (ROWS, LENGTH))
        models = {"LoRA r64": adapted(base(*shape), "lora", 64, wide)}
        for rank in RANKS:
            models[f"VeRA r{rank}"] = adapted(base(*shape), "vera", rank, wide)
            config = peft.VeraConfig(r=rank, target_modules=TARGETS, save_projection=False)
            models[f"PEFT's VeRA r{rank}"] = peft.get_peft_model(base(*shape), config)
        took: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):  # in turn
            for name, model in models.items():
                took[name].append(step(model, ids, name.startswith("PEFT") and dtype == torch.bfloat16))
        for name, seconds in took.items():
            over = min(seconds) / min(took["LoRA r64"])
            kept.append({"shape": shape[:3], "dtype": str(dtype), "what": name, "seconds": min(seconds), "over": over})
            cells = [f"{layers} x {width}, {wide}", str(dtype)[6:], name, f"{min(seconds) * 1e3:.0f}", f"{over:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("pissa", "torch", "peft"))
    text = [
        "# A step of VeRA",
        "",
        f"Made by `tests/bench_vera.py` on {time.strftime('%Y-%m-%d')}; {packages}; {platform.machine()}, "
        f"{torch.get_num_threads()} threads; forward and backward over {ROWS * LENGTH} tokens, the least of {ROUNDS}.",
        "",
        *lines,
        "",
        "VeRA multiplies every token five times with matrices of its rank, forward and back; LoRA six times. In units",
        "of width x width x tokens a square layer of width w costs 2 + 5 r / w, and 2 + 6 r / w with LoRA: r = 1024",
        "over r = 64 is 3.5 at w = 768 and 1.55 at w = 4096, of which attention and all else hide a part. At equal",
        "rank VeRA is the cheaper one.",
        "",
    ]
    page.write_text("\n".join(text))
    page.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
