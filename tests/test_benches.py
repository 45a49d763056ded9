"""MATH, HumanEval and MBPP: what is read out of an output, what it is worth, and outputs made elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_cli.data.examples import Examples
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals import code, competition_math, held_out, humaneval, mbpp, results
from pissa_cli.evals import run as module
from pissa_cli.evals.bench import Grade, pass_at
from pissa_cli.evals.code import written
from pissa_cli.evals.outputs import Kept, read_samples
from pissa_cli.evals.published import published
from pissa_cli.evals.results import score_samples
from pissa_cli.evals.run import evaluate
from pissa_cli.schema.glue import SETS
from pissa_cli.train import train

EQUAL = [
    ("\\frac{1}{2}", "\\dfrac{1}{2}"),
    ("\\frac{1}{2}", "\\tfrac{1}{2}"),
    ("\\frac{1}{2}", "\\frac12"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", ".5"),
    ("\\frac{1}{72}", "\\frac1{72}"),
    ("\\frac{3}{4}", "3/4"),
    ("-\\frac{3}{4}", "-\\frac34"),
    ("\\sqrt{3}", "\\sqrt3"),
    ("2\\sqrt{3}", "2\\sqrt3"),
    ("5", "x=5"),
    ("5", "x = 5"),
    ("90", "90^\\circ"),
    ("90", "90^{\\circ}"),
    ("10", "10\\%"),
    ("10", "\\$10"),
    ("12", "12\\text{ apples}"),
    ("(1,2)", "\\left(1,2\\right)"),
    ("(1,2)", "(1, 2)"),
    ("1000", "1\\!000"),
    ("0.25", ".25"),
    ("{0.5}", "{.5}"),
    ("x+1", "x + 1"),
    ("a\\b", "a\\\\b"),
    ("12", "1\n2"),
    ("k=\\frac{1}{2}", "\\frac{1}{2}"),
    ("-3", "-3"),
    ("", ""),
    ("", "\\!"),
    ("\\frac{1}{2}", "\\frac 12"),
    ("x\\frac1", "x \\frac1"),
    ("1,0.5", "1, .5"),
]
UNEQUAL = [
    ("0.5", "0.50"),
    ("1/2", "2/4"),
    ("1000", "1,000"),
    ("12", "12 apples"),
    ("12", "12\\text{apples}"),
    ("x=5", "abc=5"),
    ("1/2", "a/b"),
    ("3/4", "03/4"),
    ("\\pi", "3.14"),
    ("(1,2)", "(2,1)"),
    ("\\sqrt{4}", "2"),
    ("10^2", "100"),
    ("5", "five"),
    ("+5", "5"),
    ("1.0", "1"),
    ("a\\text{ b}\\text{ c}", "a"),
    ("\\frac", "\\frac{}"),
    ("\\sqrt", "\\sqrt{}"),
    ("\\sqrt{3}", "\\sqrt 3"),
    ("\\frac{03}{4}", "03/4"),
    ("b", "a=b=c"),
]
EXTRACTED = [
    ("The answer is: 5", "5"),
    ("The answer is: 5.", "5"),
    ("The answer is: 5 .", "5"),
    ("The answer is: 5..", "5."),
    ("The answer is: 0.5.", "0.5"),
    ("The answer is: 5.\nAnd more.", "5"),
    ("The answer is: 5. And more", "5. And more"),
    ("The answer is: 1. The answer is: 2", "2"),
    ("The answer is:  7 ", "7"),
    ("The answer is: $5$", "$5$"),
    ("The answer is: \\frac{1}{2}\n", "\\frac{1}{2}"),
    ("The answer is:5", None),
    ("The answer is 5", None),
    ("\\boxed{5}", None),
    ("", None),
    ("The answer is: ", ""),
]
GOLD = [
    ("{x} is \\boxed5", None),
    ("So $\\boxed{5}$.", "5"),
    ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
    ("$\\boxed{1}$ or $\\boxed{2}$", "2"),
    ("$\\fbox{3}$", "3"),
    ("$\\boxed 72$ done", "72"),
    ("$\\boxed{\\text{(A) }{x}}$", "\\text{(A) }{x}"),
    ("none", None),
    ("$\\boxed{1", None),
    ("$\\boxed5$", None),
    ("\\boxed{5}", "5"),
    ("$\\fbox{3}$ or $\\fbox{4}$", "4"),
    ("$\\boxed 1$ or $\\boxed 2$", "2"),
]
ADD = {
    "task_id": "Own/0",
    "prompt": 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """The sum."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
