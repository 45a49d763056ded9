"""GSM8K's scorer against the reference protocol's rules, generation, and what eval leaves behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEMO, Outcome
from forks import exit_code, forked
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from pissa_cli.base.configuration import context_of
from pissa_cli.base.model import best_device
from pissa_cli.data.tokenize import question_prompt
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals import gsm8k
from pissa_cli.evals import run as module
from pissa_cli.evals.generate import MOST, ON_CPU, _Ends, cut, fitting, generate, same_in_batches
from pissa_cli.evals.load import load_bench
from pissa_cli.evals.outputs import Kept
from pissa_cli.evals.run import evaluate
from pissa_cli.evals.served import Server
from pissa_cli.files import locked
from pissa_cli.outputs import trained
from pissa_cli.outputs.card import model_card
from pissa_cli.outputs.result import write_result
from pissa_cli.run.rundir import Run
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe_file import load
from pissa_cli.train import train

FORMS = [
    ("The answer is: 42", 42),
    ("The answer is: 42.", 42),
    ("The answer is: $42", 42),
    ("The answer is: -7", -7),
    ("The answer is: 1,234", 1234),
    ("The answer is: 1,234,567", 1234),
    ("The answer is: 0.75", 1),
    ("The answer is: 2.5", 2),
    ("The answer is: 3.5", 4),
    ("The answer is: 3/4", 1),
    ("The answer is: 10/4", 2),
    ("The answer is: 5/0", 5),
    ("The answer is: /0", None),
    ("The answer is: 5/00", None),
    (f"The answer is: {'9' * 400}/7", None),
    ("The answer is: 12 apples, 3 left", 12),
    ("The answer is: 1. The answer is: 2", 2),
    ("The answer is:42", None),
    ("The answer is 42", None),
    ("the answer is: 42", None),
    ("The answer is: none", None),
    ("The answer is: ", None),
    ("", None),
    ("#### 42", None),
    ("The answer is: +5", 5),
    ("The answer is: .5", 0),
    ("The answer is: 18\n", 18),
]


@pytest.mark.parametrize(("output", "wanted"), FORMS)
def test_extraction(output: str, wanted: int | None) -> None:
    assert gsm8k.extract(output) == wanted


def test_gold_and_score() -> None:
    row = {"question": "q", "answer": "It costs 1,250.\n#### 1,250"}
    assert gsm8k.gold(row) == "1,250"
    assert gsm8k.score("The answer is: 1250", gsm8k.gold(row)) and gsm8k.score("The answer is: 1,250", "1,250")
    assert gsm8k.is_number("-1,250.5") and not gsm8k.is_number("12 apples") and not gsm8k.is_number("nan")
    assert not gsm8k.score("The answer is: 125", "1,250") and not gsm8k.score("no marker 1250", "1,250")
    assert gsm8k.score("The answer is: 0", "0") and not gsm8k.score("The answer is: 2", "2.5")
    outputs = ["The answer is: 1,250 #### 0", "The answer is: 0", "#### 1,250"]
    marks = {"question": "q", "answer": "#### is no 0.\n#### 1,250"}
    found = [(g.answer, g.correct) for g in gsm8k.BENCH.grade([row, row, marks], outputs, lambda *_: None)]
    assert found == [(1250, True), (0, False), (None, False)] and gsm8k.gold(marks) == "1,250"


def test_answers_in_the_form_of_gsm8ks_own_rows_are_noted(pissa: Any, tmp_path: Path) -> None:
    assert not gsm8k.other_form(["#" * 40] * 9)
    assert gsm8k.other_form(["The answer is 24."] * 9) and gsm8k.other_form(["So\n**Answer:** $24"] * 9)
    assert gsm8k.other_form(["#### 4"] * 5 + ["4"] * 5)
    assert str(gsm8k.other_form(["#### 4"] * 9 + ["The answer is: 4"])).startswith("9 of 10 answers")
    for outputs in (["#### 4\nThe answer is: 4"] * 9, ["The answer is: 4"] * 2 + ["#### 4"] * 8, ["4"] * 9):
        assert gsm8k.other_form(outputs) is None
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?", "answer": "4\\n#### 4"}\n')
    (tmp_path / "outputs.jsonl").write_text('{"id": 0, "output": "It is 4.\\n#### 4"}\n')
    words = ["--data", tmp_path / "rows.jsonl", "--samples", tmp_path / "outputs.jsonl", "--output", tmp_path]
    outcome = pissa("eval", "--bench", "gsm8k", "--set", "model.name=x", *words)
    assert outcome.code == 0 and "gsm8k: 1 of 1 answers end in '#### ...'" in outcome.err
    assert "docs/evaluation.md, Rows for GSM8K" in outcome.err


@pytest.fixture(scope="module")
def demo_base() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO / "base")


PROMPTS = [
    "Anna has 12 apples. Anna finds 5 apples. Count the apples:",
    "Ben has 7",
    "Kim has 40 pens. Kim loses 9 pens. Count",
]


def test_generation_is_that_of_transformers_and_ignores_the_batch(demo_base: tuple[Any, Any]) -> None:
    model, tokenizer = demo_base
    alone = {}
    for index, prompt in enumerate(PROMPTS):
        encoded = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=20, do_sample=False
        )
        alone[index] = tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    model.generation_config.repetition_penalty = 5.0
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for batch_size in (1, 2, 3):
        assert dict(generate(model, tokenizer, tokens, batch_size, 20)) == alone
    assert dict(generate(model, tokenizer, tokens, None, 20)) == alone
    assert alone[0].startswith(" 12 + 5 = 17. The answer is: 17")
    stopped = dict(generate(model, tokenizer, tokens, None, 20, stop=["17.", " The"]))
    assert stopped[0] == " 12 + 5 = " and all(alone[index].startswith(text) for index, text in stopped.items())


def test_samples_are_those_of_transformers_by_seed_and_place(demo_base: tuple[Any, Any]) -> None:
    model, tokenizer = demo_base
    prompts = [tokenizer(text)["input_ids"] for text in sorted(PROMPTS, key=len, reverse=True)]
    sampled = {"do_sample": True, "temperature": 1.7, "top_p": 0.95, "top_k": 0, "max_new_tokens": 20}
    for seed in (3, 4):
        wanted = {}
        for place, prompt in enumerate(prompts):
            torch.manual_seed(seed + place)
            ids = torch.tensor([prompt])
            tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampled)
            wanted[place] = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
        assert dict(generate(model, tokenizer, prompts, 1, 20, temperature=1.7, seed=seed)) == wanted
        assert len(set(wanted.values())) == 3


@pytest.mark.parametrize("stop", [(), ("7.",)])
def test_an_answer_that_goes_on_is_put_aside(
    stop: tuple[str, ...], demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one does not end by itself, the others after some 18 tokens."""
    model, tokenizer = demo_base
    texts = [f"Anna has {number} apples. Anna finds 5 apples. Count the apples:" for number in range(23)]
    prompts = [tokenizer(text)["input_ids"] for text in [" ".join(["Anna"] * 20), *texts]]
    alone = dict(generate(model, tokenizer, prompts, 1, 60, stop=stop))
    rows: list[int] = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **rest: rows.append(len(ids)) or original(ids, **rest))
    assert dict(generate(model, tokenizer, prompts, 8, 60, stop=stop)) == alone
    assert rows[:3] == [8, 8, 8] and len(rows) == 4 and rows[3] <= 6


