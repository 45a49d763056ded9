"""The engine `vllm`: a stand-in for its command answers over real HTTP with what transformers generates."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pissa_cli.errors import PissaError
from pissa_cli.evals import served
from pissa_cli.evals.served import Server, serve
from pissa_cli.train import train

SCRIPT = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
given = sys.argv[1:]
if os.environ.get("STAND_IN_FAILS"):
    print("first line", flush=True)
    sys.exit("CUDA is not here")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = given[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, status, content):
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def do_GET(self): self.answer(200 if self.path == "/health" else 404, {{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({log!r}, "a") as log: log.write(json.dumps([given, body]) + "\\n")
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]: return self.answer(401, {{}})
        if self.headers["Content-Type"] != "application/json": return self.answer(415, {{}})  # as vllm does
        if os.environ.get("STAND_IN_BREAKS"): return self.answer(500, {{"error": "out of blocks"}})
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            mask, room = torch.ones_like(ids), body["max_tokens"]
            out = model.generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
        self.answer(200, {{"choices": [{{"text": text}}]}})
port = int(given[given.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in writes what it was asked; it is first on the path."""
    path, folder = tmp_path / "asked.jsonl", tmp_path / "bin"
    folder.mkdir()
    (folder / "vllm").write_text(SCRIPT.format(python=sys.executable, log=str(path)))
    (folder / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return path


@pytest.fixture
def run(recipe: Callable[..., Any], models: Callable[[str], Path], rows: Path, tmp_path: Path) -> str:
    data = tmp_path / "questions.jsonl"
    questions = [{"question": f"What is {n} + {n}?" + " and" * n, "answer": f"#### {2 * n}"} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    sets = ["eval.bench=[gsm8k]", f"eval.data={{gsm8k: {data}}}", "eval.max_new_tokens=6"]
    made = recipe(
        models("llama"),
        "model.bits=32",
        "adapter.rank=4",
        f"data.train={rows}",
        "train.steps=2",
        "train.lr=0.01",
        *sets,
    )
    train(made)
    return str(made.output)


def test_answers_are_those_of_transformers(run: str, log: Path, pissa: Callable[..., Any]) -> None:
    samples = Path(run) / "eval" / "gsm8k" / "samples.jsonl"
    assert pissa("eval", run).code == 0
    wanted = [json.loads(line)["output"] for line in samples.read_text().splitlines()]
    samples.unlink()
    refused = pissa("eval", run, "--set", "eval.engine=vllm")
    assert refused.code == 2 and "run `pissa merge` first" in refused.err
    assert pissa("merge", run).code == 0
    outcome = pissa("eval", run, "--set", "eval.engine=vllm", "--json")
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["output"] for line in samples.read_text().splitlines()] == wanted
    assert outcome.json["results"]["gsm8k"]["engine"] == "vllm"
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    given, body = asked[0]
    assert given[:2] == ["serve", str(Path(run) / "merged")] and given[given.index("--host") + 1] == "127.0.0.1"
    wanted = {"--dtype": "float32", "--generation-config": "vllm", "--max-model-len": "256"}
    assert {option: given[given.index(option) + 1] for option in wanted} == wanted
    assert len(asked) == 5 and (body["model"], body["temperature"], body["max_tokens"]) == ("tuned", 0.0, 6)
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(str(log.parent).encode() in line for line in processes)
    weights = Path(run) / "merged" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = pissa("eval", run, "--set", "eval.engine=vllm")
    assert changed.code == 2 and "are not what was written" in changed.err
    weights.write_bytes(content)
    manifest = Path(run) / "merged" / "pissa.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 1'))
    stale = pissa("eval", run, "--set", "eval.engine=vllm")
    assert stale.code == 2 and "merge` again" in stale.err


def test_what_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers is: a seed each, the room that the context leaves, and where the model itself ends."""
    bodies: dict[int, dict[str, Any]] = {}

    def post(_: Server, body: dict[str, Any]) -> dict[str, Any]:
        bodies[len(body["prompt"])] = body
        return {"choices": [{"text": f"of {len(body['prompt'])}"}]}

    monkeypatch.setattr(Server, "_post", post)
    server, prompts = Server("", "", 10, [7]), [[5] * length for length in (4, 9, 10, 12)]
    told: list[tuple[int, int]] = []
    found = dict(server.generate(prompts, 5, 0.8, [20, 21, 22, 23], ["end"], [3], lambda *done: told.append(done)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found == {0: "of 4", 1: "of 9", 2: "", 3: ""} and sorted(bodies) == [4, 9]
    assert [(body["max_tokens"], body["seed"]) for body in (bodies[4], bodies[9])] == [(5, 20), (1, 21)]
    assert set(bodies[4]["stop_token_ids"]) == {3, 7} and bodies[4]["stop"] == ["end"]
    assert (bodies[4]["temperature"], bodies[4]["top_p"]) == (0.8, 0.95)
    list(server.generate(prompts[:1], 5, 0.0, [0], [], [], lambda *_: None))
    assert (bodies[4]["temperature"], bodies[4]["top_p"]) == (0.0, 1.0)


def test_how_a_server_is_started_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a process of its own that does not end when asked to."""
    started: list[tuple[list[str], dict[str, Any], Any]] = []
    start, (reads, held) = served.subprocess.Popen, os.pipe()
    stubborn = "exec 3>&0; (trap '' TERM; echo >&3; exec sleep 60) & exec sleep 60"

    def popen(command: list[str], **rest: Any) -> Any:
        started.append((command, rest, start(["sh", "-c", stubborn], stdin=held, **rest)))
        os.read(reads, 1)
        return started[-1][2]

    monkeypatch.setattr(served.subprocess, "Popen", popen)
    monkeypatch.setattr(served.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(served, "_wait", lambda *_: None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    with serve(tmp_path, "bf16", 2**20, trust_remote_code=True) as server:
        command, rest, process = started[0]
        assert command[:3] == ["/opt/vllm", "serve", str(tmp_path)] and command[-1] == "--trust-remote-code"
        options = dict(zip(command[3:-1:2], command[4:-1:2], strict=True))
        wanted = {"--host": "127.0.0.1", "--served-model-name": "tuned", "--generation-config": "vllm"}
        wanted |= {"--port": options["--port"], "--dtype": "bfloat16", "--max-model-len": "16384"}
        assert options == wanted
        assert (server.context, server.stop_ids, server.key) == (2**14, [7, 9], rest["env"]["VLLM_API_KEY"])
        assert server.url == f"http://127.0.0.1:{options['--port']}" and process.poll() is None
    assert process.poll() is not None
    (tmp_path / "generation_config.json").write_text("no JSON")
    with serve(tmp_path, "fp32", 256) as server:
        assert (server.context, server.stop_ids) == (256, []) and "--trust-remote-code" not in started[1][0]
    os.close(held)
    with os.fdopen(reads) as pipe:
        assert select.select([pipe], [], [], 20)[0] and pipe.read() == "", "both are gone"


def test_a_server_that_does_not_come_up_or_breaks(
    run: str, log: Path, pissa: Callable[..., Any], models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    with pytest.raises(PissaError, match="first line\nCUDA is not here"), serve(models("llama"), "bf16", 256):
        pass
    monkeypatch.delenv("STAND_IN_FAILS")
    assert pissa("merge", run).code == 0
    monkeypatch.setenv("STAND_IN_BREAKS", "1")
    outcome = pissa("eval", run, "--set", "eval.engine=vllm")
    assert outcome.code == 1 and "out of blocks" in outcome.err


def test_prompts_that_wait_when_the_server_breaks_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"out of blocks")

    monkeypatch.setattr(served, "TOGETHER", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaks) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = served.Server(f"http://127.0.0.1:{http.server_port}", "key", 256, [])
        with pytest.raises(PissaError, match="out of blocks"):
            list(server.generate([[1]] * 50, 4, 0.0, [0] * 50, [], [], lambda *_: None))
        http.shutdown()


def test_what_the_engine_cannot_score(run: str, pissa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = pissa("eval", run, "--bench", "loss", "--set", "eval.engine=vllm")
    assert outcome.code == 2 and "which loss does not score" in outcome.err
    assert pissa("merge", run).code == 0
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = pissa("eval", run, "--set", "eval.engine=vllm")
    assert outcome.code == 2 and "pissa[vllm]" in outcome.err
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(Path(run) / folder)
    assert pissa("train", run, "--set", "train.lr=0.02").code == 0
    outcome = pissa("eval", run, "--set", "eval.engine=vllm")
    assert outcome.code == 2 and "is of another training than the result" in outcome.err