LARGEST = {
    "task_id": 7,
    "text": "Write a function to find the largest number.",
    "code": "def largest(xs):\n  return max(xs)",
    "test_setup_code": "limit = largest([3])",
    "test_list": ["assert largest([1, 3, 2]) == limit", "assert largest([-1]) == -1"],
}


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers(one: str, other: str) -> None:
    assert competition_math.equal(one, other) and competition_math.equal(other, one)


@pytest.mark.parametrize(("one", "other"), UNEQUAL)
def test_answers_that_the_rules_do_not_make_equal(one: str, other: str) -> None:
    assert not competition_math.equal(one, other)


@pytest.mark.parametrize(("output", "wanted"), EXTRACTED)
def test_extraction(output: str, wanted: str | None) -> None:
    assert competition_math.extract(output) == wanted


@pytest.mark.parametrize(("solution", "wanted"), GOLD)
def test_the_reference_is_the_last_box(solution: str, wanted: str | None) -> None:
    assert competition_math.gold({"solution": solution}) == wanted


def test_code_is_cut_as_the_reference_does() -> None:
    assert written("x = 1\r\ny = 2\r\nassert x") == "x = 1\ny = 2"
    assert written("a\n```python\nx = 1\n```\nb\n```python\ny\n```") == "x = 1"
    for tail in ('if __name__ == "__main__":\n    f()', "# Example usage:\nf()", "assert f() == 1"):
        assert written(f"```python\ndef f(): return 1\n{tail}\n```") == "def f(): return 1"
    assert written("```python\nx = '```'\ny = 2\n```\nz") == "x = '```'\ny = 2"
    assert written("```python\nx = 1") == "\nx = 1"  # an output that was cut off
    assert written("```python\nx = 1\n```python\ny = 2\n```") == "x = 1\n\ny = 2"  # the first fence is not closed


def grades(bench: Any, row: dict[str, Any], outputs: list[str]) -> list[bool]:
    return [g.correct for g in bench.grade([row] * len(outputs), outputs, lambda *_: None)]


def test_humaneval_runs_what_was_written() -> None:
    whole = ADD["prompt"] + ADD["canonical_solution"]
    outputs = {
        ADD["canonical_solution"]: True,
        whole: True,
        f"Sure.\n```python\n{whole}```\nThis sums.": True,
        f"```python\n{whole}\nassert total([1]) == 2\n```": True,
        f"```python\n{ADD['canonical_solution']}\n```": False,  # which loses the indentation of its first line
        whole.replace("sum(xs)", "sum(xs) + 1"): False,
        whole.replace("sum(xs)", "-sum(xs)"): False,
        "def total(xs: List[int]): return sum(xs)": True,  # the import is the prompt's
        "def total(xs: Undefined): return sum(xs)": False,
        "I cannot.": False,
        "": False,
        f"{whole}\nimport sys; sys.exit(0)": False,
    }
    assert grades(humaneval.BENCH, ADD, list(outputs)) == list(outputs.values())
    wrong = humaneval.BENCH.grade([ADD], ["    return 0"], lambda *_: None)
    assert (wrong[0].answer, wrong[0].detail) == ("    return 0", "raised AssertionError: ")
    assert humaneval.BENCH.question(ADD).endswith(f"block:\n```python\n{ADD['prompt'].strip()}\n```")


