"""Start and training step of 7B and 8B models on one GPU, with random weights made there: no network, no install.

python -m tests.bench_gpu PAGE.md            from a checkout; within nine minutes on an H200
python -m tests.bench_gpu PAGE.md --small    the same on small shapes, to try it on a CPU

The fraction of the matrix rate counts 4 N operations a token (N: numbers in the linear layers and the head), the rate
being that of a bf16 product measured in the same run. Unsloth is a peer where it is installed, and Liger's kernels are
tried where they are: last, since they stay in transformers once they are there.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel

from pissa_cli.adapters.lowrank import LowRank
from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Layer
from pissa_cli.base.attach import checkpoint_activations, forget_shared, join_gates, share_inputs
from pissa_cli.matrices import quant
from pissa_cli.matrices.pipeline import in_flight, in_order
from pissa_cli.matrices.svd import truncated_svd
from pissa_cli.training.kernels import LIGER as LIGER_PARTS
from pissa_cli.training.kernels import compile_blocks
from pissa_cli.training.loss import IGNORED, summed_loss

SMALL = "--small" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK = 16 if SMALL else 128
TOKENS = 256 if SMALL else 8192
LENGTHS = (64, 128) if SMALL else (512, 2048)
STEPS = 3
COMPILED, LIGER, CHECKPOINTED = "torch_compile", "use_liger_kernel", "gradient_checkpointing"


@dataclass(frozen=True)
class Shape:
    name: str
    width: int
    narrow: int
    wide: int
    layers: int
    words: int

    def matrices(self) -> list[Tensor]:
        """The linear layers of one block, fp32, on the device."""
        w, n, f = self.width, self.narrow, self.wide
        shapes = [(w, w), (n, w), (n, w), (w, w), (f, w), (f, w), (w, f)]
        return [torch.randn(shape, device=DEVICE) * 0.02 for shape in shapes]


SHAPES = [Shape("Mistral-7B", 4096, 1024, 14336, 32, 32000), Shape("LLaMA-3-8B", 4096, 1024, 14336, 32, 128256)]
if SMALL:
    SHAPES = [Shape("small", 256, 64, 512, 2, 1000)]


def seconds(work: Callable[[], Any]) -> float:
    sync()
    began = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - began


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate() -> float:
    """Operations a second of a bf16 product."""
    size = 512 if SMALL else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 * 10 / seconds(lambda: [a @ b for _ in range(10)])


def residual(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    return float((W - (U * S) @ Vh).norm())


def init_rows(shape: Shape) -> list[dict[str, Any]]:
    """Compute only: ours for all blocks, one after the other as in init, the peers' for one of them."""
    matrices = shape.matrices()
    sync()
    layer = Layer("layer", RANK, 1.0, 0, quant.Store(4, torch.bfloat16, absmax="fitted"))

    def as_init(work: Callable[[Tensor], Any], blocks: int = shape.layers) -> list[Any]:
        return list(in_order(work, matrices * blocks, *in_flight(max(W.numel() for W in matrices), DEVICE)))

    def ours(blocks: int = shape.layers) -> list[Any]:
        return as_init(lambda W: truncated_svd(W, RANK), blocks)

    def peer() -> list[Any]:
        return [torch.svd_lowrank(W, RANK, niter=16) for W in matrices]

    def nf4(passes: int) -> None:
        as_init(lambda W: METHODS["pissa"].start(W, layer, {"svd": "fast", "passes": passes, "refit": True}))

    def reference(passes: int) -> None:
        for W in matrices:
            target = W
            for _ in range(passes):
                U, S, Vh = torch.linalg.svd(target, full_matrices=False)
                kept = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
                target = W - quant.read(quant.pack(quant.Store(4, torch.float32), W - kept))

    ours(), nf4(1)  # the first call builds what later ones reuse
    worse = max(
        residual(W, *mine) / residual(W, theirs[0], theirs[1], theirs[2].T) - 1
        for W, mine, theirs in zip(matrices, ours(1), peer(), strict=True)
    )
    took = {"16 bits, pissa": min(seconds(ours) for _ in range(3))}
    took["16 bits, PEFT's pissa_niter_16"] = min(seconds(peer) for _ in range(3)) * shape.layers
    took["NF4, T = 1, pissa"] = min(seconds(lambda: nf4(1)) for _ in range(2))
    took["NF4, T = 5, pissa"] = min(seconds(lambda: nf4(5)) for _ in range(2))
    took["NF4, T = 1, full SVD and bitsandbytes"] = seconds(lambda: reference(1)) * shape.layers
    rows = [{"model": shape.name, "what": what, "seconds": took_} for what, took_ in took.items()]
    rows[0]["residual over PEFT's, worst"] = worse
    return rows


