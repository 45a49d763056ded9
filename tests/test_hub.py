"""`--push`: what arrives, through every fault of the Hub's that passes, and what is never written over."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hub import TOKEN, Fault, Hub, Repo, serve
from huggingface_hub import constants

from pissa_cli.errors import PissaError, UsageError
from pissa_cli.initialize import initialize
from pissa_cli.outputs import hub as module
from pissa_cli.run.rundir import Run
from pissa_cli.train import train

NAME = "tester/llama-pissa-r4"
ONCE = ("whoami", "create", "info", "validate-yaml", "preupload", "batch", "blob", "verify", "commit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which huggingface_hub in this process takes for the Hub."""
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is taken."""
    asked: list[float] = []
    monkeypatch.setattr(module, "sleep", asked.append)
    return asked


@pytest.fixture
def made(models: Callable[[str], Path], recipe: Callable[..., Any]) -> Any:
    ready = recipe(models("llama"), "adapter.rank=4")
    initialize(ready)
    return ready


@pytest.fixture
def folder(made: Any, tmp_path: Path) -> Path:
    """What a merged model looks like: three shards of different size, and small files."""
    path = tmp_path / "merged"
    path.mkdir()
    for number in range(3):
        (path / f"model-0000{number + 1}-of-00003.safetensors").write_bytes(os.urandom(1500 + 1000 * number))
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "README.md").write_text("# a model\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write_provenance(path, made)
    return path


def write_provenance(path: Path, made: Any) -> None:
    base = json.loads((Path(made.output) / "manifest.json").read_text())["base"]["fingerprint"]
    (path / "pissa.json").write_text(json.dumps({"method": "pissa", "base_fingerprint": base}))


def into(recipe: Any, repo: str) -> Any:
    return recipe.model_copy(update={"hub": recipe.hub.model_copy(update={"repo": repo})})


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrived(hub: Hub, name: str = NAME) -> dict[str, bytes]:
    return {path: raw for path, raw in hub.repos[name].files.items() if path != ".gitattributes"}


def faults() -> list[tuple[str, list[Fault]]]:
    cases: list[tuple[str, list[Fault]]] = [(endpoint, [kind]) for endpoint in ONCE for kind in (500, "cut")]
    cases += [(endpoint, ["lost"]) for endpoint in ("create", "blob", "verify", "commit")]
    cases += [("commit", [502, 503, 504, 500]), ("blob", ["cut", 503, "lost", 408]), ("commit", ["cut", "lost"])]
    cases += [("blob", [403]), ("part", [500, "cut"]), ("complete", [503, "lost"])]
    return cases


@pytest.mark.parametrize(("endpoint", "kinds"), faults(), ids=str)
def test_a_fault_that_passes_costs_a_wait(
    endpoint: str, kinds: list[Fault], hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    hub.in_parts = endpoint in ("part", "complete")
    hub.fail(endpoint, kinds)
    said: list[str] = []
    url = module.push(made, folder, say=said.append)
    assert url == f"{hub.url}/{NAME}" and next(hub.faults[endpoint], None) is None
    assert arrived(hub) == content(folder)
    assert hub.commits == 1 and len(hub.arrived) == len(set(hub.arrived)) == 3
    assert 0 < len(waits) == len(said) <= len(kinds) and sum(waits) <= 15  # faults of several blobs cost one wait
    for line, wait in zip(said, waits, strict=True):
        assert line.endswith(f"; next try in {wait:.0f} s, for 15 min at most")
    reasons = {
        f"the Hub answers {kind};" if isinstance(kind, int) else f"the connection to {hub.url} failed ("
        for kind in kinds
    }
    assert all(line.startswith(tuple(reasons)) for line in said)
    assert TOKEN not in "".join(said)


def test_an_answer_that_never_comes_is_not_waited_for(
    hub: Hub, made: Any, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    hub.fail("commit", ["hang"])
    hub.fail("info", ["hang"])
    module.push(made, folder)
    assert arrived(hub) == content(folder) and hub.commits == 1 and waits == [1, 2] and not hub.outwaited


def test_a_commit_whose_answer_was_lost_is_not_made_again(
    hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    hub.fail("commit", ["lost"])
    module.push(made, folder)
    assert hub.commits == 1 and hub.asked.count("commit") == 1 and waits == [1]
    module.push(made, folder)  # nor when there is nothing new
    assert hub.commits == 1 and hub.asked.count("commit") == 1
    (folder / "README.md").write_text("# another\n")
    module.push(into(made, NAME.partition("/")[2]), folder)
    assert hub.commits == 2 and arrived(hub) == content(folder) and len(hub.arrived) == 3
    (folder / "model-00001-of-00003.safetensors").write_bytes(os.urandom(1500))  # as many bytes as before
    module.push(made, folder)
    assert hub.commits == 3 and arrived(hub) == content(folder)


def test_a_commit_of_someone_else_in_between_is_looked_at(
    hub: Hub, made: Any, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    module.push(made, folder)
    (folder / "README.md").write_text("# another\n")
    repo, ours = hub.repos[NAME], module._require_ours

    def meanwhile(*arguments: Any) -> None:
        ours(*arguments)
        if repo.commits == 1:
            repo.files, repo.commits = {**repo.files, "pissa.json": b'{"base_fingerprint": "x"}'}, 2

    monkeypatch.setattr(module, "_require_ours", meanwhile)
    with pytest.raises(UsageError, match="another base"):
        module.push(made, folder)
    assert repo.files["README.md"] == b"# a model\n" and waits == [1]


@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7'}, {"Retry-After": "1"}])
def test_the_wait_is_the_one_the_hub_asks_for(
    headers: dict[str, str], hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    hub.fail("preupload", [(429, headers)] * 2)
    module.push(made, folder)
    assert waits == ([1, 2] if "1" in headers.values() else [7, 7]) and arrived(hub) == content(folder)


def test_an_operation_beside_ours_is_waited_for_until_the_date_that_is_named() -> None:
    for seconds, wait in ((30, 30), (-30, 0)):
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
        said = {"headers": {"retry-after": date}, "text": "a conflicting operation is in progress"}
        answer = SimpleNamespace(status_code=409, **said)
        with pytest.raises(module._Passing, match="the Hub answers 409") as raised:
            module._send(lambda _, answer=answer: answer, SimpleNamespace(method="POST"))
        assert raised.value.wait == pytest.approx(wait, abs=5)


def test_a_signed_address_is_not_shown() -> None:
    error = RuntimeError("403 Forbidden for url: https://storage.test/x?X-Signature=secret&Expires=1, no")
    assert module._failure(error, "").message.endswith("https://storage.test/x no")


@pytest.mark.parametrize("endpoint", ["whoami", "create", "preupload", "blob", "commit"])
@pytest.mark.parametrize("kind", [503, "cut", (429, {"Retry-After": "0"}), (429, {"Retry-After": "86400"})])
def test_a_fault_that_never_ends_leaves_all_as_it_was(
    endpoint: str, kind: Fault, hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    before = content(folder)
    hub.fail(endpoint, itertools.repeat(kind))
    with pytest.raises(PissaError, match="upload to the Hub failed: the") as raised:
        module.push(made, folder)
    assert raised.value.exit_code == 1 and "is complete; try again with --push" in str(raised.value.hint)
    assert sum(waits) <= module.PATIENCE and (len(waits) > 10 or kind == (429, {"Retry-After": "86400"}))
    assert content(folder) == before and hub.commits == 0 and not any(map(len, map(arrived, [hub] * len(hub.repos))))
    del hub.faults[endpoint]
    module.push(made, folder)
    assert arrived(hub) == before and len(hub.arrived) == len(set(hub.arrived)) == 3


@pytest.mark.parametrize(
    ("endpoint", "status", "hint"),
    [
        *((endpoint, 401, "hf auth login") for endpoint in ("whoami", "create", "commit")),
        *((endpoint, 403, "right to write") for endpoint in ("create", "verify", "commit")),
        *((endpoint, 404, "check the name") for endpoint in ("create", "preupload")),
        ("commit", 409, "another"),
    ],
)
def test_a_refusal_is_no_fault(
    endpoint: str, status: int, hint: str, hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    hub.fail(endpoint, itertools.repeat(status))
    with pytest.raises(UsageError, match=rf"upload to the Hub failed \({status}\)") as raised:
        module.push(made, folder)
    assert hint in str(raised.value.hint) and "is complete" in str(raised.value.hint)
    assert not waits and hub.commits == 0 and TOKEN not in str(raised.value)


FOREIGN = {
    "of another base": ({"pissa.json": b'{"base_fingerprint": "xxh3:0"}', "x.gguf": b"1"}, "another base"),
    "of no base": ({"pissa.json": b"[]"}, "another base"),
    "an adapter": (
        {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": b"1"},
        "an adapter for org/base",
    ),
    "an adapter of this base": (
        {"pissa.json": b"OURS", "adapter_config.json": b'{"base_model_name_or_path": "llama"}'},
        "an adapter for llama",
    ),
    "a model": ({"config.json": b'{"architectures": ["GPT2LMHeadModel"]}'}, r"a model \(GPT2LMHeadModel\)"),
    "other files": ({"README.md": b"mine"}, "files, but nothing made by pissa"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_anothers_is_replaced_by_force_only(
    kind: str, hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    files, held = FOREIGN[kind]
    files = {path: raw.replace(b"OURS", (folder / "pissa.json").read_bytes()) for path, raw in files.items()}
    hub.repos["team/theirs"] = Repo(files=dict(files))
    for refused in (
        lambda: module.push(into(made, "team/theirs"), folder),
        lambda: module.require_pushable(into(made, "team/theirs")),
    ):
        with pytest.raises(UsageError, match=f"team/theirs: this repository holds .*{held}") as raised:
            refused()
        assert "--force" in str(raised.value.hint)
    assert hub.repos["team/theirs"].files == files and hub.commits == 0 and not hub.arrived
    module.require_pushable(into(made, "team/theirs"), force=True)
    module.push(into(made, "team/theirs"), folder, force=True)
    kept = {"x.gguf"} if "x.gguf" in files else set()
    assert set(arrived(hub, "team/theirs")) == set(content(folder)) | kept and hub.commits == 1


def test_what_is_to_be_private_does_not_go_where_all_can_read(
    hub: Hub, made: Any, folder: Path, waits: list[float]
) -> None:
    hidden = made.model_copy(update={"hub": made.hub.model_copy(update={"private": True})})
    hub.repos[NAME] = Repo()
    for refused in (lambda: module.push(hidden, folder, force=True), lambda: module.require_pushable(hidden)):
        with pytest.raises(UsageError, match="this repository is public"):
            refused()
    assert hub.commits == 0 and not hub.arrived
    hub.repos[NAME].private = True
    module.push(hidden, folder)
    assert arrived(hub) == content(folder)


def test_shards_of_before_do_not_stay(hub: Hub, made: Any, folder: Path, waits: list[float]) -> None:
    module.push(made, folder)
    others = {"figures/loss.json": b"1", "notes.md": b"2"}
    hub.repos[NAME].files |= others
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(b"one file")
    hub.fail("commit", ["lost"])
    module.push(made, folder)
    assert arrived(hub) == content(folder) | others and hub.commits == 2
    hub.repos[NAME].files |= {"pytorch_model.bin": b"of someone else"}
    module.push(made, folder)
    assert arrived(hub) == content(folder) | others and hub.commits == 3


def test_what_cannot_be_pushed_is_refused_before_any_work(hub: Hub, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module.require_pushable(made)
    assert not hub.repos
    for endpoint, fault in (("whoami", 503), ("info", "cut")):  # push waits for that
        hub.fail(endpoint, [fault])
        module.require_pushable(made)
    hub.fail("whoami", [401])
    with pytest.raises(UsageError, match=r"\(401\)") as raised:
        module.require_pushable(made)
    assert "complete" not in str(raised.value.hint)
    with pytest.raises(UsageError, match=r"hub\.repo"):
        module.require_pushable(into(made, "a b"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        module.require_pushable(made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no token"):
        module.require_pushable(made)


def test_the_libraries_are_left_as_they_were(hub: Hub, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    module.require_pushable(made)
    client = huggingface_hub.utils.get_session()
    assert constants.HF_HUB_DISABLE_XET is False and "send" not in vars(client) and client.timeout.read is None


def test_the_command(
    models: Callable[[str], Path], recipe: Callable[..., Any], rows: Path, pissa: Any, hub: Hub, waits: list[float]
) -> None:
    sets = [f"data.train={rows}", "train.steps=3", "train.batch_size=4", "model.bits=32", "adapter.rank=4"]
    made = recipe(models("llama"), *sets, "hub.private=true")
    train(made)
    merged = Run(Path(made.output)).merged
    with serve() as other:  # in a process of its own, where HF_ENDPOINT says where the Hub is
        environment = {**os.environ, "HF_ENDPOINT": other.url, "HF_HUB_OFFLINE": "0"}
        words = [sys.executable, "-m", "pissa_cli", "merge", made.output, "--push"]
        other.fail("blob", ["cut"])
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "; next try in 1 s" in done.stderr.splitlines()[-1] and f"{other.url}/{NAME}" in done.stdout
        assert other.repos[NAME].private and other.commits == 1 and arrived(other) == content(merged)
        assert set(arrived(other)) >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "pissa.json"}
    hub.repos["team/other"] = Repo(private=True, files={"README.md": b"mine"})
    refused = pissa("merge", made.output, "--push", "--repo", "team/other", "--json")
    assert refused.code == 2 and "--force" in refused.json["hint"] and "merge:" not in refused.err
    assert pissa("merge", made.output, "--push", "--repo", "team/other", "--force", "--json").code == 0
    assert arrived(hub, "team/other") == content(merged)
    hub.fail("commit", [403])
    failed = pissa("merge", made.output, "--push", "-v")
    assert failed.code == 2 and "upload to the Hub failed (403)" in failed.err
    assert TOKEN not in "".join([done.stdout, done.stderr, *(run.out + run.err for run in (refused, failed))])
    for path in Path(made.output).rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
    outcome = pissa("merge", made.output, "--force")
    assert outcome.code == 2 and "add --push" in outcome.err