def test_mbpp_runs_what_was_written() -> None:
    sanitized = {"prompt": LARGEST["text"], "test_imports": ["limit = 3"], "test_list": LARGEST["test_list"]}
    joined = sanitized | {"text": None, "task_id": None}  # as in a table of both sets
    for row in (LARGEST, sanitized, joined):
        assert mbpp.BENCH.problem(row) is None
        outputs = {
            str(LARGEST["code"]): True,
            f"```python\n{LARGEST['code']}\n```": True,
            str(LARGEST["code"]).replace("max", "min"): False,
            "def largest(xs): return 3": False,  # which the first test is content with
            "def other(xs): return 3": False,
            " ": False,
        }
        assert grades(mbpp.BENCH, row, list(outputs)) == list(outputs.values())
        asked = f'"""\n{LARGEST["text"]}\n{LARGEST["test_list"][0]}\n"""'
        assert mbpp.BENCH.question(row).endswith(f"\n```python\n{asked}\n```")
    assert [mbpp.BENCH.identity(row) for row in (LARGEST, sanitized, joined)] == ["7", None, None]
    assert (humaneval.BENCH.identity(ADD), humaneval.BENCH.identity(LARGEST | {"task_id": 0})) == ("Own/0", "0")
    assert humaneval.BENCH.identity(sanitized) is None


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def made(recipe: Callable[..., Any], models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """A recipe for HumanEval on two rows of our own."""
    other = {"task_id": "Own/1", "prompt": ADD["prompt"].replace("The sum", "Its sum")}
    data = write(tmp_path / "data.jsonl", [ADD, ADD | other])
    short = 'data.template="{instruction} {output}"'
    sets = ("eval.bench=[humaneval]", f"eval.data={{humaneval: {data}}}", short)
    return lambda *more: recipe(models("llama"), *sets, *more)


def test_outputs_made_elsewhere_are_scored_without_a_model(made: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"task_id": "Own/1", "output": " \n"}, {"task_id": "Own/0", "output": "    return sum(xs)"}]
    result = score_samples(made(), write(tmp_path / "samples.jsonl", rows), allow_code=True)["humaneval"]
    assert (result["score"], result["n"], result["model"]) == (50, 2, "samples")
    assert "not a published set" in result["rows"] and "10 s" in result["protection"] and 0 < result["seconds"] < 100
    folder = tmp_path / "out" / "eval" / "samples" / "humaneval"
    kept = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["id"], s["correct"]) for s in kept] == [(0, True), (1, False)] and kept[1]["detail"] == "empty output"
    assert json.loads((folder / "result.json").read_text())["score"] == 50


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": "Own/0", "output": "x"}], "no output for questions 1"),
        ([{"task_id": "Own/9", "output": "x"}], "no question of this data"),
        ([{"id": 0, "output": "x"}, {"task_id": "Own/0", "output": "x"}], "has an output already"),
        ([{"id": 2, "output": "x"}], "no question of this data"),
        ([{"id": -1, "output": "x"}], "no question of this data"),
        ([{"id": "0", "output": "x"}], "no question of this data"),
        ([{"task_id": "Own/0", "output": "x"}, {"task_id": "Own/0", "output": "x"}], "has an output already"),
        ([{"output": "x"}], "no question of this data"),
        (["x"], "no text 'output'"),
        ([{"task_id": "Own/0", "completion": "x"}], "no text 'output'"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(
    rows: list[dict[str, Any]], message: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        score_samples(made(), write(tmp_path / "samples.jsonl", rows), allow_code=True)


def test_outputs_are_found_by_number_or_the_rows_own_name(tmp_path: Path) -> None:
    rows = [LARGEST, LARGEST | {"task_id": 8}, {"text": "x"}]
    samples = [{"id": 2, "output": "c"}, {"task_id": 8, "output": "b"}, {"task_id": "7", "output": "a"}]
    assert read_samples(write(tmp_path / "samples.jsonl", samples), mbpp.BENCH, rows) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("k", "n", "right"), [(1, 5, 2), (2, 5, 2), (3, 5, 2), (4, 5, 2), (1, 10, 0), (10, 10, 1), (3, 4, 4)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k: int, n: int, right: int) -> None:
    subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_samples_of_one_question_count_together(made: Callable[..., Any], rows: Path) -> None:
    with pytest.raises(UsageError, match=r"needs eval\.temperature"):
        made("eval.samples=3")
    sets = ["model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=1", "eval.max_new_tokens=4"]
    recipe = made(*sets, "eval.samples=3", "eval.temperature=1.0")
    train(recipe)
    result = evaluate(recipe, allow_code=True)["humaneval"]
    folder = Path(recipe.output) / "eval" / "humaneval"
    kept = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["id"] for s in kept] == [0, 0, 0, 1, 1, 1] and len({s["output"] for s in kept}) > 1
    assert ["The sum" in s["prompt"] for s in kept] == [True] * 3 + [False] * 3
    assert (result["n"], result["score"], result["pass_at"]) == (2, 0, {"1": 0})
    grade = [Grade(None, right) for right in (True, False, True, True)]
    bench = dataclasses.replace(humaneval.BENCH, grade=lambda *_: grade)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(results.GENERATED, "humaneval", bench)
        found, _ = results.grade_outputs("humaneval", [ADD] * 4, ["x"] * 4, lambda *_: None, each=2)
    assert (found["score"], found["n"], found["pass_at"]) == (75, 2, {"1": 75})
    assert found["stderr"] == pytest.approx(100 * (0.25**2 / 2) ** 0.5)
    with pytest.MonkeyPatch.context() as patch:
        one_in_ten = dataclasses.replace(bench, grade=lambda *_: [Grade(None, number == 3) for number in range(20)])
        patch.setitem(results.GENERATED, "humaneval", one_in_ten)
        found, _ = results.grade_outputs("humaneval", [ADD] * 20, ["x"] * 20, lambda *_: None, each=10)
    assert (found["score"], found["n"], found["pass_at"]) == (5, 2, {"1": pytest.approx(5), "10": 50})


def test_the_error_of_a_held_out_loss_is_that_of_leaving_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(0)
    targets = [source.randint(20, 30) for _ in range(12)]
    losses = [count * source.uniform(1, 3) for count in targets]

    told: list[tuple[int, int]] = []

    def found(targets: list[int], losses: list[float] = losses) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        told.clear()
        order = source.sample(range(len(losses)), len(losses))
        monkeypatch.setattr(held_out, "batch_losses", lambda *_: (([i], losses[i]) for i in order))
        monkeypatch.setattr(held_out, "padding", lambda *_: 0)
        examples: Any = Examples(torch.zeros(0), torch.zeros(0), torch.zeros(len(losses) + 1))
        monkeypatch.setattr(examples, "num_targets", targets.__getitem__)
        model: Any = None
        return held_out.score(model, model, examples, lambda *given: told.append(given))

    result, samples = found(targets)
    assert told == [(done, 12) for done in range(1, 13)]
    assert [sample["loss"] for sample in samples] == losses and [sample["id"] for sample in samples] == list(range(12))
    assert result["score"] == pytest.approx(sum(losses) / sum(targets)) and result["n"] == 12
    assert result["perplexity"] == pytest.approx(math.exp(result["score"]))
    without = [(sum(losses) - losses[i]) / (sum(targets) - targets[i]) for i in range(12)]
    assert result["stderr"] == pytest.approx((11 * statistics.pvariance(without)) ** 0.5, rel=0.03)
    result, _ = found([25] * 12)
    assert result["stderr"] == pytest.approx(statistics.stdev(losses) / 25 / 12**0.5)
    result, _ = found([2], [5000.0])
    assert (result["score"], result["stderr"], result["perplexity"]) == (2500, 0, math.exp(700))


def test_no_code_runs_unasked_and_the_answers_are_kept(
    made: Callable[..., Any], rows: Path, pissa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made("model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=1", "eval.max_new_tokens=4")
    train(recipe)
    with monkeypatch.context() as context:
        context.setattr(code, "run_programs", None)
        with pytest.raises(UsageError, match="programs that a model wrote"):
            score_samples(recipe, "nowhere.jsonl")
        result = evaluate(recipe)["humaneval"]
    assert (result["score"], result["n"]) == (None, 2) and "--allow-code-execution" in result["note"]
    shown = pissa("eval", recipe.output)
    assert "humaneval: --allow-code-execution scores the answers" in shown.err and "not run" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80 and "…" not in shown.out
    assert not (Path(recipe.output) / "eval" / "humaneval").exists()
    monkeypatch.setattr(module, "generate", lambda model, tokenizer, prompts, *rest: iter([]) if not prompts else None)
    scored = evaluate(recipe, allow_code=True)["humaneval"]
    assert (scored["score"], scored["n"]) == (0, 2)


@pytest.mark.parametrize("benches", ["humaneval, math", "loss"])
def test_outputs_are_of_one_benchmark_with_questions(benches: str, made: Callable[..., Any], rows: Path) -> None:
    with pytest.raises(UsageError, match="exactly one benchmark with questions"):
        score_samples(made(f"eval.bench=[{benches}]", f"data.eval={rows}"), "nowhere.jsonl", allow_code=True)


def test_rows_without_a_field_are_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", [ADD, {"task_id": "Own/1", "prompt": "x"}])
    with pytest.raises(UsageError, match="row 2 is no row of humaneval: it has no test, entry_point"):
        score_samples(made(f"eval.data={{humaneval: {data}}}"), "nowhere.jsonl", allow_code=True)
    data = write(tmp_path / "math.jsonl", [{"problem": "x", "solution": "none"}])
    with pytest.raises(UsageError, match="row 1 is no row of math: its solution has no"):
        score_samples(made("eval.bench=[math]", f"eval.data={{math: {data}}}"), "nowhere.jsonl")
    data = write(tmp_path / "gsm8k.jsonl", [{"question": "x", "answer": "#### 12 apples"}])
    with pytest.raises(UsageError, match="row 1 is no row of gsm8k: its answer does not end in '#### number'"):
        score_samples(made("eval.bench=[gsm8k]", f"eval.data={{gsm8k: {data}}}"), "nowhere.jsonl")
    for bad, said in (
        ({"text": None}, "neither text nor prompt"),
        ({"test_list": []}, "no list of lines"),
        ({"test_list": "assert f"}, "no list of lines"),
        ({"test_imports": "import f"}, "no list of lines"),
        ({"test_setup_code": 1}, "or its test_setup_code no text"),
    ):
        data = write(tmp_path / "mbpp.jsonl", [LARGEST, LARGEST | bad])
        with pytest.raises(UsageError, match=f"row 2 is no row of mbpp: it.*{said}"):
            score_samples(made("eval.bench=[mbpp]", f"eval.data={{mbpp: {data}}}"), "nowhere.jsonl", allow_code=True)


@pytest.mark.parametrize("gone", [5, 1])
def test_kept_outputs_survive_a_cut_line_and_belong_to_one_model(gone: int, tmp_path: Path) -> None:
    path, asked = tmp_path / "a" / "outputs.jsonl", ["a", "b", "a", "c"]
    with Kept(path, ("model", 1), asked) as kept:
        kept.add(3, "three\n")
        kept.add(2, "two")
        kept.add(1, "one")
    path.write_text(path.read_text()[:-gone])
    with Kept(path, ("model", 1), asked) as kept:
        assert kept.outputs == {3: "three\n", 2: "two"}, "the second answer to 'a' is not the first"
        kept.add(1, "again")
    with Kept(path, ("model", 1), asked) as kept:
        assert kept.outputs == {3: "three\n", 2: "two", 1: "again"}
    with Kept(path, ("model", 2), asked) as kept:
        assert kept.outputs == {}


@pytest.mark.parametrize("damaged", ['{"key": "?"}', "5", "{"])
def test_kept_outputs_end_before_a_line_that_is_damaged(damaged: str, tmp_path: Path) -> None:
    path, asked = tmp_path / "outputs.jsonl", ["a", "b", "c"]
    with Kept(path, "model", asked) as kept:
        for number in range(3):
            kept.add(number, f"of {number}")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damaged, lines[3], ""]))
    with Kept(path, "model", asked) as kept:
        assert kept.outputs == {0: "of 0"}
        kept.add(2, "anew")
    with Kept(path, "model", asked) as kept:
        assert kept.outputs == {0: "of 0", 2: "anew"} and len(path.read_text().splitlines()) == 3


