"""Figures that were published, to stand beside ours: arXiv 2404.02948 v4, tables 2 and 3; arXiv 2310.11454, table 2."""

from __future__ import annotations

_PISSA, _VERA = "arXiv 2404.02948 v4, table", "arXiv 2310.11454 v2, table 2"
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
_GLUE_ROWS = {"sst2": 872, "mrpc": 408, "cola": 1043, "qnli": 5463, "rte": 277, "stsb": 1500, "qqp": 40430}
"""Not MNLI: table 3 has one figure for both of its sets."""
_GLUE = {
    ("deberta-v3-base", "full"): (95.63, 89.46, 69.19, 94.03, 83.75, 91.60, 92.40),
    ("deberta-v3-base", "lora"): (95.64, 90.28, 70.69, 93.84, 84.84, 91.68, 92.03),
    ("deberta-v3-base", "pissa"): (96.22, 91.50, 73.12, 94.43, 88.69, 92.00, 92.33),
    ("roberta-base", "vera"): (94.6, 89.5, 65.6, 91.8, 78.7, 90.7),
}


def published(model: str, method: str, bits: int, bench: str, n: int) -> tuple[float, str] | None:
    """(figure, source) for a model (its Hub id) and method over dense weights, if `n` is its number of rows."""
    name = model.rpartition("/")[2].lower().removesuffix("-hf")
    name = "mistral-7b" if name == "mistral-7b-v0.1" else name
    glue = bench.startswith("glue/")
    rows, figures = (_GLUE_ROWS, _GLUE) if glue else (_ROWS, _FIGURES)
    bench = bench.removeprefix("glue/")
    found = dict(zip(rows, figures.get((name, method), ()), strict=False)).get(bench)
    if found is None or bits == 4 or rows[bench] != n:
        return None
    return found, _VERA if method == "vera" else f"{_PISSA} {3 if glue else 2}"
