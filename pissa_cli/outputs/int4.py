"""int4 weights in the compressed-tensors format (W4A16, pack-quantized), which vLLM and SGLang read.

The only file that imports compressed_tensors, an optional extra.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pissa_cli.base.model import Linear
from pissa_cli.errors import UsageError
from pissa_cli.matrices.block_scales import fit_scales

GROUP_SIZES = (128, 64, 32)


def require_compressed_tensors() -> None:
    """UsageError, with what to install, where the package is missing."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise UsageError(
            "--as compressed-tensors needs a package that is not installed", "pip install 'pissa[compressed]'"
        ) from None


def group_size(layers: list[Linear]) -> int:
    """The largest group size that divides the rows of most layers; UsageError if none divides any."""
    usable = {g: sum(takes(layer, g) for layer in layers) for g in GROUP_SIZES}
    best = max(GROUP_SIZES, key=lambda g: (usable[g], g))
    if usable[best] == 0:
        raise UsageError("no linear layer of this model fits compressed-tensors", "export with --as nf4 or merged")
    return best


def takes(layer: Linear, group: int) -> bool:
    """Whether a layer can be stored so: torch's own Linear with rows of whole groups, and more than one."""
    return not (layer.transposed or layer.bypassed or layer.dense) and layer.num_out > 1 and layer.num_in % group == 0


def _nearest(unit: Tensor, share: float, out: Tensor) -> Tensor:
    return torch.mul(unit, 7.5 / share, out=out).round_().clamp_(-8, 7)


def pack(name: str, W: Tensor, dtype: torch.dtype, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a weight (out, in) fp32 by name, the weight as it reads back).

    Symmetric int4 with one scale a group of `group` numbers of a row, kept in `dtype` and fitted as NF4's are.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    groups = W.reshape(-1, group)
    scale = fit_scales(groups, _nearest)[0].to(dtype)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    codes = (groups / safe[:, None]).round_().clamp_(-8, 7)
    back = (codes * safe[:, None]).view_as(W)
    prefix = name.removesuffix(".weight")
    tensors = {
        f"{prefix}.weight_packed": pack_to_int32(codes.view_as(W).to(torch.int8), 4),
        f"{prefix}.weight_scale": safe.to(dtype).view(W.shape[0], -1),
        f"{prefix}.weight_shape": torch.tensor(W.shape),
    }
    return tensors, back


def config(group: int, dense: list[str]) -> dict[str, Any]:
    """`quantization_config` of a transformers checkpoint; `dense` names the modules left as they are."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": dense,
    }