def test_outputs_that_cannot_be_kept_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PissaError, match=r"outputs\.jsonl: cannot write"), Kept(tmp_path / "file/outputs.jsonl", 1, []):
        pass


def test_a_smaller_evaluation_leaves_the_outputs_of_a_greater_one(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl"
    with Kept(path, "model", ["a", "b", "c"]) as kept:
        kept.add(0, "one")
        kept.add(2, "three")
    with Kept(path, "model", ["c", "b"]) as smaller:
        assert smaller.outputs == {0: "three"}
        smaller.add(1, "two")
    smaller.remove()
    with Kept(path, "model", ["a", "b", "c"]) as kept:
        assert kept.outputs == {0: "one", 1: "two", 2: "three"}
    kept.remove()
    assert not path.exists()


def test_published_figures_stand_beside_the_same_model_method_and_rows() -> None:
    assert published("mistralai/Mistral-7B-v0.1", "pissa", 16, "gsm8k", 1319) == (73.31, "arXiv 2404.02948 v4, table 2")
    assert (published("meta-llama/Llama-2-7b-hf", "lora", 16, "mt_bench", 160) or [0])[0] == 4.56
    assert (published("google/gemma-7b", "full", 32, "math", 5000) or [0])[0] == 22.71
    cola = published("microsoft/deberta-v3-base", "pissa", 32, "glue/cola", 1043)
    assert cola == (73.12, "arXiv 2404.02948 v4, table 3")
    assert published("FacebookAI/roberta-base", "vera", 32, "glue/rte", 277) == (78.7, "arXiv 2310.11454 v2, table 2")
    assert published("FacebookAI/roberta-base", "vera", 32, "glue/qqp", 40430) is None
    assert published("google/gemma-7b", "pissa", 4, "math", 5000) is None
    assert published("google/gemma-7b", "pissa", 16, "mbpp", 500) is None
    assert published("mistralai/Mistral-7B-v0.1", "vera", 16, "gsm8k", 1319) is None
    assert published("mistralai/Mistral-7B-v0.3", "pissa", 16, "gsm8k", 1319) is None
    for name, bench in results.GENERATED.items():
        assert any(published("google/gemma-7b", "pissa", 16, name, n) for n in bench.published), name
    for name in SETS.keys() - {"glue/mnli", "glue/mnli_mismatched"}:
        assert any(published("microsoft/deberta-v3-base", "pissa", 32, name, n) for n in SETS[name].rows), name


def test_outputs_that_no_file_can_hold_are_still_written(made: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"task_id": f"Own/{i}", "output": "x = '\ud83d'"} for i in (0, 1)]
    assert score_samples(made(), write(tmp_path / "samples.jsonl", rows), allow_code=True)["humaneval"]["score"] == 0


def test_the_command_says_that_nothing_was_run(made: Callable[..., Any], rows: Path, pissa: Callable[..., Any]) -> None:
    recipe = made("model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=1", "eval.max_new_tokens=4")
    train(recipe)
    done = pissa("eval", recipe.output, "--json")
    assert done.code == 0 and done.json["results"]["humaneval"]["score"] is None
    assert "not run" in pissa("eval", recipe.output).out


def test_algebra_stands_beside_the_score_and_never_instead() -> None:
    answers = {"\\frac{1}{2}": "0.50", "2x+1": "1+2x", "(1,2)": "(1,2)", "5": "6", "": "\\!"}
    rows = [{"problem": "p", "solution": f"so \\boxed{{{answer}}}"} for answer in (*answers, "7")]
    outputs = [*(f"The answer is: {answer}" for answer in answers.values()), "7"]
    found, samples = results.grade_outputs("math", rows, outputs, lambda *_: None)
    assert [sample["correct"] for sample in samples] == [False, False, True, False, True, False]
    assert (found["score"], found["symbolic"]) == (pytest.approx(100 * 2 / 6), pytest.approx(100 * 4 / 6))