def model_of(shape: Shape, bits: int, rank: int | None) -> tuple[Any, int]:
    """A Llama with random weights, its linear layers in bf16 or NF4 under our adapters (rank None: as they are)."""
    heads = shape.width // 128 if shape.width >= 128 else 1
    config = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads * shape.narrow // shape.width),
        max_position_embeddings=4096,
    )
    with DEVICE:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model: nn.Module = LlamaForCausalLM(config).requires_grad_(False)
        torch.set_default_dtype(default)
    counted = model.lm_head.weight.numel()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            counted += module.weight.numel()
            parent, _, kind = name.rpartition(".")
            layer: nn.Module = module
            if bits == 4:
                packed = quant.pack(quant.Store(4, torch.bfloat16), module.weight.float())
                assert isinstance(packed, quant.Packed)
                layer = quant.linear(packed)
            if rank is not None:
                out, inn = module.weight.shape
                factors = {"A": torch.randn(rank, inn, device=DEVICE) / inn**0.5}
                factors["B"] = torch.zeros(out, rank, device=DEVICE)
                layer = LowRank(layer, factors, frozenset({"A", "B"}), 1.0)
            setattr(model.get_submodule(parent), kind, layer)
    quant.set_compute_dtype(model, torch.bfloat16)
    if rank is not None:
        share_inputs(model, lambda: model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=DEVICE)))
    return model, counted


