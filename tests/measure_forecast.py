"""The forecast of memory beside what training then takes, over a random model with the shape of a Llama.

    python tests/measure_forecast.py [PAGE.md] [NAME ...]     # half an hour on two cores; names: some of COMBINATIONS

Each combination trains in a process of its own, on rows that fill `data.max_length`; each forecast is one `--dry-run`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import pissa_cli
from pissa_cli.heap import KERNELS, TUNABLES

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "pissa, fp32": {"model.bits": 32},
    "pissa, bf16": {},
    "pissa, bf16, micro-batch 8": {"train.micro_batch_size": 8},
    "pissa, bf16, length 2048": {"data.max_length": 2048},
    "pissa, bf16, padded, micro-batch 4": {"train.micro_batch_size": 4, "data.packing": "false"},
    "QPiSSA, NF4, micro-batch 8": {"model.bits": 4, "adapter.passes": 1, "train.micro_batch_size": 8},
    "lora, bf16, checkpointing, length 2048": {
        "adapter.method": "lora",
        "train.gradient_checkpointing": "true",
        "data.max_length": 2048,
    },
    "vera, bf16": {"adapter.method": "vera"},
    "svfit, fp32": {"model.bits": 32, "adapter.method": "svfit"},
    "full, fp32": {"model.bits": 32, "adapter.method": "full"},
    "lora, fp32, 2 processes": {"model.bits": 32, "adapter.method": "lora", "processes": 2},
    "pissa, fp32, 2 processes that share it": {"model.bits": 32, "processes": 2, "train.shard": "true"},
    "full, fp32, 2 processes that share it": {
        "model.bits": 32,
        "adapter.method": "full",
        "processes": 2,
        "train.shard": "true",
    },
    "full, fp32, 2 processes": {"model.bits": 32, "adapter.method": "full", "processes": 2},
}
STEPS = 3
CHILD = """
import json, sys
from pissa_cli.process import peak_memory
from pissa_cli.schema.recipe_file import load
from pissa_cli.train import train
recipe, before = load(None, {}, sys.argv[1:]).recipe, peak_memory()
print(json.dumps({"libraries": before} | train(recipe)))
"""


def make_model(folder: Path) -> Path:
    """A random bf16 model of SHAPE with the demo's tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(pissa_cli.__file__).parent / "demo" / "base" / name, folder / name)
    return folder


def write_rows(path: Path) -> Path:
    """Texts of random letters; all but the first fill any length."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnop ", k=6000 if number else 400)) for number in range(17)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def compare(sets: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Forecast and measured bytes of one combination, in all and above what importing takes."""
    options = {"model.name": scratch / "model", "data.train": scratch / "rows.jsonl", "data.format": "text"}
    out = Path(tempfile.mkdtemp(dir=scratch)) / "out"
    options |= {"output": out, "train.micro_batch_size": 1, "train.steps": STEPS} | sets
    processes = options.pop("processes", 1)
    options["train.batch_size"] = 2 * processes * options["train.micro_batch_size"]
    words = [f"{key}={value}" for key, value in options.items()]
    flags = [word for text in words for word in ("--set", text)]
    train = [sys.executable, "-m", "pissa_cli", "train", *flags, "--processes", str(processes), "--json"]
    memory = run([*train, "--dry-run"], scratch)["memory_bytes"]
    command = train if processes > 1 else [sys.executable, "-c", CHILD, *words]
    found = run(command, scratch)
    shutil.rmtree(out)
    measured, libraries = found["peak_memory_bytes"], found.get("libraries", memory.get("libraries", 0))
    return {
        "forecast": memory,
        "measured": measured,
        "ratio": memory["total"] / measured,
        "above": (memory["total"] - memory.get("libraries", 0), measured - libraries),
    }


def run(command: list[str], scratch: Path) -> dict[str, Any]:
    environment = os.environ | {
        "GLIBC_TUNABLES": ":".join(TUNABLES),
        **KERNELS,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/memory-forecast.md")
    gpus = torch.cuda.device_count()
    chosen = sys.argv[2:] or [name for name, sets in COMBINATIONS.items() if not 0 < gpus < sets.get("processes", 1)]
    kinds = ["weights", "factors", "gradients", "optimizer", "activations", "logits", "gathered", "heap", "loading"]
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model")
        write_rows(scratch / "rows.jsonl")
        with ThreadPoolExecutor(len(chosen) if gpus else 1) as pool:  # a GPU's memory is counted for each process
            results = list(pool.map(lambda name: compare(COMBINATIONS[name], scratch), chosen))
        for name, result in zip(chosen, results, strict=True):
            above, measured = result["above"]
            if "share" not in name:
                worst = max(worst, abs(result["ratio"] - 1))
            parts = " | ".join(f"{result['forecast'].get(kind, 0) / 1e6:.0f}" for kind in kinds)
            rows.append(
                f"| {name} | {parts} | {result['forecast']['total'] / 1e6:.0f} | {result['measured'] / 1e6:.0f} "
                f"| {result['ratio']:.2f} | {above / 1e6:.0f} | {measured / 1e6:.0f} | {above / measured:.2f} |"
            )
            print(rows[-1], flush=True)
    titles = ["combination", *kinds, "forecast", "measured", "ratio", "forecast above", "measured above", "ratio"]
    lines = [
        "# Forecast of memory",
        "",
        f"Made by `tests/measure_forecast.py` on {time.strftime('%Y-%m-%d')}: `pissa train --dry-run`, and then the",
        f"peak of {'allocated' if gpus else 'resident'} memory over {STEPS} steps, in MB. "
        f"{SHAPE['num_hidden_layers']} layers of Llama's shape, hidden size {SHAPE['hidden_size']}, "
        f"vocabulary {SHAPE['vocab_size']:,},",
        "106 M parameters; length 512 and micro-batches of 1 unless it says otherwise. "
        + (torch.cuda.get_device_name() if gpus else f"No GPU; one thread of {processor()}")
        + ".",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        f"The largest difference is {worst:.0%}, without the rows of processes that share a model: rough ones.",
        '"Above": without what the libraries take once they are imported.',
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *rows,
    ]
    page.write_text("\n".join(lines) + "\n")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(": ")[1] if names else platform.machine()


if __name__ == "__main__":
    main()
