"""A judge behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from pissa_cli.errors import UsageError
from pissa_cli.schema.yamlfile import shown

TRIES, TIMEOUT = 8, 300.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; waits double
KEYS = ("PISSA_JUDGE_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class Judge:
    """url: up to and with /v1. The key comes from the environment: PISSA_JUDGE_KEY, else OPENAI_API_KEY."""

    url: str
    model: str

    def require(self) -> None:
        """Raise UsageError if nothing listens there, or the key is none: before the answers, which take long."""
        _key()
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"eval.judge_url: {self.url} is no http address", "e.g. https://api.openai.com/v1")
        if parts.scheme in urllib.request.getproxies():
            return  # whoever that reaches
        try:
            with socket.create_connection(
                (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=TIMEOUT
            ):
                pass
        except OSError as error:
            raise UsageError(f"{self.url}: the judge cannot be reached ({error})", "check eval.judge_url") from None

    def ask(self, system: str, prompt: str) -> str:
        """The judge's text, at temperature 0. Waits and asks again after 408, 409, 429, 5xx and lost connections.

        Raises UsageError where it cannot be reached or refuses the request.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 2048}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if (key := _key()) else {}
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(TRIES):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            try:
                with urllib.request.build_opener(_Stays).open(request, timeout=TIMEOUT) as answer:
                    return _text(json.load(answer), url)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    reason += _said(error)
                    raise UsageError(f"{url}: {reason}", f"check eval.judge_model and the key in {KEYS[0]}") from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            if attempt + 1 < TRIES:
                time.sleep(wait)
        raise UsageError(
            f"{url}: the judge cannot be reached ({reason}, {TRIES} times)",
            "the answers and judgments so far are kept; run the same command again",
        )


class _Stays(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: urllib would take the key along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _key() -> str | None:
    """The key, without white space around it. UsageError, which does not show it, for one that no header can hold."""
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else None
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError(f"{name}: the key has a character that no key has", "set it again, as the server gave it")
    return key


def _text(answer: Any, url: str) -> str:
    """The message; empty where the judge refused to write one."""
    try:
        return str(answer["choices"][0]["message"].get("content") or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UsageError(
            f"{url}: the answer is not that of a chat completion",
            "eval.judge_url names a server of OpenAI's chat completions, up to /v1",
        ) from None


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, where they are those of OpenAI's servers."""
    try:
        return f": {shown(json.load(error)['error']['message'])}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        wait = float(header or "")
    except ValueError:
        return otherwise
    return otherwise if math.isnan(wait) else min(max(wait, 0.0), LONGEST_WAIT)
