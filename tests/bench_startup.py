"""How long the command line takes to answer, beside the import of what it is drawn with.

python tests/bench_startup.py PAGE.md
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from machine import machine

ROUNDS = 15
PISSA = (sys.executable, "-m", "pissa_cli")
IMPORTS = 'python -c "import typer, rich"'
COMMANDS = {
    IMPORTS: ((sys.executable, "-c", "import typer, rich"), 0),
    "pissa --help": ((*PISSA, "--help"), 0),
    "pissa train --help": ((*PISSA, "train", "--help"), 0),
    "pissa train --rnak 8": ((*PISSA, "train", "--rnak", "8"), 2),
    "pissa train missing.yaml": ((*PISSA, "train", "missing.yaml"), 2),
    "pissa train --set adapter.rnak=8": ((*PISSA, "train", "--set", "adapter.rnak=8"), 2),
    "pissa train --model ./missing": ((*PISSA, "train", "--model", "./missing"), 2),
    "pissa train --model demo --set data.train=missing.jsonl": (
        (*PISSA, "train", "--model", "demo", "--set", "data.train=missing.jsonl"),
        2,
    ),
    "pissa eval gsm8k --bench gms8k": ((*PISSA, "eval", "gsm8k", "--bench", "gms8k"), 2),
    "pissa merge gsm8k": ((*PISSA, "merge", "gsm8k"), 2),
}


def main() -> None:
    page = Path(sys.argv[1])
    took: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):  # in turn
            for name, (command, code) in COMMANDS.items():
                began = time.perf_counter()
                done = subprocess.run(command, cwd=folder, capture_output=True)
                took[name].append(time.perf_counter() - began)
                assert done.returncode == code, done.stderr.decode()
    seconds = {name: statistics.median(times) for name, times in took.items()}
    kept = [{"what": name, "seconds": each, "over": each / seconds[IMPORTS]} for name, each in seconds.items()]
    rows = [f"| `{row['what']}` | {float(row['seconds']) * 1e3:.0f} | {row['over']:.2f} |" for row in kept]
    packages = ", ".join(f"{name} {version(name)}" for name in ("pissa", "typer", "rich"))
    text = [
        "# The answer of the command line",
        "",
        f"Made by `tests/bench_startup.py` on {time.strftime('%Y-%m-%d')}; {packages}; {machine()};",
        f"whole processes, the median of {ROUNDS}, all in turn.",
        "",
        "| what | ms | over the imports |",
        "|---|---|---|",
        *rows,
        "",
    ]
    page.write_text("\n".join(text))
    page.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()
