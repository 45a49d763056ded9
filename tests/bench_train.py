"""Training against PEFT + transformers' Trainer: the same examples in steps of the same size, ratios in one run.

python tests/bench_train.py PAGE.md TRAIN.jsonl MODEL[:EXAMPLES[:ROUNDS]] ...

A MODEL is a folder, or `llama-110m` (random).
Rows are (question, answer), as those of GSM8K. Each run has a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import machine

from pissa_cli.heap import KERNELS, TUNABLES

BATCH, MICRO, RANK, RATE, MAX_LENGTH = 32, 8, 16, 1e-3, 512
EXAMPLES = {"llama-110m": 128}  # of 1,000, which take it an hour
ROUNDS = {"llama-110m": 1}  # of 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TITLES = {"ours": "pissa", "peer": "PEFT + Trainer", "grouped": "PEFT + Trainer, group_by_length"}


def llama_110m(folder: Path, tokenizer: Path) -> Path:
    """A Llama of 110 M parameters with random weights, and the tokenizer of another model."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=9,
        num_attention_heads=12,
        num_key_value_heads=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def ours(model: str, rows: str, examples: int, folder: Path) -> dict[str, Any]:
    from pissa_cli.schema.recipe_file import load
    from pissa_cli.train import train

    sets = [f"model.name={model}", f"output={folder}", f"data.train={rows}", f"data.limit={examples}"]
    sets += ["data.columns={instruction: question, output: answer}", f"data.max_length={MAX_LENGTH}"]
    sets += [f"adapter.rank={RANK}", f"train.lr={RATE}", f"train.batch_size={BATCH}", "train.epochs=1"]
    sets += [f"train.micro_batch_size={MICRO}", "train.warmup=0", "train.schedule=constant", "train.save_every=100000"]
    recipe = load(None, {}, sets).recipe
    losses: list[float] = []
    figures = train(recipe, watch=lambda event: losses.append(event["loss"]) if "loss" in event else None)
    return {"seconds": figures["seconds"], "losses": losses}


def peer(model: str, rows: str, examples: int, folder: Path, grouped: bool) -> dict[str, Any]:
    """The same tokens in the same order (but for grouping), with dynamic padding."""
    import peft
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from pissa_cli.base.loading import load_tokenizer
    from pissa_cli.data.tokenize import load_examples
    from pissa_cli.schema.recipe_file import load
    from pissa_cli.training.steps import step_examples

    sets = [f"model.name={model}", f"data.train={rows}", f"data.limit={examples}", f"train.batch_size={BATCH}"]
    sets += ["data.columns={instruction: question, output: answer}", f"data.max_length={MAX_LENGTH}"]
    recipe = load(None, {}, sets).recipe
    tokenizer = load_tokenizer(Path(model), recipe)
    loaded = load_examples(rows, recipe.data, tokenizer, None)
    order = [i for step in range(-(-examples // BATCH)) for i in step_examples(step, examples, recipe)]
    data = []
    for index in order:
        part = slice(int(loaded.offsets[index]), int(loaded.offsets[index + 1]))
        ids, mask = loaded.ids[part], loaded.targets[part]
        data.append({"input_ids": ids.tolist(), "labels": torch.where(mask, ids, -100).tolist()})

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": tokenizer.pad_token_id or 0, "labels": -100}
        batch = {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in pad.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args) if grouped else torch.utils.data.SequentialSampler(data)

    losses: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="pissa_niter_16", task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
    )
    trainer = InOrder(peft.get_peft_model(base, config), arguments, collate, data, callbacks=[Keep()])
    began = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - began, "losses": losses}


def child(which: str, model: str, rows: str, examples: int) -> None:
    from pissa_cli.process import peak_memory

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        figures = (
            ours(model, rows, examples, out)
            if which == "ours"
            else peer(model, rows, examples, out, which == "grouped")
        )
    print("RESULT", json.dumps({**figures, "memory": peak_memory()}))


def measure(model: str, rows: str, examples: int, rounds: int) -> dict[str, dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {which: [] for which in TITLES}
    for _ in range(rounds):
        for which, results in found.items():
            command = [sys.executable, __file__, "--child", which, model, rows, str(examples)]
            own = {"GLIBC_TUNABLES": ":".join(TUNABLES), **KERNELS} if which == "ours" else {}  # as `pissa` sets it
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            results.append(json.loads(line.removeprefix("RESULT ")))
            print(
                model, which, f"{results[-1]['seconds']:.1f} s", f"{results[-1]['memory'] / 2**20:.0f} MiB", flush=True
            )
    return {
        which: {
            "seconds": statistics.median(r["seconds"] for r in results),
            "memory": statistics.median(r["memory"] for r in results),
            "losses": results[0]["losses"],
        }
        for which, results in found.items()
    }


def main() -> None:
    page, rows, models = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    lines = [
        "| model | examples | rounds | trainer | seconds | over pissa's | peak memory, MiB | pissa's over this |",
        "|---" * 8 + "|",
    ]
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = [re.fullmatch(r"(.*?)(?::(\d+))?(?::(\d+))?", model).groups() for model in models]
        tokenizer = next(Path(model) for model, *_ in asked if Path(model).is_dir())
        for model, count, times in asked:
            name = Path(model).name
            path = str(llama_110m(Path(folder) / model, tokenizer)) if model == "llama-110m" else model
            examples = int(count) if count else EXAMPLES.get(name, 1000)
            rounds = int(times) if times else ROUNDS.get(name, 3)
            kept[name] = measure(path, rows, examples, rounds)
            mine = kept[name]["ours"]
            for which, result in kept[name].items():
                ratio, memory = result["seconds"] / mine["seconds"], mine["memory"] / result["memory"]
                cells = [name, examples, rounds, TITLES[which], f"{result['seconds']:.1f}", f"{ratio:.2f}"]
                cells += [f"{result['memory'] / 2**20:.0f}", f"{memory:.2f}"]
                lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    page.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("pissa", "torch", "transformers", "peft"))
    text = [
        "# Training, beside PEFT + transformers' Trainer",
        "",
        f"Made by `tests/bench_train.py` on {time.strftime('%Y-%m-%d')}; {packages}; {machine()}.",
        f"PiSSA of rank {RANK} on seven linear layers, bf16, one pass over the rows in steps of {BATCH} and",
        f"micro-batches of {MICRO}; from the first step to the last, without init; runs in turn, median of the rounds.",
        "",
        *lines,
        "",
        f"![loss of each step]({page.stem}.png)",
        "",
    ]
    page.write_text("\n".join(text))
    picture(kept, page.with_suffix(".png"))


def picture(kept: dict[str, dict[str, dict[str, Any]]], file: Path) -> None:
    """The loss of every step, a panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(kept), 3.6), layout="constrained")
    for axes, (name, results) in zip(figure.subplots(1, len(kept), squeeze=False)[0], kept.items(), strict=True):
        for which, result in results.items():
            axes.plot(range(1, len(result["losses"]) + 1), result["losses"], label=TITLES[which])
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    child(*sys.argv[2:5], int(sys.argv[5])) if sys.argv[1] == "--child" else main()
