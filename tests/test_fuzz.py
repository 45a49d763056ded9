"""Hostile input of every kind: no traceback, no exit code but 0, 1 or 2, no file written outside the output folder.

In full, 2,000 recipes, 2,000 data files and 500 folders:

    PISSA_FUZZ=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest tests/test_fuzz.py

PISSA_FUZZ_SEED=N draws others (default: 0).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_folders
import fuzz_recipes
import fuzz_rows
import pytest
from conftest import make_model, save_model
from fuzzing import examples, outside, patience, problem, run, tree, writes
from hypothesis import given
from hypothesis import strategies as st

from pissa_cli.data.examples import Examples
from pissa_cli.data.tokenize import load_examples
from pissa_cli.errors import UsageError
from pissa_cli.evals.benches import GENERATED, read_bench
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe import EvalSection
from pissa_cli.schema.recipe_file import dump, load
from pissa_cli.training.steps import count_steps

pytestmark = pytest.mark.usefixtures("rendered")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fail(reason: str, case: Any) -> None:
    raise AssertionError(f"{reason}\n{case!r:.3000}")


class Example:
    """A folder of one example, with something beside the output folder that must stay as it is."""

    def __init__(self, place: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=place))
        self.work = self.folder / "work"
        self.work.mkdir()
        (self.folder / "x").write_text("precious")

    def __enter__(self) -> Example:
        self._before = Path.cwd()
        os.chdir(self.work)
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
        shutil.rmtree(self.folder, ignore_errors=True)


def reread(file: Path, flags: list[str]) -> str | None:
    """What is wrong with the resolved recipe as the run folder keeps it: it must read as the one it was made from."""
    recipe = load(str(file), {}, flags[1::2]).recipe
    copy = file.with_name("resolved.yaml")
    copy.write_text(dump(recipe))
    again = load(str(copy), {}).recipe
    copy.unlink()
    if count_steps(4, recipe) < 1:
        return "no steps"
    return None if again == recipe else f"read again: {again}"


def changed(before: dict[str, str], after: dict[str, str], output: Path) -> list[str]:
    """The paths that are not as they were, but for folders on the way to the output folder."""
    paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    return [path for path in paths if path in before or not output.resolve().is_relative_to(path)]


ROW = {"instruction": "Add 1 and 2.", "output": "3", "prompt": "1 + 2 =", "completion": "3", "text": "1 2 3"}
ROW |= {"label": 0, "sentence1": "a", "sentence2": "b", "input": "", "question": "1 + 1?", "answer": "2 #### 2"}


def test_recipes_that_could_be_meant(place: Path, models: Callable[[str], Path]) -> None:
    """They run: init or a step of training, and what comes after where that went well."""
    after = [("eval", "--bench", "loss", "--data", "rows.jsonl"), ("merge",), ("quantize",), ("export",)]

    kinds = [models(name) for name in ("llama", "llama", "gpt2", "qwen2", "mixtral")]
    rows = Path("rows.jsonl")
    seeds = [fuzz_recipes.small(model, rows, *start) for model in kinds for start in fuzz_recipes.STARTS]

    @examples(300, 5)
    @given(fuzz_recipes.plausible(seeds), st.sampled_from(after))
    def check(recipe: fuzz_recipes.Recipe, then: tuple[str, ...]) -> None:
        with Example(place) as example:
            (example.work / "recipe.yaml").write_bytes(recipe.content)
            (example.work / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 5)
            flags = ["--set", "train.steps=1", "--set", "train.batch_size=2"]
            try:
                output = Path(load("recipe.yaml", {}, flags[1::2]).recipe.output)
            except UsageError:
                output = Path("nothing")
            whole, before = tree(example.folder), tree(example.folder, output.resolve())
            with writes() as written:
                outcome = run("train", "recipe.yaml", *flags)
                reason = problem(outcome)
                if reason is None and outcome.code == 0:
                    outcome = run(*then[:1], output, *then[1:])
                    reason = problem(outcome)
            left = outside(written, output)
            if reason is None and (left or changed(before, tree(example.folder, output.resolve()), output)):
                reason = f"written: {left} {changed(before, tree(example.folder, output.resolve()), output)}"
            if reason is None and outcome.code == 2 and not written and whole != tree(example.folder):
                reason = "left something behind"
            if reason is not None:
                fail(reason, (recipe, then))

    check()


DRY = [("train",), ("init",), ("eval", "--bench", "loss"), ("merge",), ("quantize",)]


def test_mutated_recipes(place: Path, models: Callable[[str], Path]) -> None:
    model = models("llama")
    seeds = [*fuzz_recipes.SHIPPED.values(), *[fuzz_recipes.small(model, Path("rows.jsonl"))] * 60]

    @examples(1700, 60)
    @given(fuzz_recipes.mutated(seeds), st.sampled_from([*DRY[:1] * 8, *DRY]), st.booleans(), st.booleans())
    def check(recipe: fuzz_recipes.Recipe, command: tuple[str, ...], own: bool, as_json: bool) -> None:
        with Example(place) as example:
            file = example.work / "recipe.yaml"
            file.write_bytes(recipe.content)
            before = tree(example.folder)
            flags = [word for text in recipe.sets for word in ("--set", text)]
            flags += ["--set", f"model.name={model}"] if own else []
            with writes() as written:
                outcome = run(*command, file, "--dry-run", *flags, *(["--json"] if as_json else []))
            reason = problem(outcome, (0, 2))
            if reason is None and (tree(example.folder) != before or outside(written, None)):
                reason = f"written: {written}"
            if reason is None and outcome.code == 0:
                reason = reread(file, flags)
            if reason is not None:
                fail(reason, (recipe, command, own))

    check()


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] + m['content'] | trim }}]{% endfor %}"
    "{{ '[' if add_generation_prompt else '' }}"
)


def test_mutated_rows(place: Path, tokenizer: Any) -> None:
    """Read and tokenized: a UsageError, or examples of which each has something to learn."""

    @examples(1600, 60)
    @given(
        fuzz_rows.mutated(fuzz_rows.FORMATS),
        st.sampled_from([CHAT, STRICT]),
        st.sampled_from([512, 512, 8]),
        st.sampled_from([None, None, 1, 2]),
        st.booleans(),
    )
    def check(data: fuzz_rows.Data, chat: str, max_length: int, limit: int | None, cached: bool) -> None:
        tokenizer.chat_template = chat
        section = DataSection(format=data.format, max_length=max_length, limit=limit)
        labels = fuzz_rows.LABELS.get(data.format, [])
        with Example(place) as example:
            file = fuzz_rows.place(data, example.work)
            cache = example.folder / "cache" if cached else None
            before = tree(example.work)
            reason = None
            try:
                with patience():
                    found = load_examples(str(file), section, tokenizer, cache, labels)
                    reason = unsound(found, tokenizer, max_length)
                    again = load_examples(str(file), section, tokenizer, cache, labels)
                    if reason is None and again.facts() != found.facts():
                        reason = f"the second time otherwise: {found.facts()} {again.facts()}"
                    found.notes("x")
            except UsageError as error:
                reason = None if "rows." in error.message else f"does not name the file: {error.message}"
            except Exception:
                reason = traceback.format_exc()
            if reason is None and tree(example.work) != before:
                reason = "changed something"
            if reason is not None:
                fail(reason, (data, max_length, limit))

    check()


def unsound(examples: Examples, tokenizer: Any, max_length: int) -> str | None:
    """What is wrong with tokenized examples."""
    lengths = examples.offsets.diff()
    if len(examples) < 1 or int(lengths.min()) < 1 or int(lengths.max()) > max_length:
        return f"lengths {lengths}"
    if int(examples.offsets[-1]) != len(examples.ids) or len(examples.ids) != len(examples.targets):
        return "offsets that do not fit"
    if not bool(((examples.ids >= 0) & (examples.ids < len(tokenizer))).all()):
        return "tokens that there are not"
    if any(examples.num_targets(i) < 1 for i in range(len(examples))):
        return "an example without a target"
    if examples.labels is not None and not bool(examples.labels.isfinite().all()):
        return f"labels {examples.labels}"
    return None


def test_mutated_rows_of_benchmarks(place: Path) -> None:
    @examples(250, 20)
    @given(fuzz_rows.mutated(fuzz_rows.BENCHES))
    def check(data: fuzz_rows.Data) -> None:
        with Example(place) as example:
            file = fuzz_rows.place(data, example.work)
            reason = None
            try:
                with patience():
                    recipe = load(None, {("model", "name"): ("--model", "x")}).recipe
                    recipe = recipe.model_copy(update={"eval": EvalSection(data={data.format: str(file)})})
                    bench = GENERATED[data.format]
                    for row in read_bench(data.format, recipe):
                        bench.question(row).encode()
                        bench.reference(row)
                        bench.identity(row)
                        if not bench.runs_code:
                            bench.grade([row], ["The answer is: 2"], lambda *_: None)
                            bench.beside([row], ["The answer is: 2"])
            except UsageError as error:
                reason = None if "rows." in error.message else f"does not name the file: {error.message}"
            except Exception:
                reason = traceback.format_exc()
            if reason is not None:
                fail(reason, data)

    check()


def test_training_on_mutated_rows(place: Path, models: Callable[[str], Path]) -> None:
    model = models("llama")

    @examples(150, 4)
    @given(fuzz_rows.mutated(fuzz_rows.FORMATS), st.booleans())
    def check(data: fuzz_rows.Data, held_out: bool) -> None:
        with Example(place) as example:
            file = fuzz_rows.place(data, example.work)
            good = example.work / "good.jsonl"
            good.write_text(json.dumps(fuzz_rows.FORMATS[data.format]) + "\n")
            before = tree(example.folder)
            sets = [f"data.format={data.format}", "train.steps=1", "train.batch_size=2", "adapter.rank=2"]
            sets += [f"data.train={good if held_out else file}", *([f"data.eval={file}"] if held_out else [])]
            if data.format in fuzz_rows.LABELS:
                sets += [
                    "model.task=sequence-classification",
                    f"model.labels={json.dumps(fuzz_rows.LABELS[data.format])}",
                ]
            with writes() as written:
                outcome = run("train", "--model", model, *[word for text in sets for word in ("--set", text)])
            reason = problem(outcome)
            output = example.work / "out"
            if reason is None and (outside(written, output) or changed(before, tree(example.folder, output), output)):
                reason = f"written: {outside(written, output)}"
            if reason is not None:
                fail(reason, data)

    check()


RUNS = {
    "pissa": ["adapter.method=pissa", "model.bits=32"],
    "qpissa": ["adapter.method=pissa", "model.bits=4", "adapter.passes=1"],
    "vera": ["adapter.method=vera", "model.bits=32", "adapter.modules_to_save=[norm]"],
    "full": ["adapter.method=full", "model.bits=32"],
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "resume": ("train", "out", "--resume", "--set", "train.steps=3"),
    "loss": ("eval", "out", "--bench", "loss", "--data", "loss=rows.jsonl"),
    "gsm8k": ("eval", "out", "--bench", "gsm8k", "--data", "gsm8k=rows.jsonl"),
    "merge": ("merge", "out"),
    "quantize": ("quantize", "out"),
    "export": ("export", "out", "--check"),
    "checkpoint": ("export", "out", "--checkpoint", "1"),
    "dry": ("init", "--model", "base", "--dry-run"),
    "init": ("init", "--model", "base", "--rank", "2", "--output", "new"),
    "train": ("train", "--model", "base", "--rank", "2", "--output", "new", "--set", "data.train=rows.jsonl"),
    "model": ("quantize", "base", "--output", "new"),
}
COMMANDS["train"] += ("--set", "train.steps=1", "--set", "train.batch_size=2")


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Path]:
    """Folders by method: `base`, a model; `out`, a run on it of two steps; `rows.jsonl`."""
    made = {}
    for name, sets in RUNS.items():
        folder = place / "whole" / name
        folder.mkdir(parents=True)
        save_model(make_model("llama"), folder / "base", "200KB" if name == "vera" else "50GB")
        (folder / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
        with Example(place):
            os.chdir(folder)
            sets = [*sets, "data.train=rows.jsonl", "train.steps=2", "train.save_every=1", "train.batch_size=2"]
            sets += ["eval.max_new_tokens=2", *([] if name == "full" else ["adapter.rank=2"])]
            flags = [word for text in sets for word in ("--set", text)]
            assert run("train", "--model", "base", "--output", "out", *flags).code == 0
        made[name] = folder
    return made


def moved(folder: Path, old: Path) -> None:
    """Let a copied run know where its base is now: what `--set model.name=` would say."""
    recipe = folder / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(old), str(folder)))


def test_mutated_folders(place: Path, whole: dict[str, Path]) -> None:
    kinds = [(name, command) for name in RUNS for command in COMMANDS]

    @examples(500, 12)
    @given(st.sampled_from(kinds), st.booleans(), fuzz_folders.damages())
    def check(kind: tuple[str, str], of_run: bool, damages: list[fuzz_folders.Damage]) -> None:
        method, command = kind
        with Example(place) as example:
            shutil.copytree(whole[method], example.work, dirs_exist_ok=True)
            moved(example.work, whole[method])
            (example.folder / "outside").mkdir()
            target = "out" if of_run and not {"new", "--dry-run"} & set(COMMANDS[command]) else "base"
            done = [fuzz_folders.damage(example.work / target, one, example.folder / "outside") for one in damages]
            output = example.work / ("new" if "new" in COMMANDS[command] else "out")
            before = tree(example.folder, output)
            with writes() as written:
                outcome = run(*COMMANDS[command])
            reason = problem(outcome)
            left = [*outside(written, output), *changed(before, tree(example.folder, output), output)]
            if reason is None and left:
                reason = f"written: {left}"
            if reason is not None:
                fail(reason, (method, command, done, damages))

    check()
