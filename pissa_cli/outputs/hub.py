"""Put a folder on the Hub: in one commit, again while faults pass, and never over what is another's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import sleep, time
from typing import Any

from pissa_cli import __version__
from pissa_cli.errors import PissaError, UsageError, first_line
from pissa_cli.outputs.card import default_repo
from pissa_cli.run.rundir import PROVENANCE
from pissa_cli.run.started import open_run
from pissa_cli.schema.recipe import Recipe

TIMEOUT = 60.0
FIRST_WAIT, LONGEST_WAIT, PATIENCE = 1.0, 60.0, 900.0
"""Seconds: of waits that double, and of all waits together."""
LOADED = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
"""What a model is loaded from: such files of a repository that the folder lacks would be taken for its own."""
ADAPTER = "adapter_config.json"
REFUSED = {
    401: "the token is not valid: log in again with `hf auth login`, or set HF_TOKEN",
    403: "this token may not do that: make one with the right to write, or name another repository with --repo",
    404: "check the name (user or organization, and repository), and that the token may see it",
    409: "name another repository with --repo",
}


class _Passing(Exception):
    """A fault that may pass by itself; wait: seconds that the Hub asks for."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


def push(recipe: Recipe, folder: Path, force: bool = False, say: Callable[[str], None] = lambda _: None) -> str:
    """Upload a merged model to the Hub in one commit and return its address.

    The repository is `hub.repo`, or `<user>/<base>-<method>-r<rank>`; HF_ENDPOINT and HF_TOKEN are honoured.
    It then holds the folder's files, and none that a model is loaded from beside them. What passes (408, 429, 5xx, lost
    connections) is tried again, up to PATIENCE; `say` tells of each wait. What was uploaded is not sent again.
    Raises UsageError where the Hub refuses (token, rights, name) or the repository is not one of this base and of ours
    (force: replace that), PissaError when the upload fails.
    """
    from huggingface_hub import CommitOperationAdd

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    base = open_run(recipe)[1]["base"]["fingerprint"]
    waited, wait = 0.0, FIRST_WAIT
    with _watched():
        while True:
            try:
                return _push_once(recipe, operations, None if force else base)
            except PissaError:
                raise
            except Exception as error:  # the network and the Hub raise many kinds
                passing = _passing(error)
                if passing is None:
                    raise _failure(error, f"{folder} is complete; ") from None
            pause = max(wait, passing.wait or 0.0)
            if waited + pause > PATIENCE:
                raise PissaError(
                    f"upload to the Hub failed: {passing}, after waits of {waited:.0f} s in all",
                    f"{folder} is complete; try again with --push: what arrived is not sent again",
                )
            say(f"{passing}; next try in {pause:.0f} s, for {PATIENCE / 60:.0f} min at most")
            sleep(pause)
            waited, wait = waited + pause, min(2 * wait, LONGEST_WAIT)


