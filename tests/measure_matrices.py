"""The fast SVD on real weight matrices: how far its residual is above the best possible.

python tests/measure_matrices.py MODEL.safetensors [MORE.safetensors ...]    # prints a table
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pissa_cli.matrices.svd import truncated_svd

RANKS = (16, 64)


def excess(weight: torch.Tensor, rank: int, name: str) -> float:
    """Residual norm of the fast SVD over the best possible, in percent above 1."""
    U, S, Vh = truncated_svd(weight, rank, name=name)
    residual = (weight.double() - (U * S).double() @ Vh.double()).norm()
    return 100 * (float(residual / torch.linalg.svdvals(weight.double())[rank:].norm()) - 1)


def main() -> None:
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n")
    print("| matrices | rank | n | above the best residual norm, mean | worst |")
    print("|---|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        matrices = {n: t.float() for n, t in load_file(path).items() if t.ndim == 2 and "embed" not in n}
        for rank in RANKS:
            far = [excess(weight, rank, name) for name, weight in matrices.items() if rank < min(weight.shape)]
            mean = sum(far) / len(far)
            print(f"| {path.parent.name} | {rank} | {len(far)} | {mean:.4f} % | {max(far):.4f} % |", flush=True)


if __name__ == "__main__":
    main()
