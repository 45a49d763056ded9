"""The engine `vllm`: a merged model behind `vllm serve` on this machine, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pissa_cli.base.configuration import end_tokens
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals.generate import TOP_P
from pissa_cli.process import start_beside

NAME = "tuned"
STARTUP, ANSWER = 1800.0, 3600.0  # seconds that the server may take to come up, and for an answer
TOGETHER = 256  # prompts asked at once
LOG_LINES = 15
LONGEST = 2**14  # tokens of a prompt and its answer that the server keeps room for
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine


@dataclass(frozen=True)
class Server:
    """A server that is up; stop_ids: tokens that end an answer beside the tokenizer's end-of-text."""

    url: str
    key: str
    context: int
    stop_ids: list[int]

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        stop: Sequence[str],
        stop_ids: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> Iterator[tuple[int, str]]:
        """(index of the prompt, answer text) in the order they are done; as `evals.generate.generate`, which see.

        seeds: one for each prompt. Raises PissaError where the server fails, after the answers that it still gave.
        """

        def ask(index: int) -> str:
            room = min(max_new_tokens, self.context - len(prompts[index]))
            if room < 1:
                return ""
            sampling = {"temperature": temperature, "top_p": TOP_P if temperature else 1.0, "seed": seeds[index]}
            ending = {"max_tokens": room, "stop": list(stop) or None, "stop_token_ids": [*self.stop_ids, *stop_ids]}
            answer = self._post({"model": NAME, "prompt": prompts[index], **sampling, **ending})
            return str(answer["choices"][0]["text"])

        pool = ThreadPoolExecutor(TOGETHER)
        try:
            asked = {pool.submit(ask, index): index for index in range(len(prompts))}
            failure: PissaError | None = None
            for done, future in enumerate(as_completed(asked), start=1):
                try:
                    yield asked[future], future.result()
                except CancelledError:
                    continue
                except PissaError as error:
                    failure = failure or error
                    for waiting in asked:  # the pool's own way to cancel leaves as_completed waiting for them
                        waiting.cancel()
                    continue
                progress(done, len(prompts))
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with DIRECT.open(request, timeout=ANSWER) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            reason = str(error.code)
            with suppress(OSError, http.client.HTTPException):
                reason = f"{error.code} {error.read()[:300].decode(errors='replace')}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
        raise PissaError(f"vllm: a prompt was not answered ({reason})", "the answers so far are kept; run it again")


@contextmanager
def serve(folder: Path, dtype: str, context: int, trust_remote_code: bool = False) -> Iterator[Server]:
    """Start `vllm serve` on a free port of this machine alone, behind a key, and stop it at the end.

    dtype: bf16 or fp32. Raises UsageError where vLLM is not installed, PissaError, with the end of its log, where it
    does not come up.
    """
    program = shutil.which("vllm")
    if program is None:
        raise UsageError("eval.engine: vllm is not installed", "pip install 'pissa[vllm]', or leave the engine out")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = min(context, LONGEST)
    key, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    command += ["--dtype", {"bf16": "bfloat16", "fp32": "float32"}[dtype], "--generation-config", "vllm"]
    command += ["--max-model-len", str(context), *(["--trust-remote-code"] if trust_remote_code else [])]
    with tempfile.TemporaryFile() as log:
        process = start_beside(command, stdout=log, stderr=log, env=os.environ | {"VLLM_API_KEY": key})
        try:
            _wait(process, url, log)
            yield Server(url, key, context, _stop_ids(folder))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    """Until the server is healthy."""
    until = time.monotonic() + STARTUP
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError, http.client.HTTPException), DIRECT.open(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    log.seek(0)
    last = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    raise PissaError(
        "\n".join(["vllm did not come up; the end of its log:", *last]),
        "what vllm says is above; eval.engine: transformers needs no server",
    )


def _stop_ids(folder: Path) -> list[int]:
    """What the model's own generation_config ends by."""
    try:
        return end_tokens(GenerationConfig.from_pretrained(folder).eos_token_id)
    except (OSError, ValueError):
        return []