def with_peft(model: nn.Module) -> nn.Module:
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def step_seconds(model: nn.Module, length: int, words: int, ours: bool) -> float:
    """The median step over TOKENS tokens, all of them targets; the peer as transformers' Trainer runs it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if DEVICE.type == "cuda" and not ours else None)
    ids = torch.randint(0, words, (TOKENS // length, length), device=DEVICE)
    labels = ids.clone()
    labels[:, 0] = IGNORED

    def step() -> None:
        if ours:
            loss = summed_loss(model, {"input_ids": ids, "labels": labels.clone()}, chunked=True) / TOKENS
        else:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return sorted(seconds(step) for _ in range(STEPS))[STEPS // 2]


@dataclass(frozen=True)
class Taker:
    """Who takes the steps, over a model of how many bits, and what it uses beside its own."""

    shape: Shape
    bits: int
    who: str
    uses: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        return {"model": self.shape.name, "bits": self.bits, "what": ", ".join((self.who, *self.uses))}


def takers() -> list[Taker]:
    first, *others = SHAPES
    found = [Taker(first, 4, "pissa"), Taker(first, 4, "pissa", (COMPILED,)), Taker(first, 4, "pissa", (CHECKPOINTED,))]
    found += [Taker(first, 4, "PEFT"), Taker(first, 4, "PEFT", (CHECKPOINTED,))]
    if DEVICE.type == "cuda" and importlib.util.find_spec("unsloth") is not None:
        found += [Taker(first, 4, "Unsloth")]
    found += [Taker(first, 16, who) for who in ("pissa", "PEFT")]
    found += [Taker(shape, bits, who) for shape in others for bits in (4, 16) for who in ("pissa", "PEFT")]
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        found += [Taker(first, 4, "pissa", (LIGER,)), Taker(first, 4, "pissa", (LIGER, CHECKPOINTED))]
        found += [Taker(first, 16, "pissa", (LIGER,))]
    return found


def training_rows(taker: Taker, rate: float) -> list[dict[str, Any]]:
    if taker.who == "Unsloth":
        return unsloth_rows(taker, rate)
    ours, shape = taker.who == "pissa", taker.shape
    gc.collect()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    model, counted = model_of(shape, taker.bits, RANK if ours else None)
    if LIGER in taker.uses:
        apply_liger_kernel(model, LIGER_PARTS)
    if ours and not {COMPILED, CHECKPOINTED} & set(taker.uses):
        join_gates(model)
    if COMPILED in taker.uses:
        compile_blocks(model, DEVICE)
    if CHECKPOINTED in taker.uses:
        checkpoint_activations(model)
    model = model if ours else with_peft(model)
    model.train()
    rows = []
    for length in LENGTHS:
        row = taker.row() | {"length": length}
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            took = step_seconds(model, length, shape.words, ours)
        except torch.OutOfMemoryError:
            forget_shared(model)
            rows.append(row | {"seconds": None})
            continue
        peak = torch.cuda.max_memory_allocated() - before if DEVICE.type == "cuda" else 0
        rows.append(row | figures(took, peak, counted, rate))
    return rows


def figures(took: float, peak: int, counted: int, rate: float) -> dict[str, Any]:
    fraction = 4 * counted * TOKENS / took / rate
    return {"seconds": took, "tokens/s": TOKENS / took, "fraction": fraction, "peak GiB": peak / 2**30}


def unsloth_rows(taker: Taker, rate: float) -> list[dict[str, Any]]:
    """From a process of its own: it changes transformers where it is imported."""
    shape = taker.shape
    sizes = [shape.width, shape.narrow, shape.wide, shape.layers, shape.words, RANK, TOKENS, *LENGTHS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench_unsloth", *map(str, sizes)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"length"')]
    of_block = 2 * shape.width * (shape.width + shape.narrow) + 3 * shape.width * shape.wide
    counted = shape.layers * of_block + shape.words * shape.width
    rows = []
    for row in found:
        uses = (CHECKPOINTED,) if row["checkpointing"] else ()
        named = Taker(shape, taker.bits, taker.who, uses).row() | {"length": row["length"]}
        rows.append(named | figures(row["seconds"], row["peak"], counted, rate))
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    titles = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.get(title, "") for title in titles]
        lines.append(f"| {' | '.join(f'{c:.4g}' if isinstance(c, float) else str(c) for c in cells)} |")
    return lines


def main() -> None:
    page = Path(sys.argv[1])
    torch.manual_seed(0)
    rate = matrix_rate()
    started = init_rows(SHAPES[0])
    print("\n".join(table(started)), flush=True)
    trained: list[dict[str, Any]] = []
    for taker in takers():
        try:
            trained += training_rows(taker, rate)
        except Exception:  # of a peer or a compiler: the others go on
            traceback.print_exc()
            trained.append(taker.row() | {"seconds": None})
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        print("\n".join(map(json.dumps, trained[-len(LENGTHS) :])), flush=True)
        write(page, rate, started, trained)


def write(page: Path, rate: float, started: list[dict[str, Any]], trained: list[dict[str, Any]]) -> None:
    names = ("torch", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth")
    packages = ", ".join(f"{name} {version(name)}" for name in names if importlib.util.find_spec(name))
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    text = [
        "# Start and training step on one GPU",
        "",
        f"Made by `tests/bench_gpu.py` on {time.strftime('%Y-%m-%d')}; {packages}; {machine}; bf16 products "
        f"{rate / 1e12:.1f} Tflop/s.",
        "",
        f"## Start, rank {RANK}: seconds for all {SHAPES[0].layers} blocks, compute only",
        "",
        *table(started),
        "",
        f"## A step over {TOKENS} tokens, rank {RANK}, without checkpointing unless it is named",
        "",
        *table(trained),
        "",
    ]
    page.write_text("\n".join(text))
    page.with_suffix(".json").write_text(json.dumps({"rate": rate, "start": started, "training": trained}) + "\n")


if __name__ == "__main__":
    main()
