"""CUDA graphs: what is replayed is what the operations give one by one. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_cli.matrices import graphs
from pissa_cli.matrices.pipeline import in_flight, in_order
from pissa_cli.matrices.svd import SVD, truncated_svd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_factors_are_those_of_operations_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(1024, 768), (768, 1024), (1024, 768), (640, 640)] * 6
    weights = [torch.randn(shape, generator=source).cuda() for shape in shapes]
    weights[5] = torch.ones(768, 1024).cuda()  # where the first attempt is not sound
    alone = [truncated_svd(W, 16) for W in weights]

    def work(W: Tensor) -> tuple[SVD, SVD]:
        return truncated_svd(W, 16), truncated_svd(W, 16, "1%", near=truncated_svd(W, 16).Vh.T)

    replayed: list[int] = []
    replay = graphs._replay
    monkeypatch.setattr(graphs, "_replay", lambda *parts: replayed.append(1) or replay(*parts))
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    together = in_order(work, weights, *in_flight(768 * 1024, torch.device("cuda")))
    for (found, near), wanted, W in zip(together, alone, weights, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        left = [float((W - (part.U * part.S) @ part.Vh).norm()) for part in (near, wanted)]
        best = float(torch.linalg.svdvals(W.double())[16:].norm())
        rounding = 2e-5 * float(W.norm())
        assert left[0] <= 1.01 * best + rounding and left[1] <= 1.001 * best + rounding
    assert len(replayed) > len(weights)
    del found, near, wanted
    assert torch.cuda.memory_allocated() - before < 2**20
