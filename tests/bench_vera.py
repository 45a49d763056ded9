"""A training step of VeRA beside LoRA's, and beside PEFT's VeRA: the same layers and tokens, ratios in one run.

python tests/bench_vera.py PAGE.md    on a GPU where there is one, two cores otherwise

Settings of the VeRA paper: GLUE, RoBERTa-base r = 1024 and large r = 256 over query and value, LoRA r = 8; E2E, GPT-2
medium and large r = 1024, LoRA r = 4; instruction tuning, LLaMA-7B in 4 bits, all linear layers, r = 1024, LoRA r = 64;
and other ranks and widths beside them. transformers' GPT-2 has query, key and value in one layer. Of each model a few
layers are there, and as much of its output head.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from machine import machine
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.adapters.start import Factors, Projections
from pissa_cli.base.attach import join_gates, share_inputs
from pissa_cli.matrices.products import has_fast_bf16
from pissa_cli.process import keep_freed_memory
from pissa_cli.training.loss import summed_loss

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 3 if DEVICE.type == "cpu" else 20


@dataclass(frozen=True)
class Setting:
    """rows x length tokens in a step; words in the part of the output head; LoRA's rank, and VeRA's."""

    name: str
    width: int
    wide: int
    layers: int
    dtype: torch.dtype
    targets: tuple[str, ...]
    rows: int
    length: int
    words: int
    lora: int
    vera: tuple[int, ...]
    nf4: bool = False

    def base(self) -> PreTrainedModel:
        torch.manual_seed(0)
        heads = self.width // 64
        shape = {"num_hidden_layers": self.layers, "num_attention_heads": heads, "intermediate_size": self.wide}
        if self.targets == LINEAR:
            config = LlamaConfig(vocab_size=self.words, hidden_size=self.width, num_key_value_heads=heads, **shape)
            model: PreTrainedModel = LlamaForCausalLM(config)
        elif self.targets == GPT2:
            still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            ends = {"bos_token_id": None, "eos_token_id": None}
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=self.words, n_embd=self.width, n_head=heads, n_layer=self.layers, **still, **ends)
            )
        else:
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = RobertaForSequenceClassification(
                RobertaConfig(vocab_size=self.words, hidden_size=self.width, **shape, **still)
            )
        model = model.to(DEVICE, self.dtype).requires_grad_(False)
        return in_nf4(model, self.targets) if self.nf4 else model


def in_nf4(model: PreTrainedModel, targets: tuple[str, ...]) -> PreTrainedModel:
    for name, layer in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in targets:
            out, inn = layer.weight.shape
            packed = Linear4bit(inn, out, bias=False, compute_dtype=layer.weight.dtype)
            packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(parent), kind, packed.to(DEVICE))
    return model


F32, BF16 = torch.float32, torch.bfloat16
ATTENTION, GPT2 = ("query", "value"), ("c_attn",)
SETTINGS = [
    Setting("GLUE, base", 768, 3072, 3, F32, ATTENTION, 32, 64, 1000, 8, (256, 1024)),
    Setting("GLUE, large", 1024, 4096, 2, F32, ATTENTION, 16, 128, 1000, 8, (256,)),
    Setting("E2E, medium", 1024, 4096, 2, F32, GPT2, 8, 256, 50257 * 2 // 24, 4, (1024,)),
    Setting("E2E, large", 1280, 5120, 2, F32, GPT2, 8, 256, 50257 * 2 // 36, 4, (1024,)),
    Setting("instructions, 4 bits", 4096, 11008, 1, BF16, LINEAR, 2, 256, 32000 // 32, 64, (64, 1024), nf4=True),
    Setting("all linear", 768, 2048, 2, F32, LINEAR, 8, 256, 1000, 64, (64, 1024)),
    Setting("all linear", 2048, 5632, 1, BF16, LINEAR, 8, 256, 1000, 64, (64, 1024)),
]
if DEVICE.type == "cuda":  # where they are trained in bf16, with more rows
    more = {"GLUE, base": 64, "GLUE, large": 32, "instructions, 4 bits": 64}
    SETTINGS = [replace(setting, dtype=BF16, rows=more.get(setting.name, setting.rows)) for setting in SETTINGS]
elif not has_fast_bf16(DEVICE):
    SETTINGS = [setting for setting in SETTINGS if setting.dtype == F32 or setting.nf4]


def adapted(model: PreTrainedModel, setting: Setting, method: str, rank: int) -> nn.Module:
    widest = setting.wide if setting.targets == LINEAR else setting.width
    num_out = 3 * setting.width if setting.targets == GPT2 else widest
    with DEVICE:
        shared = Projections(torch.randn(rank, widest) / widest**0.5, torch.randn(num_out, rank) / rank**0.5)
    for name, layer in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in setting.targets and isinstance(layer, nn.Linear | Conv1D):
            out, inn = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
            with DEVICE:
                factors: Factors = {"d": torch.full((rank,), 0.1), "b": torch.zeros(out)}
                if method == "lora":
                    factors = {"A": torch.randn(rank, inn) / inn**0.5, "B": torch.zeros(out, rank)}
            made = LowRank(layer, factors, frozenset(factors), 1.0, 0.0, shared if method == "vera" else None)
            setattr(model.get_submodule(parent), kind, made)
    share_inputs(model, lambda: model(input_ids=torch.full((1, 2), 5, device=DEVICE)))
    join_gates(model)
    return model


def step(model: nn.Module, ids: Tensor, autocast: bool) -> float:
    """Seconds of a forward and a backward pass; every token is a target, or every row has one label."""
    labels = ids.clone() if model.get_output_embeddings() is not None else torch.zeros_like(ids[:, 0])
    model.zero_grad()
    sync()
    began = time.perf_counter()
    with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
        loss = summed_loss(model, {"input_ids": ids, "labels": labels}, chunked=labels.ndim == 2)
    loss.backward()
    sync()
    return time.perf_counter() - began


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    keep_freed_memory()
    page, kept = Path(sys.argv[1]), []
    lines = ["| setting | layers x widths | dtype | tokens | what | ms a step | over LoRA |", "|---" * 7 + "|"]
    for setting in SETTINGS:
        ids = torch.randint(5, setting.words, (setting.rows, setting.length), device=DEVICE)
        lora = f"LoRA r{setting.lora}"
        models = {lora: adapted(setting.base(), setting, "lora", setting.lora)}
        for rank in setting.vera:
            models[f"VeRA r{rank}"] = adapted(setting.base(), setting, "vera", rank)
            if setting.dtype == F32 or has_fast_bf16(DEVICE):  # the peer's step takes minutes without
                config = peft.VeraConfig(r=rank, target_modules=list(setting.targets), save_projection=False)
                models[f"PEFT's VeRA r{rank}"] = peft.get_peft_model(setting.base(), config)
        took: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):  # in turn
            for name, model in models.items():
                took[name].append(step(model, ids, name.startswith("PEFT") and setting.dtype == BF16))
        shape = f"{setting.layers} x {setting.width}, {setting.wide}"
        dtype, tokens = str(setting.dtype)[6:], f"{setting.rows} x {setting.length}"
        for name, seconds in took.items():
            over = min(seconds) / min(took[lora])
            kept.append({"setting": setting.name, "shape": shape, "dtype": dtype, "what": name, "over": over})
            cells = [setting.name, shape, dtype, tokens, name, f"{min(seconds) * 1e3:.4g}", f"{over:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft"))
    where = machine() if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    text = [
        "# A step of VeRA",
        "",
        f"Made by `tests/bench_vera.py` on {time.strftime('%Y-%m-%d')}; {packages}; "
        f"{where}; forward and backward, the least of {ROUNDS}, all in turn.",
        "",
        *lines,
        "",
        "VeRA multiplies every token five times with matrices of its rank, forward and back, or three where there are",
        "so many that W and its update are one for the gradient of x; LoRA six times. With five of them, in units",
        "of width x width x tokens a square layer of width w costs 2 + 5 r / w, and 2 + 6 r / w with LoRA: over all",
        "linear layers r = 1024 beside r = 64 would be 3.5 times the work at w = 768, and 1.55 at w = 4096. That A is",
        "the same for layers of one input saves some of it: for LLaMA-7B it is 1.39 times the work.",
        "PEFT saves what B gives, tokens x out a layer, where pissa multiplies once more for the gradient of b. Where",
        "products are in fp32 W and its update are multiplied as one, which costs less than that; in bf16 that would",
        "round the update away. At equal rank VeRA is the cheaper one, and with few layers adapted, as the paper does",
        "for GLUE, all else hides it.",
        "",
    ]
    page.write_text("\n".join(text))
    page.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