def require_pushable(recipe: Recipe, force: bool = False) -> None:
    """Raise UsageError, before any work, for what `push` would refuse: no token, an impossible name, a repository of
    another base or maker. A Hub that cannot be reached now is for `push` to wait for."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(recipe.hub.repo or default_repo(recipe))
    except HFValidationError as error:
        raise UsageError(f"hub.repo: {error}", "name it user/name") from None
    if get_token() is None:
        raise UsageError("no token for the Hub", "log in with `hf auth login`, or set HF_TOKEN")
    base = open_run(recipe)[1]["base"]["fingerprint"]
    with _watched():
        try:
            api = HfApi()
            name = _name(api, recipe)
            try:
                info = api.model_info(name, files_metadata=True, timeout=TIMEOUT)
            except RepositoryNotFoundError:
                return
            _require_private(recipe, name, info)
            if not force:
                _require_ours(api, name, info, base)
        except PissaError:
            raise
        except Exception as error:
            if _passing(error) is None:
                raise _failure(error, "") from None


def _push_once(recipe: Recipe, operations: list[Any], base: str | None) -> str:
    """One try, from what is there now: if an earlier one arrived whose answer was lost, nothing is left to do."""
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    name = _name(api, recipe)
    api.create_repo(name, private=recipe.hub.private, exist_ok=True)
    info = api.model_info(name, files_metadata=True, timeout=TIMEOUT)
    _require_private(recipe, name, info)
    if base is not None:
        _require_ours(api, name, info, base)
    there, own = {file.rfilename: file for file in info.siblings or []}, {one.path_in_repo for one in operations}
    stale = [
        path for path in there if path not in own and "/" not in path and any(fnmatch(path, form) for form in LOADED)
    ]
    if stale or not all(_is_same(there.get(one.path_in_repo), one) for one in operations):
        changes = [*operations, *(CommitOperationDelete(path) for path in stale)]
        message = f"Upload by pissa {__version__}"
        api.create_commit(name, changes, commit_message=message, parent_commit=info.sha)  # upload_folder makes several
    return f"{api.endpoint}/{name}"


def _name(api: Any, recipe: Recipe) -> str:
    user, name = api.whoami()["name"], recipe.hub.repo or default_repo(recipe)
    return name if "/" in name else f"{user}/{name}"


def _require_private(recipe: Recipe, name: str, info: Any) -> None:
    """UsageError for a repository that was there and is public, where the recipe wants a private one."""
    if recipe.hub.private and info.private is False:
        raise UsageError(
            f"{name}: this repository is public, hub.private asks for a private one",
            "make it private on the Hub, name another with --repo, or use --set hub.private=false",
        )


def _require_ours(api: Any, name: str, info: Any, base: str) -> None:
    """UsageError if a repository holds anything but a model that was made here on the base of this fingerprint."""
    paths = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
    if not paths:
        return
    held = "files, but nothing made by pissa"
    if PROVENANCE in paths and ADAPTER not in paths:
        found = _read(api, name, info.sha, PROVENANCE).get("base_fingerprint")
        if found == base:
            return
        held = f"a model made on another base (fingerprint {found}, here {base})"
    elif ADAPTER in paths:
        held = f"an adapter for {_read(api, name, info.sha, ADAPTER).get('base_model_name_or_path')}, no merged model"
    elif "config.json" in paths:
        kinds = _read(api, name, info.sha, "config.json").get("architectures") or ["unknown"]
        held = f"a model ({', '.join(map(str, kinds))}) that pissa has not made"
    raise UsageError(
        f"{name}: this repository holds {held}",
        "name another repository with --repo, or replace what is there with --force",
    )


def _read(api: Any, name: str, commit: str, path: str) -> dict[str, Any]:
    """A JSON object of a repository; empty where it is none."""
    from huggingface_hub import get_session, get_token, hf_raise_for_status

    headers = {"authorization": f"Bearer {get_token()}"}
    answer = get_session().get(f"{api.endpoint}/{name}/resolve/{commit}/{path}", headers=headers)
    hf_raise_for_status(answer)
    try:
        content = answer.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_same(there: Any, operation: Any) -> bool:
    """Whether a file of the repository is the one of the folder, by the Hub's own hashes: sha256 or git's of a blob."""
    if there is None or there.size != operation.upload_info.size:
        return False
    if there.lfs:
        return bool(there.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        content = file.read()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _watched() -> Iterator[None]:
    """Within, huggingface_hub's requests end in time, faults that pass come out as `_Passing` at once (it would wait in
    silence, as long as it is told to), and files go over plain HTTP: by xet it cannot be seen what arrived."""
    from huggingface_hub import close_session, constants, get_session

    close_session()
    client, by_xet = get_session(), constants.HF_HUB_DISABLE_XET
    client.timeout, constants.HF_HUB_DISABLE_XET = TIMEOUT, True
    client.send = partial(_send, client.send)  # type: ignore[method-assign]
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = by_xet
        close_session()


def _send(send: Callable[..., Any], request: Any, **options: Any) -> Any:
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        answer = send(request, **options)
    except OfflineModeIsEnabled:
        raise UsageError("the Hub is switched off by HF_HUB_OFFLINE", "unset it to use --push") from None
    except Exception as error:  # what its HTTP library calls a lost connection
        server = f"{request.url.scheme}://{request.url.netloc.decode()}"
        raise _Passing(f"the connection to {server} failed ({type(error).__name__})") from error
    status = answer.status_code
    expired = status == 403 and request.method == "PUT"  # an address of storage, which is signed for a while
    busy = status == 409 and "conflicting operation" in answer.text
    if status in (408, 412, 429) or status >= 500 or expired or busy:  # 412: another commit came between
        raise _Passing(f"the Hub answers {status}", _wait_asked(answer.headers))
    return answer


def _wait_asked(headers: Any) -> float | None:
    """Seconds, from Retry-After (a number or a date) or the Hub's own RateLimit."""
    asked, limit = headers.get("retry-after", ""), re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))
    if asked.strip().isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time())
    except ValueError:
        return float(limit[1]) if limit else None


def _passing(error: BaseException | None) -> _Passing | None:
    """The fault that passes behind an error, where there is one."""
    while error is not None and not isinstance(error, _Passing):
        error = error.__cause__ or error.__context__
    return error


def _failure(error: Exception, intact: str) -> PissaError:
    """What a refused request says: UsageError for the token, its rights and the name; never the token itself."""
    from huggingface_hub import get_token

    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    reason = first_line(error, getattr(error, "server_message", None))
    reason = re.sub(r"\?\S*", "", reason).replace(get_token() or "\n", "...")  # addresses of uploads are signed
    text = f"upload to the Hub failed{f' ({status})' if status else ''}: {reason}"
    if status in REFUSED:
        return UsageError(text, f"{intact}{REFUSED[status]}")
    return PissaError(text, f"{intact}try again with --push")
