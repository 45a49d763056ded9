"""A day of a 7B run, simulated: as many steps, saves and evaluations, with a tiny model and short examples.

    python tests/simulate_day.py [PAGE.md]     # minutes; writes docs/results/day.md

A step of a 7B model takes about 5 s, so a day has 17,280. Watched from outside: files and bytes of the run folder,
resident memory and open files of the process; from metrics.jsonl: seconds a step. A second, short run has its clock set
back and forth by an hour. Ends with exit code 1 if something grows that should not.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import pissa_cli

STEP_SECONDS = 5
STEPS = 24 * 3600 // STEP_SECONDS
SAVE_EVERY, EVAL_EVERY, KEEP = 100, 500, 2
PERIOD = 0.5  # seconds between two looks
CLOCK_STEPS = 200
BASE = Path(pissa_cli.__file__).parent / "demo" / "base"
RECIPE: dict[str, Any] = {
    "model.name": BASE,
    "model.bits": 32,
    "adapter.rank": 4,
    "data.format": "text",
    "data.max_length": 16,
    "train.batch_size": 2,
    "train.micro_batch_size": 2,
    "train.lr": 1e-5,
    "train.save_every": SAVE_EVERY,
    "train.eval_every": EVAL_EVERY,
    "train.keep": KEEP,
}
JUMPING = """
import random, sys, time
real, jumps = time.time, random.Random(0)
time.time = lambda: real() + jumps.choice((-3600, 0, 3600))
from pissa_cli.__main__ import main
main()
"""
"""`pissa` with a clock that is set an hour back or forth between any two looks at it."""


@dataclass
class Looks:
    """What was seen of a run, one entry a look: steps done, resident bytes, open files, files and bytes of the folder
    (without metrics.jsonl), bytes of metrics.jsonl."""

    steps: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    metrics: list[int] = field(default_factory=list)
    early_picture: bool = False

    def between(self, begin: float, end: float, values: list[int]) -> list[int]:
        """The values of looks at these shares of all steps."""
        return [v for step, v in zip(self.steps, values, strict=True) if begin * STEPS <= step <= end * STEPS]


def write_rows(path: Path, num: int, seed: int) -> Path:
    """Texts of random letters, each longer than an example may be."""
    draw = random.Random(seed)
    lines = [json.dumps({"text": "".join(draw.choices("abcdefghij ", k=100))}) for _ in range(num)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def command(program: list[str], recipe: dict[str, Any]) -> list[str]:
    sets = [word for key, value in recipe.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, *program, "train", *sets, "--json"]


def look(process: subprocess.Popen[bytes], run: Path, seen: Looks) -> None:
    """Add one entry to `seen`, once the run folder is there; a file that goes away meanwhile is not counted."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
        handles = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    except (OSError, StopIteration):  # it has just ended
        return
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return
    sizes = []
    for path in run.rglob("*"):
        try:
            if path.is_file() and path != metrics:
                sizes.append(path.stat().st_size)
        except OSError:
            continue
    lines = metrics.read_bytes().splitlines()
    seen.steps.append(len(lines))
    seen.resident.append(resident)
    seen.handles.append(handles)
    seen.files.append(len(sizes))
    seen.bytes.append(sum(sizes))
    seen.metrics.append(metrics.stat().st_size)
    seen.early_picture |= (run / "loss.png").exists() and len(lines) < STEPS


def simulate(folder: Path) -> tuple[Looks, list[dict[str, Any]], float]:
    """Run the day; what was seen, the lines of metrics.jsonl, and the seconds it took."""
    run, seen, began = folder / "out", Looks(), time.monotonic()
    recipe = RECIPE | {
        "data.train": write_rows(folder / "train.jsonl", 5000, 0),
        "data.eval": write_rows(folder / "eval.jsonl", 20, 1),
        "train.steps": STEPS,
        "output": run,
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command(["-m", "pissa_cli"], recipe), env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            look(process, run, seen)
            time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit((folder / "log").read_text()[-2000:])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return seen, events, time.monotonic() - began


def clock_jumps(folder: Path) -> dict[str, Any]:
    """A short run whose clock is set back and forth: exit code, lines of metrics.jsonl, and durations that no step
    can have had."""
    run = folder / "jumping"
    recipe = RECIPE | {"data.train": folder / "train.jsonl", "train.steps": CLOCK_STEPS, "output": run}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command(["-c", JUMPING], recipe), env=environment, capture_output=True)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wrong = [event["seconds"] for event in events if not 0 <= event["seconds"] < 60]
    return {"code": done.returncode, "steps": len(events), "wrong": len(wrong), "worst": max(wrong, key=abs, default=0)}