def test_a_batch_that_does_not_fit_is_halved(demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_base
    prompts = [tokenizer(f"Anna has {number} apples.")["input_ids"] for number in range(7)]
    alone = dict(generate(model, tokenizer, prompts, 1, 8))
    original, tried = model.generate, list[int]()

    def small(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > fits:
            raise torch.OutOfMemoryError
        return original(ids, **rest)

    monkeypatch.setattr(model, "generate", small)
    fits = 3
    for batch_size, wanted in ((None, [7, 3, 3, 1]), (4, [4, 2, 2, 2, 1])):
        assert dict(generate(model, tokenizer, prompts, batch_size, 8)) == alone
        assert tried == wanted
        tried.clear()
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(generate(model, tokenizer, prompts, 4, 8))
    assert tried == [4, 2, 1]


def test_what_is_asked_beside_a_prompt_may_change_its_answer(demo_base: tuple[Any, Any]) -> None:
    model, tokenizer = demo_base
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model.generation_config.stop_strings = ["####"]  # of which generate() would ask for a tokenizer
    assert same_in_batches(model, tokenizer, prompts, 1e-4)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 256}
    assert not same_in_batches(
        RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), **shape)).eval(), tokenizer, prompts, 0.05
    )


@pytest.mark.parametrize(
    ("alone", "beside", "same"),
    [
        ([(5, 4), (9, 0)], [(5, 4), (0, 9)], False),
        ([(5, 4.99), (9, 0)], [(4.99, 5), (0, 9)], True),  # another token follows, and what comes after is another text
        ([(500, 4), (9, 0)], [(501, 4), (9, 0)], True),
        ([(5, 4), (9, 0)], [(5.1, 4), (9, 0)], False),
    ],
)
def test_scores_are_compared_where_the_texts_are_one(
    alone: list[Any], beside: list[Any], same: bool, demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo_base
    replies = iter(SimpleNamespace(logits=[torch.tensor([step]) for step in steps]) for steps in (alone, beside))
    monkeypatch.setattr(model, "generate", lambda *_, **__: next(replies))
    assert same_in_batches(model, tokenizer, [[5], [6, 7]], 0.01) is same


def test_a_stop_string_is_seen_over_all_its_tokens_and_few_answers_end_a_batch(demo_base: tuple[Any, Any]) -> None:
    tokenizer = demo_base[1]
    long = tokenizer("\u2713\u2713\u2713")["input_ids"]
    assert len(long) == 9
    ends = _Ends(tokenizer, 1, ["\u2713\u2713\u2713"], torch.tensor([1]), 0)
    assert ends(torch.tensor([[5, *long], [5, *long[:6], 5, 5, 5]]), None).tolist() == [True, False]
    ends = _Ends(tokenizer, 1, [], torch.tensor([1]), 1)
    assert ends(torch.tensor([[5, 1], [5, 6], [5, 6]]), None).tolist() == [True, False, False]
    assert ends(torch.tensor([[5, 1, 0], [5, 6, 1], [5, 6, 6]]), None).tolist() == [True, True, True]


def test_an_answer_shows_no_special_token(demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_base
    said, pad, end = tokenizer("12 apples")["input_ids"], tokenizer.pad_token_id, tokenizer.eos_token_id
    assert pad != end
    written = torch.tensor([[*said, pad, *said, end, *said]])
    monkeypatch.setattr(model, "generate", lambda ids, **_: torch.cat([ids, written], 1))
    assert dict(generate(model, tokenizer, [[5]], 1, 99)) == {0: tokenizer.decode(said + said)}


def test_a_context_without_end(demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_base
    assert context_of(model.config) == 256
    wanted = dict(generate(model, tokenizer, [[5] * 9], 1, 4))
    monkeypatch.setattr(model.config, "max_position_embeddings", -1)
    assert context_of(model.config) is None and dict(generate(model, tokenizer, [[5] * 9], 1, 4)) == wanted


def test_as_many_are_asked_together_as_should_fit(demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the longest of those that wait, with room for its answer inside the context."""
    model, tokenizer = demo_base
    lengths: list[int] = []
    rows: list[int] = []
    monkeypatch.setattr("pissa_cli.evals.generate.fitting", lambda _, tokens: lengths.append(tokens) or 2)
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **rest: rows.append(len(ids)) or original(ids, **rest))
    assert len(dict(generate(model, tokenizer, [[5] * length for length in (9, 30, 250)], None, 8))) == 3
    assert lengths == [256, 17] and rows[0] == 2


def test_a_batch_on_a_gpu_goes_by_the_keys_and_values_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5_000_000)
    shape: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}

    def fits(config: PretrainedConfig, tokens: int = 1000) -> int:
        model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
        return fitting(model, tokens)

    config = LlamaConfig(**shape, num_key_value_heads=2)
    assert fits(config) == int(7_200_000 / (3 * 2 * 32 * 2 * 1000))
    assert (fits(config, 10), fits(config, 10**6)) == (MOST, 1)
    assert fits(MambaConfig()) == ON_CPU
    mixed = LlamaConfig(**shape, num_key_value_heads=2, per_layer_config={1: {"head_dim": 32}})
    if not getattr(mixed, "is_heterogeneous", False):
        pytest.skip("transformers has one width for all layers")
    assert fits(mixed) == int(7_200_000 / (2 * (32 + 64 + 32) * 2 * 1000))


def test_a_stop_string_in_the_prompt_stops_nothing(demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_base
    prompt = [tokenizer("Anna has 12 apples. Anna finds 5 apples. Count the apples:")["input_ids"]]
    whole = dict(generate(model, tokenizer, prompt, 1, 20))[0]
    assert whole.startswith(" 12 + 5")
    original, calls = model.generate, list[int]()
    monkeypatch.setattr(model, "generate", lambda *ids, **rest: calls.append(1) or original(*ids, **rest))
    assert dict(generate(model, tokenizer, prompt, 1, 20, stop=["apples: 12", ": "]))[0] == whole.partition(": ")[0]
    assert dict(generate(model, tokenizer, prompt, 1, 20, stop=[" 12 +"])) == {0: ""}
    assert len(calls) == 2


def test_an_answer_ends_where_the_model_itself_says(
    demo_base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat models name the end of a turn in generation_config.json alone."""
    model, tokenizer = demo_base
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    end = max(tokens, key=tokens.index)  # the one that comes up last
    wanted = tokenizer.decode(tokens[: tokens.index(end)])
    original, made = model.generate, list[torch.Tensor]()
    monkeypatch.setattr(model, "generate", lambda *ids, **rest: made.append(original(*ids, **rest)) or made[-1])
    assert wanted and dict(generate(model, tokenizer, [prompt], 1, 20, stop_ids=[end])) == {0: wanted}
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end]))
    assert dict(generate(model, tokenizer, [prompt], 1, 20)) == {0: wanted}
    assert [one[0, len(prompt) :].tolist() for one in made] == [tokens[: tokens.index(end) + 1]] * 2


def test_generation_stays_inside_the_context_and_the_vocabulary(demo_base: tuple[Any, Any]) -> None:
    model, tokenizer = demo_base
    with pytest.raises(UsageError, match="the questions: token 99999 is beyond the model's vocabulary"):
        list(generate(model, tokenizer, [[5, 99999]], 1, 100))
    assert dict(generate(model, tokenizer, [[5] * 250], 1, 100))
    told: list[tuple[int, int]] = []
    prompts = [[5] * 256, [5] * 9, [5] * 300]
    answers = dict(generate(model, tokenizer, prompts, 1, 4, progress=lambda *given: told.append(given)))
    assert told == [(3, 3)]
    assert answers[0] == answers[2] == "" and answers[1] == dict(generate(model, tokenizer, [[5] * 9], 1, 4))[0] != ""


@pytest.mark.parametrize("stop", [(), ("5 12",)])
def test_every_answer_has_the_room_of_its_own_prompt(demo_base: tuple[Any, Any], stop: tuple[str, ...]) -> None:
    tokenizer = demo_base[1]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    prompts = [[5 + place % number for place in range(length)] for number, length in enumerate((44, 9, 30, 29), 1)]
    alone = dict(generate(model, tokenizer, prompts, 1, 64, stop=stop))
    assert dict(generate(model, tokenizer, prompts, 4, 64, stop=stop)) == alone
    ids = model.generate(torch.tensor([prompts[1]]), max_length=48, do_sample=False, pad_token_id=0)
    assert len(ids[0]) == 48 and alone[1] == cut(tokenizer.decode(ids[0, 9:], skip_special_tokens=True), stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short run on the demo's model."""
    out = tmp_path_factory.mktemp("run") / "out"
    sets = [f"output={out}", "train.steps=2", "eval.limit=6", "eval.bench=[gsm8k, loss]", "data.limit=64"]
    recipe = load("demo/pissa", {}, sets).recipe
    train(recipe)
    return recipe


def test_eval_reads_the_files_and_writes_what_it_found(finished: Any) -> None:
    results = evaluate(finished)
    run = Run(Path(finished.output))
    folder = run.folder / "eval" / "gsm8k"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()][:6]
    assert json.loads((folder / "result.json").read_text()) == results["gsm8k"]
    assert (results["gsm8k"]["model"], results["gsm8k"]["precision"]) == ("trained", finished.precision)
    assert results["gsm8k"]["n"] == 6 and [s["id"] for s in samples] == list(range(6))
    for sample, row in zip(samples, questions, strict=True):
        assert sample["prompt"] == f"Question: {row['question']}\nAnswer:"
        assert sample["reference"] == row["answer"].rpartition("#### ")[2]
    assert results["gsm8k"]["score"] == pytest.approx(100 * sum(s["correct"] for s in samples) / 6)
    (run.adapter / "adapter_model.safetensors").rename(run.folder / "away")
    with pytest.raises(UsageError, match="adapter_model"):
        evaluate(finished)
    (run.folder / "away").rename(run.adapter / "adapter_model.safetensors")


def test_what_a_run_has_left_is_read_if_it_is_whole(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Path(finished.output))
    weights = run.adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        trained.read_adapter(finished)
    weights.write_bytes(content)
    assert trained.read_adapter(finished)[1].factors
    whole = trained.checkpoint_tensors(run.checkpoints / "step-2")
    name = next(key for key in whole if key.endswith(".A"))
    spoilt = torch.full_like(whole[name], math.nan)
    for found, said in (
        (None, "missing or of another shape"),
        (whole[name][1:], "another shape"),
        (spoilt, "holds NaN"),
    ):
        changed = {key: found if key == name else tensor for key, tensor in whole.items()}
        monkeypatch.setattr(trained, "checkpoint_tensors", lambda _, changed=changed: changed)
        with pytest.raises(UsageError, match=f"{name} .*{said}"):
            trained.read_checkpoint(finished, 2)
    with pytest.raises(PissaError, match=rf"diverged at its end: {name} holds NaN"):
        write_result(finished, None, {name: spoilt}, 2, {})  # type: ignore[arg-type]
    assert weights.read_bytes() == content


def test_an_interrupted_evaluation_goes_on_where_it_stopped(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(finished)["gsm8k"]
    folder = Path(finished.output) / "eval"
    wanted = (folder / "gsm8k" / "samples.jsonl").read_text()
    asked: list[int] = []

    def broken(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        asked.append(len(prompts))
        for number, answer in enumerate(generate(model, tokenizer, prompts, 2, *rest[1:])):
            if len(asked) == 1 and number == 3:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(module, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(finished)
    assert (folder / ".gsm8k.outputs.jsonl").is_file()
    told: list[tuple[int, int, str]] = []
    again = evaluate(finished, progress=lambda *given: told.append(given))["gsm8k"]
    assert asked == [6, 3] and again["score"] == whole["score"]
    assert min(done for done, _, bench in told if bench == "gsm8k") > 3 and (6, 6, "gsm8k") in told
    assert (folder / "gsm8k" / "samples.jsonl").read_text() == wanted
    assert not (folder / ".gsm8k.outputs.jsonl").exists()


def test_answers_are_kept_for_the_same_settings_alone(
    recipe: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is sampled after an interruption has other random numbers than what was kept."""
    asked: list[tuple[int, int]] = []

    def interrupted(_model: Any, _tokenizer: Any, prompts: list[Any], *settings: Any) -> Any:
        asked.append((len(prompts), settings[3]))
        yield from [(0, "an answer")][: len(prompts)]

    monkeypatch.setattr(module, "generate", interrupted)
    prompts = [(text, [5]) for text in ("one", "two", "two")]

    def ask(*sets: str, step: int = 2) -> tuple[int, int]:
        made = recipe(tmp_path, "model.bits=32", "eval.temperature=0.5", "seed=5", *sets)
        session: Any = SimpleNamespace(recipe=made, tokenizer=tokenizer, folder=tmp_path, facts={"step": step})
        session.writer, session.one_by_one = None, False
        module._answers(session, "outputs", prompts, lambda *_: None)
        return asked[-1]

    assert [ask(), ask(), ask(), ask()] == [(3, 5), (2, 6), (1, 7), (0, 8)]
    for one in ("seed=6", "eval.stop=[x]", "eval.max_new_tokens=9", "eval.temperature=0.7", "eval.engine=vllm"):
        assert ask(one)[0] == 3, one
        assert ask() == (3, 5)
    assert ask(step=3) == (3, 5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_how_a_model_or_a_server_is_asked(
    precision: str, recipe: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast where training was, and up to the template's end of a turn; a server with a seed for each answer,
    whatever is kept."""
    asked: list[Any] = []

    def answers(_model: Any, _tokenizer: Any, prompts: list[Any], *settings: Any) -> Any:
        asked.append((*settings[4:6], torch.is_autocast_enabled(best_device().type)))
        yield from ((number, "an answer") for number in range(len(prompts)))

    def served(_server: Server, prompts: list[Any], _length: int, _warmth: float, seeds: list[int], *rest: Any) -> Any:
        asked.append((seeds, *rest[:2]))
        yield 0, "an answer"

    monkeypatch.setattr(module, "generate", answers)
    monkeypatch.setattr(Server, "generate", served)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    sets = ["model.bits=32", f"train.precision={precision}", "data.format=chat", "eval.stop=[x]", "seed=5"]
    for writer in (None, Server("", "", 99, []), Server("", "", 99, [])):
        session: Any = SimpleNamespace(tokenizer=tokenizer, folder=tmp_path, facts={}, writer=writer, one_by_one=False)
        session.recipe = recipe(tmp_path, *sets, *(["eval.engine=vllm"] if writer else []))
        module._answers(session, "outputs", [(text, [5]) for text in ("one", "two", "two")], lambda *_: None)
    ends = ["x"], [tokenizer.pad_token_id]
    assert asked == [(*ends, precision == "bf16"), ([5, 6, 7], *ends), ([6, 7], *ends)]


def test_published_figures_stand_beside_greedy_answers_of_the_trained_model(recipe: Callable[..., Any]) -> None:
    def beside(model: str, *sets: str) -> dict[str, Any]:
        made = recipe(Path("mistralai/Mistral-7B-v0.1"), "eval.bench=[gsm8k]", *sets)
        session: Any = SimpleNamespace(recipe=made, facts={"model": model})
        return module._published(session, "gsm8k", 1319)

    assert beside("trained")["published"] == 73.31
    assert beside("base") == {} == beside("trained", "eval.temperature=0.5")
    for one_by_one in (True, False):
        made = recipe(Path("x"), "eval.bench=[gsm8k]")
        session: Any = SimpleNamespace(recipe=made, facts={"model": "base"}, one_by_one=one_by_one)
        assert ("batch_size" in module._settings(session, "gsm8k", 1)) is one_by_one


def test_kill_9_loses_no_answer_and_asks_for_none_twice(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finished.model_copy(update={"eval": finished.eval.model_copy(update={"bench": ["gsm8k"], "batch_size": 2})})
    whole = evaluate(made)["gsm8k"]
    folder = Path(made.output) / "eval"
    wanted = (folder / "gsm8k" / "samples.jsonl").read_text()
    asked: list[int] = []

    def counted(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, *rest)

    for died_after in (2, 5):

        def die(died_after: int = died_after) -> None:
            add = Kept.add

            def dying(self: Kept, *given: Any) -> None:
                add(self, *given)
                if len(self.outputs) == died_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            Kept.add = dying  # type: ignore[method-assign]
            evaluate(made)

        assert exit_code(forked(die, tmp_path / "said")) == -signal.SIGKILL
    kept = (folder / ".gsm8k.outputs.jsonl").read_text().splitlines()[1:]
    assert len(kept) == len({json.loads(line)["key"] for line in kept}) == 5
    monkeypatch.setattr(module, "generate", counted)
    again = evaluate(made)["gsm8k"]
    assert asked == [1]
    assert (again["score"], again["n"]) == (whole["score"], whole["n"])
    assert (folder / "gsm8k" / "samples.jsonl").read_text() == wanted


def test_answers_of_another_training_are_not_kept(
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"prompt": "def f():", "test": "def check(f): pass", "entry_point": "f"}\n')
    sets = [f"data.train={rows}", "train.steps=2", "adapter.rank=4", "eval.bench=[humaneval]", "eval.max_new_tokens=4"]
    made = recipe(models("llama"), *sets, f"eval.data={{humaneval: {data}}}")
    asked: list[int] = []
    monkeypatch.setattr(module, "generate", lambda *given: asked.append(len(given[2])) or generate(*given))
    train(made)
    for _ in range(2):
        evaluate(made)  # the answers are kept, as nothing runs
    run = Run(Path(made.output))
    for folder in (run.adapter, run.checkpoints):
        shutil.rmtree(folder)
    train(made.model_copy(update={"train": made.train.model_copy(update={"lr": 0.01})}))
    evaluate(made)
    assert asked == [1, 0, 1]


def test_a_base_is_served_from_its_own_folder(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = finished.model_copy(update={"eval": finished.eval.model_copy(update={"engine": "vllm"})})
    monkeypatch.setattr(module, "serve", lambda *given: nullcontext(given))
    with module._writer(made, True, None, Path("base"), 256) as given:
        assert given == (Path("base"), made.precision, 256, False)
    with pytest.raises(UsageError, match="merged: not there"), module._writer(made, False, None, Path("base"), 256):
        pass


def test_prompts_without_room_are_counted(finished: Any, tmp_path: Path) -> None:
    rows = [{"question": "word " * 300, "answer": "#### 1"}, {"question": "Count.", "answer": "#### 1"}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = finished.eval.model_copy(update={"bench": ["gsm8k"], "data": {"gsm8k": str(path)}, "max_new_tokens": 4})
    result = evaluate(finished.model_copy(update={"eval": section}))["gsm8k"]
    assert (result["n"], result["prompts_without_room"]) == (2, 1)
    assert result["answers_without_end"] == 1
    assert "prompts_without_room" not in evaluate(finished)["gsm8k"]


def test_a_checkpoint_is_scored_as_the_run_that_ended_there(
    models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, pissa: Callable[..., Outcome]
) -> None:
    sets = ("model.bits=32", "adapter.rank=4", "train.schedule=constant", "train.warmup=0", "train.lr=0.01")
    sets += (f"data.train={rows}", f"data.eval={rows}", "train.save_every=1", "train.batch_size=8")
    longer = recipe(models("llama"), *sets, "train.steps=3", "train.keep=3")
    train(longer)
    short = recipe(models("llama"), *sets, "train.steps=2", f"output={longer.output}2")
    train(short)
    words = ("eval", longer.output, "--bench", "loss", "--json")
    found = pissa(*words, "--checkpoint", 2).json["results"]["loss"]
    wanted = evaluate(short.model_copy(update={"eval": short.eval.model_copy(update={"bench": ["loss"]})}))["loss"]
    assert (
        (found["score"], found["step"]) == (wanted["score"], 2) != (pissa(*words).json["results"]["loss"]["score"], 3)
    )
    assert (Path(longer.output) / "eval" / "step-2" / "loss" / "result.json").is_file()
    card = model_card(longer, "merged", step=2)
    assert f"| loss, loss, nats a token, n = 40 | {wanted['score']:.2f} ± {wanted['stderr']:.2f} |" in card
    assert "no such checkpoint" in pissa(*words, "--checkpoint", 9).err
    assert "serves merged/" in pissa(*words[:3], "gsm8k", "--checkpoint", 2, "--set", "eval.engine=vllm").err


def test_one_evaluation_of_a_benchmark_at_a_time(finished: Any) -> None:
    lock = Path(finished.output) / "eval" / "outputs of gsm8k"
    with locked(lock), pytest.raises(UsageError, match="is writing here"):
        evaluate(finished)
    evaluate(finished)


def test_answers_without_end_are_counted(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    section = finished.eval.model_copy(update={"max_new_tokens": 8})
    made = finished.model_copy(update={"eval": section})
    tokenizer = AutoTokenizer.from_pretrained(Run(Path(made.output)).adapter)
    texts = [tokenizer.decode([5] * count) for count in (8, 7, 3, 0, 8, 1)]
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [8, 7, 3, 0, 8, 1]
    monkeypatch.setattr(module, "generate", lambda *_: iter(enumerate(texts)))
    assert evaluate(made)["gsm8k"]["answers_without_end"] == 3


def test_held_out_loss_is_the_plain_average(finished: Any) -> None:
    from pissa_cli.data.tokenize import load_examples
    from pissa_cli.outputs.trained import load_result
    from pissa_cli.training.batches import collate

    result = evaluate(finished)["loss"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    model = load_result(finished, torch.device("cpu"))
    examples = load_examples(finished.data.eval, finished.data.model_copy(update={"limit": 6}), tokenizer, None)
    batch = collate(examples, range(6), 0, False)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert result["score"] == pytest.approx(float(wanted), rel=1e-5) and result["n"] == 6 and result["stderr"] > 0


def test_what_is_scored_is_as_much_as_asked_and_fits(
    recipe: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(bench: str, *sets: str, context: int = 256) -> Any:
        made = recipe(tmp_path, f"eval.bench=[{bench}]", "eval.limit=1", f"data.eval={rows}", *sets)
        return load_bench(bench, made, tokenizer, context)

    assert len(load("loss")) == len(load("loss", f"eval.data={{loss: {rows}}}")) == 1
    monkeypatch.setattr("pissa_cli.evals.mt_bench.load", lambda *given: given)
    assert load("mt_bench", "eval.judge_url=http://x", "eval.judge_model=x") == ("lmsys/mt-bench", 1)
    with pytest.raises(UsageError, match=r"the longest example has .* the model sees 4"):
        load("loss", context=4)
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(UsageError, match="openai/gsm8k: cannot get") as refused:
        load("gsm8k")
    assert refused.value.hint == "check the network, or give a local file: --data gsm8k=FILE"


def test_a_share_is_known_by_what_there_is(
    models: Callable[[str], Path],
    recipe: Callable[..., Any],
    rows: Path,
    pissa: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    """The result or a checkpoint."""
    sets = [f"data.train={rows}", "data.eval=10%", "train.steps=1", "adapter.rank=4"]
    made = recipe(models("llama"), *sets)
    train(made)
    run = Run(Path(made.output))
    run.checkpoints.rename(tmp_path / "checkpoints")
    assert pissa("eval", made.output).code == 0  # of what is held out, as nothing else is asked for
    rows.write_text(rows.read_text() + '{"instruction": "one", "output": "more"}\n')
    outcome = pissa("eval", made.output, "--bench", "loss")
    assert outcome.code == 2 and "is not what this run held out" in outcome.err
    (tmp_path / "checkpoints").rename(run.checkpoints)
    shutil.rmtree(run.adapter)
    outcome = pissa("eval", made.output, "--bench", "loss", "--checkpoint", 1)
    assert outcome.code == 2 and "is not what this run held out" in outcome.err


def test_the_base_scores_apart(finished: Any) -> None:
    base = evaluate(finished, base=True)
    assert base["gsm8k"]["model"] == "base"
    assert (Path(finished.output) / "eval" / "base" / "gsm8k" / "result.json").is_file()
    assert base["loss"]["score"] > evaluate(finished)["loss"]["score"]


def test_the_base_is_scored_where_nothing_is_trained(finished: Any, pissa: Any, tmp_path: Path) -> None:
    start = tmp_path / "start"
    sets = ["--set", "eval.limit=6", "--set", "eval.bench=[loss]"]
    assert pissa("init", "demo/pissa", "--output", start, *sets).code == 0
    for command in ("eval", "merge", "quantize", "export"):
        for flags in ([], ["--dry-run"]):
            outcome = pissa(command, start, *flags)
            assert outcome.code == 2 and "no trained adapter yet" in outcome.err
    assert pissa("eval", start, "--compare-base", "--dry-run").code == 0
    outcome = pissa("eval", start, "--compare-base", "--json")
    assert outcome.json["results"] == {} and "the base alone is scored" in outcome.err
    assert outcome.json["base"]["loss"]["score"] == evaluate(finished, base=True)["loss"]["score"]


def test_rows_that_are_not_scored_are_said(finished: Any, pissa: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    empty = '{"question": "2 + 2?", "answer": ""}\n'
    file.write_text(f'{{"question": "1 + 1?", "answer": "2"}}\n{empty}no row\n{empty}')
    outcome = pissa("eval", finished.output, "--bench", "loss", "--data", f"loss={file}", "--json")
    assert (outcome.json["results"]["loss"]["n"], outcome.json["results"]["loss"]["rows_not_used"]) == (1, 3)
    assert "loss: rows not used: 1, " in outcome.err and "loss: rows not used: 2, " in outcome.err


def test_a_run_that_cannot_be_written_is_said_before_the_work(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(finished.output) / "eval").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: "eval" not in str(path))
    monkeypatch.setattr(module, "load_result", None)
    with pytest.raises(PissaError, match="eval: cannot write: Permission denied"):
        evaluate(finished)


def test_chat_without_a_template_is_refused(demo_base: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        question_prompt("How many?", DataSection(format="chat"), demo_base[1])


def test_bad_input_is_named_before_anything_is_loaded(finished: Any, pissa: Any, tmp_path: Path) -> None:
    fields = tmp_path / "fields.jsonl"
    fields.write_text('{"question": "q"}\n')
    away = "eval.bench=[mt_bench]", "eval.judge_url=http://127.0.0.1:9/v1", "eval.judge_model=m"
    for words, said in (
        (["--bench", "gsm9k"], "known: gsm8k, math"),
        (["--bench", "gsm8k", "--data", f"gsm8k={fields}"], "it has no answer"),
        ([word for one in away for word in ("--set", one)], "the judge cannot be reached"),
        (["--bench", "gsm9k", "--bench", "gsm8k"], "known: gsm8k, math"),
        (["--bench", "gsm8k", "--set", "eval.stop=['']"], "eval.stop"),
    ):
        outcome = pissa("eval", finished.output, *words)
        assert outcome.code == 2 and said in outcome.err, (words, outcome.err)
