"""Figures that were published, to stand beside ours: arXiv 2404.02948 v4, table 2 (means of three runs)."""

from __future__ import annotations

SOURCE = "arXiv 2404.02948 v4, table 2"
_ROWS = {"gsm8k": 1319, "math": 5000, "humaneval": 164, "mbpp": 399, "mt_bench": 160}
"""MBPP's figures are of EvalPlus's 399 problems (35.59 % = 142 of them); MT-Bench's of two turns of 80 questions."""
_FIGURES = {
    ("llama-2-7b", "full"): (49.13, 7.29, 21.20, 35.59, 4.91),
    ("llama-2-7b", "lora"): (43.23, 5.90, 18.21, 35.47, 4.56),
    ("llama-2-7b", "pissa"): (53.22, 7.47, 21.92, 37.24, 4.88),
    ("mistral-7b", "full"): (69.91, 18.64, 45.31, 51.46, 4.95),
    ("mistral-7b", "lora"): (69.40, 19.99, 43.74, 58.39, 4.93),
    ("mistral-7b", "pissa"): (73.31, 23.12, 46.88, 62.55, 5.34),
    ("gemma-7b", "full"): (72.09, 22.71, 47.02, 55.67, 5.40),
    ("gemma-7b", "lora"): (74.53, 29.90, 53.57, 65.25, 4.97),
    ("gemma-7b", "pissa"): (77.78, 31.33, 54.31, 66.17, 5.64),
}


def published(model: str, method: str, bits: int, bench: str, n: int) -> float | None:
    """The figure for a model (its Hub id) and method over 16-bit weights, if `n` is its number of rows; else None."""
    name = model.rpartition("/")[2].lower().removesuffix("-hf")
    name = "mistral-7b" if name == "mistral-7b-v0.1" else name
    figures = _FIGURES.get((name, method)) if bits != 4 and _ROWS.get(bench) == n else None
    return dict(zip(_ROWS, figures, strict=True)).get(bench) if figures is not None else None
