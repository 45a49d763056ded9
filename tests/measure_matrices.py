"""The fast SVD and QPiSSA on real weight matrices: how far from the best, and how much less 4-bit error.

python tests/measure_matrices.py MODEL.safetensors [MORE.safetensors ...]    # prints tables
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_quant import loftq, nf4, nuclear, qpissa

from pissa_cli.svd import truncated_svd

RANKS = (16, 64)


def excess(weight: torch.Tensor, rank: int, name: str) -> float:
    """Residual norm of the fast SVD over the best possible, in percent above 1."""
    U, S, Vh = truncated_svd(weight, rank, name=name)
    residual = (weight.double() - (U * S).double() @ Vh.double()).norm()
    return 100 * (float(residual / torch.linalg.svdvals(weight.double())[rank:].norm()) - 1)


def main() -> None:
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n")
    titles = ["matrices", "rank", "n", "fast SVD above best, mean", "worst", "QPiSSA T=5 (plain NF4 = 100)"]
    titles += ["worst", "LoftQ T=5", "worse than LoftQ"]
    print("| " + " | ".join(titles) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        matrices = {n: t.float() for n, t in load_file(path).items() if t.ndim == 2 and "embed" not in n}
        for rank in RANKS:
            far, ours, theirs = [], [], []
            for name, weight in matrices.items():
                if rank < min(weight.shape):
                    plain = nuclear(weight - nf4(weight))
                    far.append(excess(weight, rank, name))
                    ours.append(100 * nuclear(weight - qpissa(weight, rank, 5)) / plain)
                    theirs.append(100 * nuclear(weight - loftq(weight, rank, 5)) / plain)
            n, worse = len(far), sum(a > b for a, b in zip(ours, theirs, strict=True))
            row = (path.parent.name, rank, n, f"{sum(far) / n:.4f} %", f"{max(far):.4f} %")
            row += (f"{sum(ours) / n:.2f}", f"{max(ours):.2f}", f"{sum(theirs) / n:.2f}", f"{worse} of {n}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
