"""Where answers in chats end, for other programs: they ask generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pissa_cli.base.configuration import end_tokens, read_config
from pissa_cli.base.loading import load_tokenizer
from pissa_cli.data.chat import end_of_turn, special_tokens
from pissa_cli.files import read_json, write_json
from pissa_cli.schema.recipe import Recipe

GENERATION = "generation_config.json"


def write_answer_ends(folder: Path, recipe: Recipe) -> None:
    """Have the model in `folder` end its answers where the template ends a turn, if that is one token."""
    ends = [number for number in unknown_ends(folder, recipe).values() if number is not None]
    if not ends:
        return
    settings = _generation(folder, recipe)
    settings.pop("_from_model_config", None)  # transformers 4 may take the ends of config.json then
    known = end_tokens(settings.get("eos_token_id", load_tokenizer(folder, recipe).eos_token_id))
    write_json(folder / GENERATION, settings | {"eos_token_id": list(dict.fromkeys([*known, *ends]))})


def unknown_ends(folder: Path, recipe: Recipe) -> dict[str, int | None]:
    """Where answers in chats end and the model in `folder` would go on: the text, and its number if it is one token."""
    if recipe.data.format != "chat":
        return {}
    tokenizer, known = load_tokenizer(folder, recipe), end_tokens(_generation(folder, recipe).get("eos_token_id"))
    tokens = special_tokens(tokenizer) | {str(tokenizer.eos_token): tokenizer.eos_token_id}
    ends = {text: tokens.get(text) for text in end_of_turn(tokenizer) or [str(tokenizer.eos_token)]}
    return {text: number for text, number in ends.items() if number not in known}


def _generation(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What generation_config.json says, or config.json where there is no such file, as transformers has it."""
    path = folder / GENERATION
    if path.is_file():
        return read_json(path)
    return dict(GenerationConfig.from_model_config(read_config(folder, recipe.model)).to_diff_dict())
