"""Training steps of Unsloth over a Llama of a given shape with random weights, for `bench_gpu`, which starts this.

python -m tests.bench_unsloth WIDTH NARROW WIDE LAYERS WORDS RANK TOKENS LENGTH...

Prints a line of JSON for each length, without and with Unsloth's checkpointing: the median step over TOKENS tokens, all
of them targets, and the peak of memory.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}

from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip  # before transformers, it asks

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pissa_cli

STEPS = 5  # of which the first two compile


def save(folder: Path, width: int, narrow: int, wide: int, layers: int, words: int) -> None:
    """A bf16 checkpoint, with a tokenizer, which Unsloth asks for."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=narrow // 128,
        max_position_embeddings=4096,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(pissa_cli.__file__).parent / "demo" / "base" / name, folder / name)


def rows(folder: str, rank: int, tokens: int, lengths: list[int], checkpointing: bool) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=max(lengths), load_in_4bit=True, dtype=torch.bfloat16
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        target_modules=targets,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (tokens // length, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        took = []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        row = {"length": length, "checkpointing": checkpointing, "seconds": sorted(took[2:])[1]}
        print(json.dumps(row | {"peak": torch.cuda.max_memory_allocated()}), flush=True)


def main() -> None:
    width, narrow, wide, layers, words, rank, tokens, *lengths = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), width, narrow, wide, layers, words)
        for checkpointing in (False, True):
            gc.collect()
            torch.cuda.empty_cache()
            rows(folder, rank, tokens, lengths, checkpointing)


if __name__ == "__main__":
    main()