def judge(seen: Looks, events: list[dict[str, Any]], jumped: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(what, figures, whether it is as it should be) of everything that is claimed."""
    mega = 1e6
    files, sizes = seen.between(0.05, 1, seen.files), seen.between(0.05, 1, seen.bytes)
    first_files, first_sizes = seen.between(0.05, 0.1, seen.files), seen.between(0.05, 0.1, seen.bytes)
    warm, last = (statistics.median(seen.between(*part, seen.resident)) for part in ((0.05, 0.1), (0.95, 1)))
    handles = seen.between(0.05, 1, seen.handles)
    seconds = [event["seconds"] for event in events]
    tenth = len(seconds) // 10
    early, late = statistics.median(seconds[tenth : 2 * tenth]), statistics.median(seconds[-tenth:])
    half = sum(len(json.dumps(event)) + 1 for event in events[: len(events) // 2])
    growth = seen.metrics[-1] / half
    usual = statistics.mode(handles)
    return [
        ("steps taken", f"{len(events):,} of {STEPS:,}", len(events) == STEPS),
        (
            "files in the run folder, at most",
            f"{max(first_files)} early, {max(files)} ever",
            max(files) <= max(first_files) + 8,
        ),
        (
            "bytes without metrics.jsonl, at most",
            f"{max(first_sizes) / mega:.2f} MB early, {max(sizes) / mega:.2f} MB ever",
            max(sizes) <= 1.5 * max(first_sizes),
        ),
        (
            "metrics.jsonl",
            f"{half / mega:.2f} MB after half, {seen.metrics[-1] / mega:.2f} MB at the end ({growth:.2f} times)",
            1.9 < growth < 2.1,
        ),
        (
            "resident memory",
            f"{warm / mega:.1f} MB after 5 %, {last / mega:.1f} MB at the end ({last / warm - 1:+.2%})",
            abs(last / warm - 1) <= 0.02,
        ),
        (
            "open files of the process",
            f"{usual} mostly, {min(handles)} to {max(handles)}",
            max(handles) <= usual + 2,
        ),
        (
            "median step, second and last tenth",
            f"{early * 1e3:.2f} and {late * 1e3:.2f} ms ({late / early:.2f} times)",
            late / early < 1.1,
        ),
        ("loss.png", "not before the end" if not seen.early_picture else "made early", not seen.early_picture),
        (
            "clock set by an hour at any look",
            f"exit code {jumped['code']}, {jumped['steps']} of {CLOCK_STEPS} steps; {jumped['wrong']} durations wrong",
            jumped["code"] == 0 and jumped["steps"] == CLOCK_STEPS and not jumped["wrong"],
        ),
    ]


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/day.md")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seen, events, seconds = simulate(folder)
        rows = judge(seen, events, clock_jumps(folder))
        saved = STEPS // SAVE_EVERY + bool(STEPS % SAVE_EVERY)
    lines = [
        "# A day of training",
        "",
        f"Made by `tests/simulate_day.py` on {time.strftime('%Y-%m-%d')}. A step of a 7B model takes about "
        f"{STEP_SECONDS} s, so a day has {STEPS:,}. Here as many",
        f"steps of the demo's 0.85 M base in one `pissa train`, saved every {SAVE_EVERY} ({saved} checkpoints, {KEEP} "
        f"kept), evaluated every {EVAL_EVERY}; {seconds:.0f} s",
        f"in all. Looked at from outside every {PERIOD} s: {len(seen.steps)} times. "
        f"Python {platform.python_version()}, torch {torch.__version__},",
        f"transformers {transformers.__version__}; one thread of {processor()}.",
        "",
        "| what | figures | as it should be |",
        "|---|---|---|",
        *(f"| {what} | {figures} | {'yes' if good else '**no**'} |" for what, figures, good in rows),
    ]
    page.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if not all(good for _, _, good in rows):
        raise SystemExit(1)


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(": ")[1] if names else platform.machine()


if __name__ == "__main__":
    main()
