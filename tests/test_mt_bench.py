"""MT-Bench against a stand-in judge over HTTP: both turns, every way to write a rating, and a judge that fails."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pissa_cli.errors import UsageError
from pissa_cli.evals import judge, mt_bench
from pissa_cli.evals.judge import Judge
from pissa_cli.evals.run import evaluate
from pissa_cli.train import train

Reply = tuple[int, str]


class StandIn:
    """Answers with what `script` says, one entry a request, then with `otherwise`; keeps what it was asked. 0: the
    connection ends in the middle of the answer. What follows "raw:" is the whole answer."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.wait = "0"
        self.otherwise: Reply = (200, "Fine. Rating: [[7]]")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append(body | {"path": self.path})
                stand_in.headers.append(dict(self.headers))
                code, text = stand_in.script.pop(0) if stand_in.script else stand_in.otherwise
                answer: Any = {"choices": [{"message": {"role": "assistant", "content": text or None}}]}
                reply = json.dumps(answer if code < 300 else {"error": {"message": text}}).encode()
                reply = text.removeprefix("raw:").encode() if text.startswith("raw:") else reply
                self.send_response(code or 200)
                self.send_header("Retry-After", stand_in.wait)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(reply) + (code == 0)))
                self.end_headers()
                self.wfile.write(reply)

            def do_GET(self) -> None:
                stand_in.headers.append(dict(self.headers))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)
    made = StandIn()
    yield made
    made.server.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions, one of which has a reference answer."""
    folder = tmp_path / "mt_bench"
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Shorten {question} it."]},
        {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
    ]
    single, multi = "Q {question} A {answer}", "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
    prompts = [
        {"name": "single-v1", "system_prompt": "S", "prompt_template": single},
        {"name": "single-v1-multi-turn", "system_prompt": "SM", "prompt_template": multi},
        {"name": "single-math-v1", "system_prompt": "M", "prompt_template": f"R {{ref_answer_1}} {single}"},
        {"name": "single-math-v1-multi-turn", "system_prompt": "MM", "prompt_template": f"R2 {{ref_answer_2}} {multi}"},
    ]
    references = [{"question_id": 111, "choices": [{"turns": ["two", "four"]}]}]
    for name, rows in zip(mt_bench.FILES, (questions, prompts, references), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Rating: [[5]]", 5),
        ("[[10]]", 10),
        ("[[1]]", 1),
        ("[[11]], or [5]", None),
        ("[[7.5]] because", 7.5),
        ("Rating: [6]", 6),
        ("[3] first, then [[8]]", 8),
        ("[3] first, then [[8.5]]", 8.5),
        ("[[8]] then [[2]]", 8),
        ("Rating: 5", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[5] first, then [[11]]", None),
        ("[[A]]", None),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_ratings_in_all_their_forms(text: str, wanted: float | None) -> None:
    assert mt_bench.rating(text) == wanted


def test_prompts_are_those_of_the_data(data: Path) -> None:
    loaded = mt_bench.load(str(data), None)
    writing, math = loaded.questions
    assert mt_bench.judge_prompt(loaded, writing, ["{answer_2}", "b"], 0) == ("S", "Q Write a line. A {answer_2}")
    system, prompt = mt_bench.judge_prompt(loaded, writing, ["a", "b"], 1)
    assert (system, prompt) == ("SM", "Q1 Write a line. A1 a Q2 Shorten {question} it. A2 b")
    assert mt_bench.judge_prompt(loaded, math, ["a", "b"], 0) == ("M", "R two Q 1 + 1? A a")
    assert mt_bench.judge_prompt(loaded, math, ["a", "b"], 1)[1].startswith("R2 four Q1 1 + 1?")
    for category in ("reasoning", "coding"):
        assert mt_bench.judge_prompt(loaded, math | {"category": category}, ["a", "b"], 0)[0] == "M"
    loaded.prompts["single-v1"]["prompt_template"] = 'Rate {answer} as {"rating": {}}'
    assert mt_bench.judge_prompt(loaded, writing, ["a", "b"], 0)[1] == 'Rate a as {"rating": {}}'
    assert [row["question_id"] for row in mt_bench.load(str(data), 1).questions] == [81]


def test_a_judge_that_is_busy_is_asked_again(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("PISSA_JUDGE_KEY", "secret")
    stand_in.script = [
        *((code, "x") for code in (429, 500, 503, 408, 409, 0)),
        (200, "raw:<html>"),
        (200, "Rating: [[9]]"),
    ]
    assert Judge(f"{stand_in.url}/", "gpt-4").ask("system", "prompt") == "Rating: [[9]]"
    assert len(stand_in.asked) == 8
    last = stand_in.asked[-1]
    assert (last["path"], last["model"]) == ("/v1/chat/completions", "gpt-4")
    assert (last["temperature"], last["max_tokens"]) == (0, 2048), "FastChat's"
    assert [(m["role"], m["content"]) for m in last["messages"]] == [("system", "system"), ("user", "prompt")]
    assert stand_in.headers[-1]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("PISSA_JUDGE_KEY", " ")
    stand_in.script = [(200, "")]
    assert Judge(stand_in.url, "gpt-4").ask("system", "prompt") == ""
    assert stand_in.headers[-1]["Authorization"] == "Bearer other"
    for answer in ([], {"choices": []}, {"choices": [None]}, {"choices": ["no"]}, {"choices": [{"message": "no"}]}):
        with pytest.raises(UsageError, match="not that of a chat completion"):
            judge._text(answer, "url")


def test_a_key_is_never_shown(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_JUDGE_KEY", "secret\r\n")
    asked = Judge(stand_in.url, "m")
    asked.require()
    assert asked.ask("s", "p") and stand_in.headers[-1]["Authorization"] == "Bearer secret"
    for key in ("sec\nret", "s\u00e9cret"):
        monkeypatch.setenv("PISSA_JUDGE_KEY", key)
        with pytest.raises(UsageError, match="PISSA_JUDGE_KEY: the key has a character") as refused:
            asked.require()
        assert key not in str(refused.value)


def test_the_key_stays_with_the_judge(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_JUDGE_KEY", "secret")
    stand_in.otherwise = (302, "x")
    with pytest.raises(UsageError, match="302"):
        Judge(stand_in.url, "m").ask("s", "p")
    assert len(stand_in.headers) == 1


def test_the_wait_is_the_one_the_judge_asks_for_or_ours(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(judge.time, "sleep", waits.append)
    for stand_in.wait in ("nan", "Wed, 21 Oct 2015 07:28:00 GMT", "7", "-1", "86400"):
        stand_in.script = [(429, "x")]
        assert Judge(stand_in.url, "m").ask("s", "p")
    assert waits == [0.01, 0.01, 7, 0, judge.LONGEST_WAIT]
    waits.clear()
    monkeypatch.setattr(judge, "LONGEST_WAIT", 0.2)
    with pytest.raises(UsageError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", "m").ask("s", "p")
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.2, 0.2])


def test_a_judge_that_refuses_or_is_away(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.otherwise = (401, "no such key")
    with pytest.raises(UsageError, match="401 Unauthorized: 'no such key'"):
        Judge(stand_in.url, "m").ask("s", "p")
    assert len(stand_in.asked) == 1
    for body in ("<html>", '{"error": "no"}', '{"detail": "no"}', "[]"):
        stand_in.script = [(404, f"raw:{body}")]
        with pytest.raises(UsageError, match=r"404 Not Found$"):
            Judge(stand_in.url, "m").ask("s", "p")
    stand_in.asked.clear()
    stand_in.otherwise = (500, "x")
    with pytest.raises(UsageError, match="cannot be reached"):
        Judge(stand_in.url, "m").ask("s", "p")
    assert len(stand_in.asked) == judge.TRIES
    for url in ("file:///etc/passwd", "ftp://judge.test/v1", "http:///v1", "http://judge.test:0/v1", "http://x:99999"):
        with pytest.raises(UsageError, match="no http address"):
            Judge(url, "m").require()
    with pytest.raises(UsageError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", "m").require()
    Judge(stand_in.url, "m").require()
    asked: list[Any] = []
    monkeypatch.setattr(judge.urllib.request, "getproxies", dict)
    monkeypatch.setattr(judge.socket, "create_connection", lambda to, timeout: asked.append(to) or nullcontext())
    for scheme in ("http", "https"):
        Judge(f"{scheme}://judge.test/v1", "m").require()
    assert asked == [("judge.test", 80), ("judge.test", 443)]


def test_a_judge_behind_a_proxy(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", stand_in.url.removesuffix("/v1"))
    far = Judge("http://judge.invalid/v1", "m")
    far.require()
    assert far.ask("s", "p") == "Fine. Rating: [[7]]"
    assert stand_in.asked[-1]["path"] == "http://judge.invalid/v1/chat/completions"


def test_both_turns_are_judged_and_an_interruption_costs_nothing(
    stand_in: StandIn,
    data: Path,
    recipe: Callable[..., Any],
    models: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
) -> None:
    sets = ["model.bits=32", "adapter.rank=4", f"data.train={rows}", "train.steps=1", "eval.max_new_tokens=4"]
    sets += ["eval.bench=[mt_bench]", f"eval.data={{mt_bench: {data}}}"]
    sets += [f"eval.judge_url={stand_in.url}", "eval.judge_model=stand-in"]
    made = recipe(models("llama"), *sets)
    train(made)
    stand_in.script = [(200, "[[4]]"), (200, "I cannot judge this."), (401, "x")]
    with pytest.raises(UsageError, match="401"):
        evaluate(made)
    stand_in.script = [(200, "I cannot judge this."), (200, "[[9]]"), (200, "Rating: [5]")]
    result = evaluate(made)["mt_bench"]
    assert len(stand_in.asked) == 6
    assert result["score"] == 6 and (result["n"], result["unrated"]) == (3, 1)
    assert result["turns"] == [6.5, 5] and result["categories"] == {"writing": 4, "math": 7}
    assert evaluate(made)["mt_bench"]["score"] == (4 + 7 + 9 + 5) / 4 and len(stand_in.asked) == 7, "what has no rating"
    assert evaluate(made)["mt_bench"]["unrated"] == 0 and len(stand_in.asked) == 7
    another = evaluate(recipe(models("llama"), *sets, "eval.judge_model=another"))["mt_bench"]
    assert (another["score"], another["judge"], len(stand_in.asked)) == (7, "another", 11), "the same answers"
    again = evaluate(recipe(models("llama"), *sets, "eval.samples=2", "eval.temperature=1"))["mt_bench"]
    assert again["score"] == 7 and len(stand_in.asked) == 15
    assert (again["samples"], again["temperature"]) == (1, 1), "one answer to each question, whatever eval.samples"
    folder = tmp_path / "out" / "eval" / "mt_bench"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["id"], s["turn"]) for s in samples] == [(81, 1), (81, 2), (111, 1), (111, 2)]
    asked = stand_in.asked[-3]["messages"][1]["content"]
    assert f"A1 {samples[0]['output']} Q2" in asked and asked.endswith(f"A2 {samples[1]['output']}")
    assert samples[0]["output"] != samples[1]["output"]
    assert 2 < again["answers_without_end"] <= 4, "of both turns"


def test_ratings_are_added_up(data: Path) -> None:
    """Of judgments that are all kept, for which no judge is asked."""
    told: list[Any] = []

    def grade(limit: int | None, *judgments: str) -> dict[str, Any]:
        loaded, answers = mt_bench.load(str(data), limit), [("a", "b"), ("c", "d")][:limit]
        kept, judge = dict(enumerate(judgments)), Judge("nowhere", "m")
        result, samples = mt_bench.grade(loaded, answers, judge, kept, pytest.fail, lambda *given: told.append(given))
        assert [s["output"] for s in samples] == [answer for pair in answers for answer in pair]
        return result

    found = grade(None, "[[4]]", "no", "[[9]]", "[5]")
    assert (found["score"], found["n"], found["unrated"]) == (6, 3, 1) and found["turns"] == [6.5, 5]
    assert found["stderr"] == pytest.approx(statistics.stdev([4, 9, 5]) / 3**0.5)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found = grade(1, "[[7]]", "no")
    assert (found["score"], found["stderr"], found["turns"]) == (7, 0, [7, None])
    assert found["categories"] == {"writing": 7}
    with pytest.raises(UsageError, match="not one of 2 judgments has a rating"):
        grade(1, "no", "no")


def test_what_is_missing_is_named(data: Path, recipe: Callable[..., Any], models: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="a judge has to grade"):
        evaluate(recipe(models("llama"), "eval.bench=[mt_bench]"))
    (data / "judge_prompts.jsonl").write_text('{"name": "single-v1", "system_prompt": "", "prompt_template": ""}\n')
    with pytest.raises(UsageError, match="no prompt single-math-v1"):
        mt_bench.load(str(data), None)
    (data / "question.jsonl").write_text('{"question_id": 1, "category": "x"}\n')
    with pytest.raises(UsageError, match="line 1 has not question_id"):
        mt_bench.load(str(data), None)


QUESTION = {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]}
PROMPT = {"system_prompt": "", "prompt_template": ""}


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        (0, QUESTION | {"turns": ["1 + 1?"]}, "question 111 has not two turns"),
        (0, QUESTION | {"turns": ["1 + 1?", "2 + 2?", "3 + 3?"]}, "question 111 has not two turns"),
        (0, QUESTION | {"turns": ["1 + 1?", 2]}, "question 111 has not two turns"),
        (0, QUESTION | {"turns": "12"}, "question 111 has not two turns"),
        (0, QUESTION | {"category": None}, "line 3: 'category' is missing"),
        (0, QUESTION | {"question_id": 112}, "no reference answer for question 112"),
        (0, QUESTION | {"question_id": 112, "category": "coding"}, "no reference answer for question 112"),
        (1, PROMPT | {"name": "single-v1-multi-turn", "prompt_template": None}, "'prompt_template' is missing"),
        (1, PROMPT | {"name": "single-v1", "system_prompt": None}, "'system_prompt' is missing"),
        (2, {"question_id": 112, "choices": [{"turns": ["two"]}]}, "question 112 has not two answers"),
    ],
)
def test_a_file_with_a_bad_line_is_refused(file: int, row: dict[str, Any], message: str, data: Path) -> None:
    with (data / mt_bench.FILES[file]).open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message):
        mt_bench.load(str(data), None)


@pytest.mark.parametrize(
    "lacking", ["single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn"]
)
def test_each_of_the_four_prompts_is_needed(lacking: str, data: Path) -> None:
    prompts = data / mt_bench.FILES[1]
    prompts.write_text(
        "".join(f"{line}\n" for line in prompts.read_text().splitlines() if json.loads(line)["name"] != lacking)
    )
    with pytest.raises(UsageError, match=f"no prompt {lacking}$"):
        mt_bench.load(str(data), None)


def test_the_files_come_from_fastchats_space(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has them in data/mt_bench/."""

    def download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("lmsys/mt-bench", "space")
        space = data.parent / "space"
        for pattern in allow_patterns:
            (space / pattern).parent.mkdir(parents=True, exist_ok=True)
            (space / pattern).write_text((data / Path(pattern).relative_to("data/mt_bench")).read_text())
        return str(space)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert mt_bench.load("lmsys/mt-bench", None) == mt_bench.load(str(data), None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UsageError, match=r"lmsys/mt-bench: cannot get MT-Bench from the Hub \(TypeError\)"):
        mt_bench.load("lmsys/mt-bench", None)


def test_the_first_reference_answer_counts(data: Path) -> None:
    two = {"question_id": 111, "choices": [{"turns": ["two", "four"]}, {"turns": ["2", "4"]}]}
    (data / mt_bench.FILES[2]).write_text(json.dumps(two) + "\n")
    assert mt_bench.load(str(data), None).references == {111: ["two", "four"]}
