"""Every benchmark on its real files: what the scorers say of known answers, and a whole run with a small model.

    python tests/check_real_data.py PAGE.md DATA_FOLDER MODEL ENCODER [--tokens 64]

DATA_FOLDER has gsm8k/, math/, humaneval/, mbpp/, mt_bench/ and glue/. MODEL is a small causal language model, ENCODER a
small encoder. The judge of MT-Bench is a local stand-in that rates by length. Needs no network; runs programs.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

import pissa_cli
from pissa_cli.data.rows import Row, read_rows
from pissa_cli.evals import competition_math, gsm8k, humaneval, mbpp

SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


def flipped(code: str) -> str | None:
    """The code with its first operator turned into another; None if it has none."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPPED:
            node.op = SWAPPED[type(node.op)]()
            return ast.unparse(tree)
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            node.ops[0] = SWAPPED[type(node.ops[0])]()
            return ast.unparse(tree)
    return None


def by_hand(program: str) -> bool:
    """Whether plain Python reaches the end of a program within ten seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program + "\nprint('reached the end')\n")
        try:
            done = subprocess.run([sys.executable, "-I", file], capture_output=True, text=True, timeout=10, cwd=folder)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.endswith("reached the end\n")


def pissa(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "pissa_cli", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class _Judge(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rating = 1 + len(asked["messages"][-1]["content"]) % 10
        content = json.dumps({"choices": [{"message": {"content": f"As long as that. Rating: [[{rating}]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Check:
    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.data, self.model, self.scratch = Path(args.data), args.model, scratch
        self.encoder, self.tokens = args.encoder, args.tokens
        self.known: list[tuple[str, str, int, float]] = []
        self.runs: list[tuple[str, str, int, Any, float, float]] = []

    def samples(self, bench: str, file: Path, outputs: list[str]) -> dict[str, Any]:
        """The result of a benchmark for outputs in the order of its rows."""
        path = self.scratch / "samples.jsonl"
        path.write_text("".join(json.dumps({"id": i, "output": text}) + "\n" for i, text in enumerate(outputs)))
        words = [
            "eval",
            "--bench",
            bench,
            "--data",
            f"{bench}={file}",
            "--samples",
            str(path),
            "--allow-code-execution",
        ]
        folder = self.scratch / "samples"
        found = pissa(*words, "--set", f"model.name={self.model}", "--output", str(folder))["results"][bench]
        lines = (folder / "eval" / "samples" / bench / "samples.jsonl").read_text().splitlines()
        return {"result": found, "verdicts": [json.loads(line)["correct"] for line in lines]}

    def note(self, what: str, found: dict[str, Any], file: Path) -> None:
        self.known.append((what, file.name, found["result"]["n"], found["result"]["score"]))
        print(self.known[-1], flush=True)

    def references(self) -> None:
        """Known answers through the scorers."""
        files = {
            "gsm8k": self.data / "gsm8k" / "test_half.jsonl",
            "math": self.data / "math" / "test_half.jsonl",
            "humaneval": self.data / "humaneval" / "HumanEval_half.jsonl",
        }
        rows = {bench: _rows(file) for bench, file in files.items()}
        answers = [f"The answer is: {gsm8k.gold(row)}" for row in rows["gsm8k"]]
        self.note("gsm8k: the references", self.samples("gsm8k", files["gsm8k"], answers), files["gsm8k"])
        answers = [f"The answer is: {competition_math.gold(row)}" for row in rows["math"]]
        self.note("math: the references", self.samples("math", files["math"], answers), files["math"])
        own = [row["canonical_solution"] for row in rows["humaneval"]]
        whole = [row["prompt"] + row["canonical_solution"] for row in rows["humaneval"]]
        self.code("humaneval", files["humaneval"], rows["humaneval"], own, whole, humaneval.program)
        for name in ("mbpp.jsonl", "sanitized-mbpp.json"):
            file = self.data / "mbpp" / name
            rows["mbpp"] = _rows(file)
            solutions = [row["code"] for row in rows["mbpp"]]
            self.code("mbpp", file, rows["mbpp"], solutions, solutions, mbpp.program)

    def code(self, bench: str, file: Path, rows: list[Row], own: list[str], solutions: list[str], program: Any) -> None:
        """The set's own solutions, and the same as whole scripts with one operator flipped, against plain Python."""
        self.note(f"{bench}: its own solutions", self.samples(bench, file, own), file)
        changed = [flipped(code) or code for code in solutions]
        count = sum(one != other for one, other in zip(changed, solutions, strict=True))
        fenced = [f"```python\n{code}\n```" for code in changed]
        found = self.samples(bench, file, fenced)
        self.note(f"{bench}: one operator flipped in {count}", found, file)
        with ThreadPoolExecutor(2) as pool:
            wanted = list(pool.map(by_hand, [program(row, text) for row, text in zip(rows, fenced, strict=True)]))
        apart = sum(one != other for one, other in zip(found["verdicts"], wanted, strict=True))
        self.known.append((f"{bench}: of these, verdicts that differ from plain Python's", file.name, len(rows), apart))
        print(self.known[-1], flush=True)

    def whole_runs(self) -> None:
        """The five generated benchmarks and GLUE, with `--limit` and whole."""
        demo = {"instruction": "question", "output": "answer"}
        train = self.data / "gsm8k" / "train.jsonl"
        self.run_of(self.model, "lm", [f"data.train={train}", f"data.columns={json.dumps(demo)}", "adapter.rank=4"])
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge = ["--judge-url", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "stand-in"]
        for bench, file in (
            ("gsm8k", "gsm8k/test_half.jsonl"),
            ("math", "math/test_half.jsonl"),
            ("humaneval", "humaneval/HumanEval_half.jsonl"),
            ("mbpp", "mbpp/mbpp.jsonl"),
            ("mbpp", "mbpp/sanitized-mbpp.json"),
            ("mt_bench", "mt_bench"),
        ):
            self.whole("lm", bench, file, ["--allow-code-execution", *(judge if bench == "mt_bench" else [])])
        for task, name, file in (
            ("cola", "CoLA", "dev.tsv"),
            ("sst2", "SST-2", "dev.tsv"),
            ("mrpc", "MRPC", "test.tsv"),
            ("stsb", "STS-B", "dev.tsv"),
            ("qnli", "QNLI", "dev.tsv"),
        ):
            train = self.data / "glue" / name / ("train.tsv" if name != "QNLI" else "dev.tsv")
            sets = [f"data.train={train}", f"data.format=glue/{task}", "model.task=sequence-classification"]
            self.run_of(self.encoder, task, [*sets, "data.max_length=128", "adapter.rank=4"])
            self.whole(task, f"glue/{task}", f"glue/{name}/{file}", [])

    def run_of(self, model: str, name: str, sets: list[str]) -> None:
        """Two steps of training: what is scored must be a run."""
        sets = ["model.bits=32", "train.steps=2", "train.batch_size=8", *sets]
        words = [word for one in sets for word in ("--set", one)]
        pissa("train", "--model", model, "--output", str(self.scratch / name), *words)

    def whole(self, run: str, bench: str, file: str, more: list[str]) -> None:
        words = ["eval", str(self.scratch / run), "--bench", bench, "--data", f"{bench}={self.data / file}", *more]
        if not bench.startswith("glue/"):  # of these nothing is generated
            words += ["--set", f"eval.max_new_tokens={self.tokens}"]
        few = pissa(*words, "--limit", "5")["results"][bench]
        began = time.perf_counter()
        result = pissa(*words)["results"][bench]
        seconds = time.perf_counter() - began
        self.runs.append((bench, file, few["n"], result["n"], result["score"], seconds))
        print(self.runs[-1], flush=True)

    def page(self) -> str:
        lines = ["# The benchmarks on their real files", "", "## Known answers", ""]
        lines += ["| what | file | n | score, or number |", "|---|---|---|---|"]
        lines += [f"| {what} | {file} | {n:,} | {score:g} |" for what, file, n, score in self.known]
        lines += ["", "## Whole sets", ""]
        lines.append(
            f"Two steps of training of `{Path(self.model).name}` and `{Path(self.encoder).name}`, answers of at most "
            f"{self.tokens} tokens: this shows that every row goes through, not what a model can do."
        )
        lines += ["", "| bench | file | n, `--limit 5` | n, whole | score | seconds |", "|---|---|---|---|---|---|"]
        lines += [f"| {b} | {f} | {few} | {n:,} | {s:.2f} | {t:.0f} |" for b, f, few, n, s, t in self.runs]
        versions = f"pissa {pissa_cli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        when = f"{platform.machine()}; {datetime.date.today()}; `tests/check_real_data.py`."
        return "\n".join([*lines, "", f"{versions}; {when}", ""])


def _rows(file: Path) -> list[Row]:
    return [row for _, row in read_rows(str(file)) if isinstance(row, dict)]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("page", "data", "model", "encoder"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(args, Path(scratch))
        check.references()
        check.whole_runs()
        Path(args.page).write_text(check.page())


if __name__ == "__main__":
    main()
