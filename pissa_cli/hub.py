"""Put a folder on the Hub."""

from __future__ import annotations

from pathlib import Path

from pissa_cli import __version__
from pissa_cli.card import default_repo
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.recipe import Recipe


def push(recipe: Recipe, folder: Path, repo: str | None) -> str:
    """Upload a model folder to the Hub in one commit and return its address.

    The repository is `repo`, `hub.repo`, or `<user>/<base>-<method>-r<rank>`; HF_ENDPOINT and HF_TOKEN are honoured.
    Raises UsageError without a token and for a name the Hub refuses, PissaError when the upload fails.
    """
    from huggingface_hub import HfApi

    require_pushable(recipe, repo)
    api = HfApi()
    try:
        name = repo or recipe.hub.repo or f"{api.whoami()['name']}/{default_repo(recipe)}"
        api.create_repo(name, private=recipe.hub.private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload by pissa {__version__}")
    except Exception as error:  # the network and the Hub raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PissaError(
            f"upload to the Hub failed: {reason}", f"{folder} is complete; try again with --push"
        ) from None
    return str(commit.repo_url if hasattr(commit, "repo_url") else f"{api.endpoint}/{name}")


def require_pushable(recipe: Recipe, repo: str | None) -> None:
    """Raise UsageError if there is no token for the Hub, or the repository's name is impossible."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo or recipe.hub.repo or default_repo(recipe))
    except HFValidationError as error:
        raise UsageError(f"hub.repo: {error}") from None
    if get_token() is None:
        raise UsageError("no token for the Hub", "log in with `hf auth login`, or set HF_TOKEN")
