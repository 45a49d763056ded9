"""The package's layers: imports go downward only, and the command line is there before torch is."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import str_to_bool

from pissa_cli import __version__
from pissa_cli.adapters.methods import METHODS
from pissa_cli.initialize import initialize
from pissa_cli.schema.recipe import Recipe

PACKAGE = Path(__file__).resolve().parents[1] / "pissa_cli"
LAYERS = [
    "__main__ demo cli",
    "train merge quantize export evals",
    "outputs",
    "training",
    "initialize",
    "data run",
    "base",
    "schema",
    "adapters",
    "matrices files",
    "paths process",
    "errors heap",
]
"""From top to bottom. A module imports from lower layers, or from its own without a loop; `__version__` is anyone's."""


def level(module: str) -> int:
    name = module.removeprefix("pissa_cli").removeprefix(".")
    for number, layer in enumerate(LAYERS):
        if any(name == entry or name.startswith(f"{entry}.") for entry in layer.split()):
            return number
    raise AssertionError(f"{module} is in no layer; give it a place in LAYERS")


def imports() -> dict[str, set[str]]:
    """module -> modules of the package that it imports, anywhere in its body."""
    found: dict[str, set[str]] = {}
    names = {
        ".".join(["pissa_cli", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    for module, path in names.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pissa_cli"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[module].add(full if full in names else str(node.module))
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.startswith("pissa_cli")}
    return found


def test_imports_go_downward() -> None:
    wrong = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if "pissa_cli" not in (module, target) and level(module) > level(target)
    ]
    assert not wrong


def test_no_import_loops() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["pissa_cli.cli", "pissa_cli.schema.recipe_file", "pissa_cli.schema.recipe"])
def test_no_torch_before_work_starts(module: str) -> None:
    heavy = "{'torch', 'transformers', 'bitsandbytes', 'accelerate', 'datasets', 'numpy'}"
    code = f"import sys, {module}; bad = {heavy} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def said_at_its_end(expression: str, environment: dict[str, str]) -> str:
    """What an expression of torch's gives when `pissa --version` has run."""
    code = (
        "import atexit, sys; from pissa_cli.cli import run; sys.argv = ['pissa', '--version']\n"
        f"def tell():\n    import torch; print({expression})\n"
        "atexit.register(tell); run()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return done.stdout.splitlines()[-1]


def test_fp32_products_keep_their_bits_in_containers_that_ask_for_fewer() -> None:
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    assert said_at_its_end("torch.backends.cuda.matmul.allow_tf32", environment) == "False"


@pytest.mark.parametrize("value", ["true", "Yes", "1", "on", "false", "0", None])
def test_where_accelerate_is_to_use_the_cpu_no_library_sees_a_gpu(value: str | None) -> None:
    """transformers put a 4-bit base on the GPU that it saw, and the rows stayed on the CPU."""
    environment = {name: own for name, own in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"CUDA_VISIBLE_DEVICES": "0"} | ({} if value is None else {"ACCELERATE_USE_CPU": value})
    on_cpu = value is not None and bool(str_to_bool(value))
    assert said_at_its_end("torch.cuda._parse_visible_devices()", environment) == ("[]" if on_cpu else "[0]")


@pytest.mark.parametrize(
    "command",
    [
        "init --model x --rank 0",
        "init --model ./nowhere",
        "init --model nowhere/",
        "train --model {model}",
        "train --model {model} --set data.train=nowhere.jsonl",
        "train --model {model} --set data.train={rows} --set data.format=text",
        "train --model {model} --set data.train={rows} --output {rows}",
        "train --model {model} --set data.train={rows} --resume",
        "eval gsm8k --bench gsm8k",
        "eval gsm8k --bench gsm9k",
        "eval gsm8k --bench gsm8k --data gsm8k=nowhere.jsonl",
        "eval --set model.name=x --bench loss --data loss={rows} --samples {rows}",
        *(f"{command} gsm8k" for command in ("merge", "quantize", "export")),
    ],
)
def test_usage_errors_need_no_torch(command: str, models: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    refused_without_torch(command.format(model=models("llama"), rows=rows).split(), tmp_path)


@pytest.mark.parametrize("changed", [[], ["--resume", "--set", "train.lr=1e-3"]])
def test_what_a_run_has_done_needs_no_torch(
    changed: list[str], models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    made = recipe(models("llama"), "adapter.rank=4", f"data.train={rows}")
    initialize(made)
    step = Path(made.output) / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"step": 1}')
    refused_without_torch(["train", made.output, *changed], tmp_path)


def test_options_that_do_not_go_together_need_no_torch(
    models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    made = recipe(models("llama"), "adapter.rank=4")
    initialize(made)
    refused_without_torch(["merge", made.output, "--force"], tmp_path)
    refused_without_torch(["export", made.output, "--as", "nf4", "--rank", "2"], tmp_path)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_run_that_is_not_trained_needs_no_torch(
    method: str, flags: list[str], models: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    made = recipe(models("llama"), f"adapter.method={method}", "model.bits=32", "eval.bench=[loss]")
    initialize(made)
    for command in ("merge", "quantize", "export", "eval"):
        refused_without_torch([command, made.output, *flags], tmp_path)
    for command in ("export", "eval"):
        refused_without_torch([command, made.output, "--checkpoint", "2", *flags], tmp_path)


def test_what_is_imported_is_not_looked_over_again() -> None:
    code = """
import gc
from pissa_cli.cli import show
from pissa_cli.heap import for_good
show.load_libraries(debug=False)
frozen = gc.get_freeze_count()
show.load_libraries(debug=False)
assert gc.isenabled() and gc.get_freeze_count() == frozen > 100_000
try:
    with for_good():
        import wave
        raise KeyboardInterrupt
except KeyboardInterrupt:  # and a second one is not lost in a finalizer, with a traceback
    assert gc.isenabled() and gc.get_freeze_count() > frozen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_taken_output_needs_no_torch(models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path) -> None:
    made = recipe(models("llama"), "adapter.rank=4")
    initialize(made)
    (Path(made.output) / "adapter").mkdir()
    taken = str(rows.parent)
    for words in (["quantize", made.output], ["quantize", str(models("llama"))], ["export", made.output]):
        assert "exists already" in refused_without_torch([*words, "--output", taken], rows.parent)
    below = ["train", "--model", str(models("llama")), "--set", f"data.train={rows}", "--output", f"{rows}/below"]
    assert "rows.jsonl: cannot write" in without_torch(below, rows.parent, 1)


def test_outputs_of_another_program_are_scored_without_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?", "answer": "4\\n#### 4"}\n')
    (tmp_path / "outputs.jsonl").write_text('{"id": 0, "output": "The answer is: 4"}\n')
    words = ["eval", "--set", "model.name=x", "--bench", "gsm8k", "--data", "rows.jsonl", "--samples", "outputs.jsonl"]
    without_torch(words, tmp_path, 0)
    assert json.loads((tmp_path / "out/eval/samples/gsm8k/result.json").read_text())["score"] == 100


def refused_without_torch(words: list[str], folder: Path) -> str:
    return without_torch(words, folder, 2)


def without_torch(words: list[str], folder: Path, code: int) -> str:
    """What a command says that ends with this code, and has needed no library by then."""
    program = (
        "import sys; from pissa_cli.cli import app; from pissa_cli.cli.edge import run_guarded; words = sys.argv[1:];"
        f"assert run_guarded(lambda: app(words, standalone_mode=False), words) == {code};"
        "bad = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_every_module_is_on_the_map() -> None:
    section = (PACKAGE.parent / "docs" / "design.md").read_text().partition("## Map of the modules")[2]
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    commands = {f"cli/{name}.py" for name in ("init", "train", "evaluate", "merge", "quantize", "export")}
    methods = {f"adapters/{name}.py" for name in METHODS}
    empty = {path for path in PACKAGE.rglob("__init__.py") if path.parent.name != "cli"}
    there = {str(path.relative_to(PACKAGE)) for path in set(PACKAGE.rglob("*.py")) - empty}
    assert set(re.findall(r"`([\w/]+\.py)`", "".join(rows))) == there - commands - methods


def test_functions_are_in_the_modules_that_the_design_names() -> None:
    sources: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        sources[path.stem] = sources.get(path.stem, "") + path.read_text()
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    modules = sources.keys() - Recipe.model_fields  # `train.lr` is a key
    named = [pair for pair in re.findall(r"`(\w+)\.(?!py`)(\w+)`", design) if pair[0] in modules]
    wrong = [pair for pair in named if not re.search(rf"(?m)^(?:def|class) {pair[1]}\b", sources[pair[0]])]
    assert named and not wrong


def test_files_stay_small() -> None:
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long


def test_a_command_ends_without_the_interpreters_end() -> None:
    """Where what the collector passes over is called leaked, by Triton 3.9 with a page of lines."""
    code = """
import atexit, os, sys
from pissa_cli.__main__ import main

class Last:
    def __del__(self, write=os.write):
        write(1, b"the interpreter's end")

sys.last = Last()
atexit.register(print, "registered")
sys.argv = ["pissa", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines() == [f"pissa {__version__}", "registered"]
