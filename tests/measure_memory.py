"""Peak memory of `init` on a random 1.5 B-parameter bf16 model in many shards, above what importing takes.

python tests/measure_memory.py [FOLDER]     # about 3 GB of disk; prints a table
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}
CASES = [
    ("fast", 16, 1, 16, "all-linear"),
    ("fast", 4, 1, 128, "all-linear"),
    ("fast", 4, 5, 16, "[down_proj]"),
    ("exact", 4, 1, 16, "[down_proj]"),
    ("exact", 16, 1, 16, "[down_proj]"),
]
"""svd, bits, passes, rank, targets. down_proj is one of the largest; fewer targets save time, not memory."""
CHILD = """
import json, sys, time
import accelerate, bitsandbytes, torch, transformers
import pissa_cli.train
from pissa_cli.initialize import initialize
from pissa_cli.schema.recipe_file import load
from pissa_cli.process import peak_memory
recipe = load(None, {}, sys.argv[1:]).recipe
from bitsandbytes import functional
functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
before, began = peak_memory(), time.time()
initialize(recipe)
print(json.dumps({"imports": before, "peak": peak_memory(), "seconds": time.time() - began}))
"""


def make_model(folder: Path, config: dict[str, object] = CONFIG, shard_bytes: int = 200 * 2**20) -> int:
    """Write random bf16 weights shard by shard; returns the number of parameters."""
    import torch

    from pissa_cli.base import weights
    from pissa_cli.base.model import skeleton
    from pissa_cli.schema.recipe import ModelSection

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights.SHARD_BYTES = shard_bytes
    writer, total = weights.ShardWriter(folder), 0
    for name, parameter in skeleton(folder, ModelSection(name=str(folder))).named_parameters():
        writer.add(name, torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02)
        total += parameter.numel()
    writer.close()
    return total


def measure(model: Path, output: Path, sets: list[str]) -> dict[str, float]:
    """Run `init` in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, f"model.name={model}", f"output={output}", *sets]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(output)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        model = Path(scratch) / "model"
        total = make_model(model)
        print(f"{total:,} parameters, {len(list(model.glob('*.safetensors')))} shards, {time.strftime('%Y-%m-%d')}")
        titles = ["svd", "bits", "passes", "rank", "targets", "imports, MB", "init adds, MB", "seconds"]
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for svd, bits, passes, rank, targets in CASES:
            sets = [f"adapter.svd={svd}", f"model.bits={bits}", f"adapter.passes={passes}"]
            sets += [f"adapter.rank={rank}", f"adapter.targets={targets}"]
            found = measure(model, Path(scratch) / "out", sets)
            added = (found["peak"] - found["imports"]) / 1e6
            row = (
                svd,
                bits,
                passes,
                rank,
                targets,
                round(found["imports"] / 1e6),
                round(added),
                round(found["seconds"]),
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
