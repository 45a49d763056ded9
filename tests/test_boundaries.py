"""Tokenizers that put a space before a text (Llama 2, Mistral): no space of theirs before an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pissa_cli.data.chat import encode_chats
from pissa_cli.data.examples import Encoded
from pissa_cli.data.tokenize import load_examples, question_prompt
from pissa_cli.schema.data_options import DataSection

BLANK = "\u2581"
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.fixture(params=["prepended", "first", "always", "none"])
def spaced(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """As Llama 2 has it in its old and in its new form, before every part between special tokens, and nowhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if request.param == "prepended":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        scheme = "never" if request.param == "none" else request.param
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    blank = " " if request.param == "none" else ""
    tokenizer.train_from_iterator(
        [blank + word for word in ("Yes", "No", "Answer:", "USER:", "ASSISTANT:", "Is", "it?")], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert fast.tokenize("Answer: Yes")[-1] == f"{BLANK}Yes", "the bound of prompt and answer lies within a token"
    return fast


def written(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """The text as the tokens have it, without the space before it."""
    text = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("<0x0A>", "\n").replace(BLANK, " ")
    return text.removeprefix(" ")


@pytest.mark.parametrize(
    ("section", "row", "question", "text"),
    [
        ({"format": "prompt"}, {"prompt": "Answer: ", "completion": "Yes"}, "Answer: ", "Answer: Yes</s>"),
        ({"format": "prompt"}, {"prompt": "Answer:\n", "completion": "Yes"}, "Answer:\n", "Answer:\nYes</s>"),
        ({"format": "prompt"}, {"prompt": "Answer: ", "completion": " Yes"}, "Answer: ", "Answer:  Yes</s>"),
        (
            {"template": "USER: {instruction} ASSISTANT: {output}"},
            {"instruction": "Is it?", "output": "No"},
            "Is it?",
            "USER: Is it? ASSISTANT: No</s>",
        ),
    ],
)
def test_an_answer_has_no_space_of_the_tokenizers(
    section: dict[str, Any],
    row: dict[str, Any],
    question: str,
    text: str,
    spaced: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    options = DataSection(**section)
    source = tmp_path / "one.jsonl"
    source.write_text(json.dumps(row))
    examples = load_examples(str(source), options, spaced, None)
    assert written(examples.ids.tolist(), spaced) == text
    _, asked = question_prompt(question, options, spaced)
    assert examples.ids[~examples.targets].tolist() == asked, "what a model is asked is what it learned to answer"


def test_nor_has_a_turn(spaced: PreTrainedTokenizerFast) -> None:
    spaced.chat_template = VICUNA
    roles = ["user", "assistant"] * 2
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, ["Is it so?", "Yes", "Is it?", "No"], strict=True)
    ]
    (found,) = encode_chats([{"messages": messages}], DataSection(format="chat"), spaced)
    assert isinstance(found, Encoded)
    whole = spaced.apply_chat_template(messages, tokenize=False)
    in_one = written(spaced(whole, add_special_tokens=False)["input_ids"], spaced)
    assert written(found.ids, spaced) == in_one, "with the spaces of the text in one piece, and no other"
    said = [token for token, target in zip(found.ids, found.targets, strict=True) if target]
    assert written(said, spaced) == "Yes</s>No</s>"
    _, asked = question_prompt("Is it so?", DataSection(format="chat"), spaced)
    assert found.ids[: len(asked)] == asked and found.targets[: len(asked) + 1] == [False] * len(asked) + [True]
