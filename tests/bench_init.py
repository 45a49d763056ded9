"""The start of an adapter against its peers: the same matrices, ratios in one run, residual errors beside.

python tests/bench_init.py PAGE.md MODEL.safetensors [MORE.safetensors ...]

Dense: PEFT's `pissa_niter_16`. NF4, T = 5: the reference algorithm (full SVD and bitsandbytes' round trip each pass).
Ours runs as `pissa init` does on a CPU, one matrix to a thread; the peers have all threads for each matrix.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from machine import machine
from safetensors.torch import load_file
from torch import Tensor

from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Layer
from pissa_cli.matrices.quant import Packed, Store, packable, read
from pissa_cli.matrices.svd import truncated_svd
from pissa_cli.process import keep_freed_memory

RANKS = (16, 64, 128)
LLAMA_110M = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]
ROUNDS = {"dense": 7, "nf4": 3}
PACKED = 6  # matrices of a model that are split in 4 bits: the peer takes a full SVD five times


def peft_niter_16(W: Tensor, rank: int) -> Tensor:
    V, S, U = torch.svd_lowrank(W, rank, niter=16)
    return (V * S) @ U.T


def ours(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = truncated_svd(W, rank)
    return (U * S) @ Vh


def reference_qpissa(W: Tensor, rank: int) -> Tensor:
    """arXiv 2404.02948, appendix E: L <- SVD_r(E), Q <- NF4(W - L), E <- W - Q; T = 5."""
    target = W
    for _ in range(5):
        U, S, Vh = torch.linalg.svd(target, full_matrices=False)
        kept = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        Q = functional.dequantize_4bit(*functional.quantize_4bit(W - kept, blocksize=64, quant_type="nf4"))
        target = W - Q
    return Q + kept


def our_qpissa(W: Tensor, rank: int, passes: int = 5) -> Tensor:
    layer = Layer("layer", rank, 1.0, 0, Store(4, torch.float32, absmax="fitted"))
    made = METHODS["pissa"].start(W, layer, {"svd": "fast", "passes": passes, "refit": True})
    assert isinstance(made.frozen, Packed)
    return read(made.frozen) + made.factors["B"] @ made.factors["A"]


def seconds(work: Callable[[Tensor, int], Tensor], matrices: list[Tensor], rank: int, apart: bool) -> float:
    """For all matrices; apart: one to a thread, as many at once as there are threads."""
    threads = torch.get_num_threads()
    began = time.perf_counter()
    if apart:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda W: work(W, rank), matrices))
        torch.set_num_threads(threads)
    else:
        for W in matrices:
            work(W, rank)
    return time.perf_counter() - began


def frobenius(error: Tensor) -> float:
    return float(error.double().norm())


def nuclear(error: Tensor) -> float:
    return float(torch.linalg.svdvals(error.double()).sum())


def compare(
    name: str,
    matrices: list[Tensor],
    rank: int,
    peer: Callable[[Tensor, int], Tensor],
    mine: Callable[[Tensor, int], Tensor],
    norm: Callable[[Tensor], float],
    rounds: int,
) -> dict[str, Any]:
    peers, mines = [], []
    for _ in range(rounds):  # in turn; the least of each, as others may disturb but never help
        peers.append(seconds(peer, matrices, rank, apart=False))
        mines.append(seconds(mine, matrices, rank, apart=True))
    torch.manual_seed(0)
    worse = [norm(W - mine(W, rank)) / norm(W - peer(W, rank)) - 1 for W in matrices]
    found = {"what": name, "rank": rank, "matrices": len(matrices), "peer": min(peers), "ours": min(mines)}
    found |= {"ratio": min(peers) / min(mines), "error_mean": sum(worse) / len(worse), "error_worst": max(worse)}
    print(json.dumps(found), flush=True)
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| matrices | n | rank | peer, s | ours, s | peer / ours | error over the peer's, mean | worst |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        cells = [row["what"], row["matrices"], row["rank"], f"{row['peer']:.3f}", f"{row['ours']:.3f}"]
        cells += [f"{row['ratio']:.2f}", f"{row['error_mean']:+.3%}", f"{row['error_worst']:+.3%}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    mean = geometric_mean(row["ratio"] for row in rows)
    return [*lines, f"| **geometric mean** | | | | | **{mean:.2f}** | | |"]


def passes_table(groups: dict[str, list[Tensor]]) -> list[str]:
    lines = ["| matrices | rank | T = 1, s | T = 5, s | ratio |", "|---|---|---|---|---|"]
    for name, matrices in groups.items():
        for rank in RANKS:
            if rank < min(min(W.shape) for W in matrices) / 2:
                one, five = (
                    min(
                        seconds(lambda W, r, T=T: our_qpissa(W, r, T), matrices, rank, True)
                        for _ in range(ROUNDS["nf4"])
                    )
                    for T in (1, 5)
                )
                lines.append(f"| {name} | {rank} | {one:.3f} | {five:.3f} | {five / one:.2f} |")
    return lines


def growth_table() -> list[str]:
    """Seconds a parameter as matrices grow from those of a 100 M model to those of a 1.5 B one."""
    lines = ["| shapes | parameters | s | ns a parameter |", "|---|---|---|---|"]
    for width, wide in ((768, 2048), (1024, 4096), (1536, 8960)):
        matrices = [torch.randn(width, width) * 0.02 for _ in range(4)] + [
            torch.randn(wide, width) * 0.02 for _ in range(3)
        ]
        took = min(seconds(ours, matrices, 16, True) for _ in range(ROUNDS["dense"]))
        count = sum(W.numel() for W in matrices)
        lines.append(
            f"| 4 of {width}^2, 3 of {wide} x {width}, rank 16 | {count:,} | {took:.3f} | {took / count * 1e9:.1f} |"
        )
    return lines


def main() -> None:
    page = Path(sys.argv[1])
    keep_freed_memory()
    torch.manual_seed(0)
    groups = {"llama-110m (random), two layers": [torch.randn(shape) * 0.02 for shape in LLAMA_110M * 2]}
    for file in map(Path, sys.argv[2:]):
        tensors = {n: t.float() for n, t in load_file(file).items() if t.ndim == 2 and "embed" not in n}
        groups[file.parent.name] = [t for t in tensors.values() if min(t.shape) >= 64]
    packed = {name: [W for W in matrices if packable(W.shape[1])][:PACKED] for name, matrices in groups.items()}
    packed = {name: matrices for name, matrices in packed.items() if matrices}
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "nf4": []}
    for kind, chosen, peer, mine, norm in (
        ("dense", groups, peft_niter_16, ours, frobenius),
        ("nf4", packed, reference_qpissa, our_qpissa, nuclear),
    ):
        for name, matrices in chosen.items():
            for rank in RANKS:
                if rank < min(min(W.shape) for W in matrices) / 2:
                    rows[kind].append(compare(name, matrices, rank, peer, mine, norm, ROUNDS[kind]))
    packages = ", ".join(f"{name} {version(name)}" for name in ("pissa", "torch", "bitsandbytes"))
    text = [
        "# The start, beside its peers",
        "",
        f"Made by `tests/bench_init.py` on {time.strftime('%Y-%m-%d')}; {packages}; "
        f"{machine()}; the least of {ROUNDS['dense']} rounds in turn, in 4 bits of {ROUNDS['nf4']}; compute only.",
        "",
        "## Dense: PEFT's `pissa_niter_16` (`torch.svd_lowrank`), residual in the Frobenius norm",
        "",
        *table(rows["dense"]),
        "",
        "## NF4, T = 5: full SVD and bitsandbytes each pass, error in the nuclear norm",
        "",
        *table(rows["nf4"]),
        "",
        "## Five passes over one",
        "",
        *passes_table(packed),
        "",
        "## Growth",
        "",
        *growth_table(),
        "",
    ]
    page.write_text("\n".join(text))
    page.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
