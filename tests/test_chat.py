"""Conversations: what of them is learned, by templates of every kind, and the template of a recipe's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pissa_cli.base.loading import load_tokenizer
from pissa_cli.base.side_files import copy_side_files, copy_tokenizer
from pissa_cli.data import chat
from pissa_cli.data.chat import encode_chats, end_of_turn, unlearned_prompt
from pissa_cli.data.tokenize import load_examples, question_prompt
from pissa_cli.errors import UsageError
from pissa_cli.evals.generate import special_stops
from pissa_cli.outputs.answer_ends import unknown_ends, write_answer_ends
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.recipe import ModelSection, Recipe

SECTION = DataSection(format="chat")
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHTS = (  # kept in the last turn alone, where they are written even if there are none
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.content.split('</think>')[0].split('<think>')[1] if '</think>' in m.content else '' }}</think>"
    "{% endif %}{{ m.content.split('</think>')[-1] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENED = (  # asks for thoughts, and leaves them out of what it writes
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
ENDED = (  # the last turn ends by another token than those before
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<pad>{% else %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = (  # ends with end-of-text where it does not ask, and writes calls in place of the content
    "{% for m in messages %}<{{ m.role }}>{{ (m.tool_calls | tojson) if m.tool_calls else m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
)
CLOSED = (  # ends as a question may begin
    "{% for m in messages %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}!"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


THINKS = (  # asks for thoughts, and writes what it is given
    "{% for m in messages %}{{ '<A>' if m.role == 'assistant' else '<U>' }}{{ m.content }}"
    "{{ '<eos>' if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
STRICT = (  # wants a question
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('none') }}{% endif %}"
) + PLAIN
MOVED = (  # tools before the last question, calls without what is said beside them
    "{% for m in messages %}{% if m.role == 'user' %}{% if m == (messages | selectattr('role', 'equalto', 'user') | "
    "list)[-1] and tools %}[{{ tools[0].function.name }}]{% endif %}<U>{{ m.content }}{% elif m.role == 'tool' %}"
    "<T>{{ m.content | tojson }}{% elif m.tool_calls %}<A>{{ m.tool_calls[0].function | tojson }}<eos>{% else %}"
    "<A>{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)
FORGETS = (  # the thoughts before a call, once an answer follows
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{% if m.thinking and not "
    "(messages[-1].role == 'assistant' and not messages[-1].tool_calls) %}"
    "<t>{{ m.thinking }}</t>{% endif %}{% if m.tool_calls and m.content %}{{ raise_exception('both') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson if m.tool_calls else m.content }}<eos>{% else %}<{{ m.role }}>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = '{"name": "add", "arguments": {"a": 1}}<eos>'


def encode_chat(row: dict[str, Any], section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    return encode_chats([row], section, tokenizer)[0]


def conversation(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def learned(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, section: DataSection = SECTION) -> list[str]:
    """The text, what is learned and what is not by turns, beginning with what is not."""
    found = encode_chat(row, section, tokenizer)
    assert not isinstance(found, str), found
    parts, last = list[list[int]]([[]]), False
    for token, target in zip(found.ids, found.targets, strict=True):
        if target != last:
            parts.append([])
        parts[-1].append(token)
        last = target
    return [str(tokenizer.decode(part)) for part in parts]


@pytest.mark.parametrize(
    ("template", "contents", "parts"),
    [
        (PLAIN, ["Hi", "Yes", "And", "No"], ["<user>Hi<assistant>", "Yes<eos>", "<user>And<assistant>", "No<eos>"]),
        (
            CHATML,
            ["Hi", "\n\n Yes \n"],
            ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "\n\n Yes \n<|im_end|>\n"],
        ),
        (
            THOUGHTS,
            ["Hi", "<think>a</think> Yes", "And", "<think>b</think>No"],
            ["<user>Hi<eos>\n<assistant>", "Yes<eos>\n", "<user>And<eos>\n<assistant>", "<think>b</think>No<eos>\n"],
        ),
        (
            THOUGHTS,
            ["Hi", "Yes", "And", "No"],
            ["<user>Hi<eos>\n<assistant>", "Yes<eos>\n", "<user>And<eos>\n<assistant>", "<think></think>No<eos>\n"],
        ),
        (PLAIN.replace("<eos>", "!"), ["Hi", "Yes"], ["<user>Hi<assistant>", "Yes!"]),
        (OPENED, ["Hi", "<b>Yes", "And", "No"], ["<U>Hi<A>", "<b>Yes<eos>", "<U>And<A>", "No<eos>"]),
        (
            ENDED,
            ["Hi", "Yes", "And", "No"],
            ["<user>Hi<eos><assistant>", "Yes<eos>", "<user>And<eos><assistant>", "No<pad>"],
        ),
        (
            OPENED,
            ["Hi", "<think>a</think>Yes", "And", "No"],
            ["<U>Hi<A>", "Yes<eos>", "<U>And<A>", "No<eos>"],
        ),
        (
            ASKED,
            ["Hi", "Yes", "And", "No"],
            ["<user>Hi<end><assistant>", "Yes<end>", "<user>And<end><assistant>", "No<end><eos>"],
        ),
        (ASKED, ["Hi", "Yes", "And"], ["<user>Hi<end><assistant>", "Yes<end>", "<user>And<end><eos>"]),
        (CLOSED, ["Hi", "<think>a</think>Yes", "!And", "No"], ["Hi", "Yes", "!And", "No!"]),
        (CLOSED, ["Hi", "<think>a</think>Yes", "!And"], ["Hi", "Yes", "!And!"]),
        (BARE, ["Hi", "has 3"], ["user: Hi\nassistant: ", "has 3\n<eos>"]),
        (THINKS, ["Hi", "<think>\na</think>Yes"], ["<U>Hi<A><think>\n", "a</think>Yes<eos>"]),
        (
            OPENED,
            ["Hi", "\u00a7 1", "And", "\u00a7\u00a7"],
            ["<U>Hi<A>", "\u00a7 1<eos>", "<U>And<A>", "\u00a7\u00a7<eos>"],
        ),
    ],
)
def test_what_the_assistant_says_is_learned(
    template: str, contents: list[str], parts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    row = conversation(*contents)
    assert learned(row, tokenizer) == parts
    found = encode_chat(row, SECTION, tokenizer)
    assert not isinstance(found, str)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.decode(found.ids) == "".join(parts)
    assert "".join(parts) == (f"{whole}<eos>" if template == BARE else whole)
    if template != BARE:
        assert found.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_no_token_spans_what_is_asked_and_what_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    """' has' is one token, which an answer to 'assistant: ' cannot begin with."""
    tokenizer.chat_template = BARE
    assert len(tokenizer(" has")["input_ids"]) == 1
    found = encode_chat(conversation("Hi", "has 3", "And", "has 4"), SECTION, tokenizer)
    _, asked = question_prompt("Hi", SECTION, tokenizer)
    assert not isinstance(found, str)
    assert found.ids[: len(asked)] == asked and found.targets[: len(asked) + 1] == [False] * len(asked) + [True]


def test_nothing_is_added_behind_a_turn_that_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = BARE
    parts = ["user: Hi\nassistant: ", "Yes\n", "user: And\n"]
    assert learned(conversation("Hi", "Yes", "And"), tokenizer) == parts


def test_the_mask_is_that_of_a_template_that_marks_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers' own, for templates that say where the assistant speaks."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>"
        "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = conversation("Hi there", "Yes, 12 apples", "And", "No")
    own = tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
    found = encode_chat(row, SECTION, tokenizer)
    assert not isinstance(found, str)
    assert (found.ids, found.targets) == (own["input_ids"], [bool(flag) for flag in own["assistant_masks"]])


def test_rows_of_sharegpt_and_of_parquet_files(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    section = DataSection(format="chat", columns={"messages": "conversations"})
    assert learned({"conversations": turns}, tokenizer, section) == ["<system>S<user>Hi<assistant>", "Yes<eos>"]
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ 'call' if m.tool_calls is defined else m.content }}")
    row = conversation("Hi", "Yes")
    row["messages"][1]["tool_calls"] = None
    assert learned(row, tokenizer) == ["<user>Hi<assistant>", "Yes<eos>"]


@pytest.mark.parametrize("template", [PLAIN, CHATML, THOUGHTS, ENDED, ASKED, BARE])
def test_of_a_prompt_and_its_completion_the_latter_is_learned(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """TRL's conversational rows, whatever the assistant has said in the prompt; and of preferences what was chosen."""
    tokenizer.chat_template = template
    messages = conversation("Hi", "Yes", "And", "No", "Why", "So")["messages"]
    sections = {
        "completion": DataSection(format="chat", columns={"messages": "prompt"}),
        "chosen": DataSection(format="chat", columns={"messages": "prompt", "completion": "chosen"}),
    }
    for begin in (1, 3, 5):
        asked = tokenizer.apply_chat_template(messages[:begin], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: begin + 1], tokenize=False)
        for answer, section in sections.items():
            row = {"prompt": messages[:begin], answer: messages[begin : begin + 1]}
            read, said = learned(row, tokenizer, section)
            assert (read, said.removesuffix("<eos>")) == (asked, str(whole).removeprefix(asked).removesuffix("<eos>"))
    row = {"prompt": messages[:1], "completion": messages[1:]}
    parts = learned(row, tokenizer, sections["completion"])
    assert parts == learned({"messages": messages}, tokenizer)  # tools and users within a completion are read
    assert parts == learned({"messages": messages, "completion": None}, tokenizer)
    for nothing in ("Yes", None):
        texts = {"prompt": messages[:3], "completion": nothing}
        assert "'completion' is not a list" in encode_chat(texts, sections["completion"], tokenizer)
    assert learned({"prompt": messages}, tokenizer, sections["completion"]) == parts


@pytest.mark.parametrize("completion", ["Yes", [{"role": "assistant", "content": "Yes"}]])
def test_a_completion_beside_whole_conversations_is_not_read(
    completion: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN
    row = conversation("Hi", "Yes") | {"completion": completion}
    assert learned(row, tokenizer) == ["<user>Hi<assistant>", "Yes<eos>"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, None).unused == ["completion"]


def test_the_assistant_may_speak_first(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    row = {"messages": conversation("", "Hello", "Hi", "Yes")["messages"][1:]}
    assert learned(row, tokenizer) == ["<assistant>", "Hello<eos>", "<user>Hi<assistant>", "Yes<eos>"]


def test_calls_are_learned_as_the_template_writes_them(tokenizer: PreTrainedTokenizerBase) -> None:
    """OpenAI's arguments are a JSON text; a template may want them so, or as a mapping, or none at all."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = conversation("Hi", "", "3", "Yes")
    row["messages"][1] |= {"content": None, "tool_calls": [call]}
    row["messages"][2]["role"] = "tool"
    written = '[{"function": {"arguments": %s, "name": "add"}, "type": "function"}]<end>'
    tokenizer.chat_template = ASKED.replace("m.tool_calls | tojson", "m.tool_calls | tojson(sort_keys=True)")
    parts = learned(row, tokenizer)
    assert json.loads(parts[1].removesuffix("<end>")) == json.loads((written % '{"a": 1}').removesuffix("<end>"))
    assert parts[2:] == ["<tool>3<end><assistant>", "Yes<end><eos>"]
    tokenizer.chat_template = ASKED.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments + ' add'")
    assert learned(row, tokenizer)[1] == '{"a": 1} add<end>'
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content or '')")
    assert encode_chat(row, SECTION, tokenizer) == "the chat template leaves out what the assistant says"


def test_calls_of_sharegpt_are_calls_where_the_template_knows_them(tokenizer: PreTrainedTokenizerBase) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": call}]
    for text in (call, f"[{call}]"):
        row = {"messages": [turns[0], {**turns[1], "value": text}]}
        tokenizer.chat_template = ASKED.replace("m.tool_calls | tojson", "m.tool_calls[0].function.name + '!'")
        assert learned(row, tokenizer) == ["<user>Hi<end><assistant>", "add!<end><eos>"]
        tokenizer.chat_template = PLAIN
        assert learned(row, tokenizer)[1] == f"{text}<eos>"


def test_tools_are_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + PLAIN
    row = conversation("Hi", "Yes")
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        assert learned(row | {"tools": tools}, tokenizer)[0] == "add<user>Hi<assistant>"
    for tools in (None, "", []):
        assert learned(row | {"tools": tools}, tokenizer)[0] == "<user>Hi<assistant>"
    for tools in ("add", 3, ["add"], "{}"):
        assert encode_chat(row | {"tools": tools}, SECTION, tokenizer) == "'tools' is not a list of tools"
    tokenizer.chat_template = PLAIN
    for tools in ([{"name": "add"}], [{"type": "function", "function": {"name": "add"}}]):
        assert encode_chat(row | {"tools": tools}, SECTION, tokenizer) == "the chat template leaves out the tools"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"tools": [{"name": "add"}]}) + "\n")
    with pytest.raises(UsageError, match="no usable row") as raised:
        load_examples(str(path), SECTION, tokenizer, None)
    assert "data.template" in str(raised.value.hint)


def test_rows_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = OPENED
    assert "leaves out" in str(encode_chat(conversation("Hi", "<think>a</think>Yes"), SECTION, tokenizer))
    tokenizer.chat_template = PLAIN
    tokenizer.chat_template = PLAIN.replace("in messages %}", "in messages if m.role != 'system' %}")
    row = conversation("Hi", "Yes")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert encode_chat(row, SECTION, tokenizer) == "the chat template leaves out what the system says"
    tokenizer.chat_template = "{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert "leaves out" in str(encode_chat(conversation("Hi", "Yes", "And", "No"), SECTION, tokenizer))
    tokenizer.chat_template = PLAIN.replace("in messages %}", "in messages if m.role == 'user' or m != messages[-1] %}")
    assert "cannot be found" in str(encode_chat(conversation("Hi", "Yes", "And"), SECTION, tokenizer))
    tokenizer.chat_template = PLAIN.replace("in messages %}", "in messages if m.role == 'user' %}")
    assert "cannot be found" in str(encode_chat(conversation("Hi", "Yes"), SECTION, tokenizer))
    tokenizer.chat_template = PLAIN
    assert encode_chat(conversation("Hi"), SECTION, tokenizer) == "no assistant message"
    assert encode_chat(conversation("Hi", ""), SECTION, tokenizer) == "the assistant says nothing"
    row = conversation("Hi", "Yes", "And", "No")
    row["messages"][1]["weight"] = 0.5
    assert "weight that is neither 0 nor 1" in str(encode_chat(row, SECTION, tokenizer))
    row["messages"][1] |= {"weight": 1, "train": "no"}
    assert "train that is neither true nor false" in str(encode_chat(row, SECTION, tokenizer))
    row["messages"][1]["train"] = None
    row["messages"][0]["train"] = True
    assert "not the assistant's has train: true" in str(encode_chat(row, SECTION, tokenizer))
    for content, reason in (
        ([{"type": "text", "text": "Hi"}, {"type": "image", "image": "x.png"}], "a part that is no text (image)"),
        ([{"type": "text", "text": None}], "a part that is no text (text)"),
        (["Hi"], "a part that is no text (Hi)"),
        ([{"temp": 20}], "a part that is no text (None)"),
        ({"a": 1}, "content is neither text nor a list of parts"),
    ):
        row = conversation("Hi", "Yes")
        row["messages"][0]["content"] = content
        assert reason in str(encode_chat(row, SECTION, tokenizer))
    for messages in (None, "Hi", ["Hi"], [{"role": "user"}], [{"content": "Hi"}]):
        assert "is not a list of messages" in str(encode_chat({"messages": messages}, SECTION, tokenizer))
    assert "surrogate" in str(encode_chat(conversation("\ud800", "Yes"), SECTION, tokenizer))
    tokenizer.chat_template = "{{ raise_exception('no\nsystem') }}{{ messages }}"
    assert encode_chat(conversation("Hi", "Yes"), SECTION, tokenizer) == "the chat template refuses it (no system)"


@pytest.mark.parametrize(
    ("template", "answer", "said"),
    [
        (OPENED, "Yes", "<A><think>\n"),
        (THINKS, "<think>\na</think>Yes", None),
        (THINKS, "Yes", "<A><think>\n"),
        (PLAIN, "Yes", None),
        (CHATML, "Yes", None),
        (ASKED, "Yes", None),
        (BARE, "Yes", None),
    ],
)
def test_a_prompt_that_no_answer_follows_is_said(
    template: str, answer: str, said: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    (tmp_path / "rows.jsonl").write_text(json.dumps(conversation("Hi", answer, "And", answer)))
    examples = load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, None)
    assert unlearned_prompt(examples, tokenizer) == said


def test_calls_are_found_where_the_text_before_them_changes(tokenizer: PreTrainedTokenizerBase) -> None:
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    start = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "content": "2"}]
    tokenizer.chat_template = MOVED
    row: dict[str, Any] = {"messages": [*start, *conversation("Yes", "And", "No")["messages"][1:]], "tools": [CALL]}
    row["messages"].insert(3, {"role": "assistant", "content": "Two"})
    row["messages"][4]["role"], row["messages"][5]["role"] = "user", "assistant"
    row["messages"] = row["messages"][:6]
    assert learned(row, tokenizer) == ["<U>Hi<A>", CALLED, '<T>"2"<A>', "Two<eos>", "[add]<U>And<A>", "No<eos>"]
    tokenizer.chat_template = FORGETS
    row = {"messages": [start[0], call | {"thinking": "so"}, start[2], {"role": "assistant", "content": "No"}]}
    assert learned(row, tokenizer) == ["<user>Hi<A>", CALLED, "<tool>2<A>", "No<eos>"]


def test_a_row_that_the_template_does_not_take_in_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = STRICT
    row = conversation("x", "Hello", "Hi", "Yes")
    row["messages"] = row["messages"][1:]
    assert "refuses the conversation up to a turn" in str(encode_chat(row, SECTION, tokenizer))
    row["messages"][0]["role"] = "system"
    assert learned(row, tokenizer) == ["<system>Hello<user>Hi<assistant>", "Yes<eos>"]


def test_roles_of_other_tools_and_what_a_template_drops(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN.replace("in messages %}", "in messages if m.role in ('user', 'assistant') %}")
    for place, role in ((0, "prompter"), (0, "Human"), (0, "human"), (0, "User"), (1, "Assistant"), (1, "bot")):
        row = conversation("Hi", "Yes")
        row["messages"][place]["role"] = role
        assert learned(row, tokenizer) == ["<user>Hi<assistant>", "Yes<eos>"]
    for role in ("tool", "function_response", "critic"):
        row = conversation("Hi", "Yes")
        row["messages"].insert(1, {"role": role, "content": "RESULT"})
        name = "tool" if role == "function_response" else role
        assert encode_chat(row, SECTION, tokenizer) == f"the chat template leaves out what the {name} says"


def test_oddities_of_exported_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ASKED
    row = conversation("Hi", "Yes")
    row["messages"][1]["tool_calls"] = []
    assert learned(row, tokenizer) == ["<user>Hi<end><assistant>", "Yes<end><eos>"]
    for calls in ([{"function": {"name": None, "arguments": {}}}], {"name": "add", "arguments": {}}, "add"):
        row["messages"][1]["tool_calls"] = calls
        assert "not a list of calls with names" in str(encode_chat(row, SECTION, tokenizer))
    row["messages"][1]["role"] = None
    assert "is not a list of messages" in str(encode_chat(row, SECTION, tokenizer))
    assert encode_chat(conversation("Hi", " \n"), SECTION, tokenizer) == "the assistant says nothing"
    row = conversation("Hi", "", "And", "No")
    row["messages"][1]["weight"] = 0
    assert learned(row, tokenizer)[-1] == "No<end><eos>"
    row = {"messages": [{"role": "system", "content": "a"}, *row["messages"]], "system": "b"}
    assert encode_chat(row, SECTION, tokenizer) == "a system message beside the column for it"
    row = conversation("Hi", "Yes") | {"tools": [{"type": "function", "function": "f"}]}
    assert encode_chat(row, SECTION, tokenizer) == "'tools' is not a list of tools"
    tokenizer.chat_template = MOVED
    row = conversation("Hi", "Yes")
    row["messages"].insert(1, {"role": "tool", "content": [{"temp": 20}]})
    assert "temp" in learned(row, tokenizer)[0]


def test_there_has_to_be_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(conversation("Hi", "Yes")))
    for template, message in (
        (None, "no chat template"),
        ("{% for m in messages %}{{", "not a chat template.*line 1"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UsageError, match=message):
            load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, None)
        with pytest.raises(UsageError, match=message):
            question_prompt("Hi", SECTION, tokenizer)
    with pytest.raises(ValueError, match="Jinja"):
        DataSection(format="chat", template="{instruction}{output}")


def test_the_recipes_own_template_goes_with_the_model(models: Callable[[str], Path], tmp_path: Path) -> None:
    base = models("llama")
    recipe = Recipe(model=ModelSection(name=str(base)), data=DataSection(format="chat", template=CHATML))
    assert load_tokenizer(base, recipe).chat_template == CHATML
    (tmp_path / "source").mkdir()
    for path in base.glob("*.json"):
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source" / "chat_template.jinja").write_text(PLAIN)
    (tmp_path / "source" / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    for copy in (copy_side_files, copy_tokenizer):
        folder = tmp_path / copy.__name__
        copy(tmp_path / "source", folder, recipe)
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
        said = json.loads((folder / "tokenizer_config.json").read_text())  # which llama.cpp, Ollama and TGI read
        assert said["chat_template"] == CHATML and not (folder / "chat_template.json").exists()
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "tools.jinja").write_text("x")
    (tmp_path / "source" / "NOTICE").write_text("x")
    copy_side_files(tmp_path / "source", tmp_path / "other", Recipe(model=ModelSection(name=str(base))))
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template == {"default": PLAIN, "tools": "x"}
    assert (tmp_path / "other" / "NOTICE").is_file()


def test_other_programs_know_where_an_answer_ends(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Where the template ends a turn by one token that is not end-of-text, or by end-of-text, or by plain text."""
    base = models("llama")
    for number, (template, ids, alone) in enumerate([(ENDED, [1, 0], [0]), (PLAIN, None, [1]), (CHATML, None, None)]):
        recipe = Recipe(model=ModelSection(name=str(base)), data=DataSection(format="chat", template=template))
        folder = tmp_path / str(number)
        copy_side_files(base, folder, recipe)
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
        write_answer_ends(folder, recipe)
        found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert found == (ids or 1)
        (folder / "generation_config.json").write_text('{"eos_token_id": null}')
        write_answer_ends(folder, recipe)
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == alone
    bare = DataSection(format="chat", template="{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert unknown_ends(folder, recipe.model_copy(update={"data": bare})) == {"<eos>": 1}
    recipe = recipe.model_copy(update={"data": DataSection(format="chat", template=PLAIN)})
    for said, known in (('{"top_k": 3}', {"top_k": 3}), ("", {"pad_token_id": 0})):  # as in config.json, then
        (folder / "config.json").write_text((base / "config.json").read_text().replace('_id": 1', '_id": 7'))
        (folder / "generation_config.json").write_text(said)
        if not said:
            (folder / "generation_config.json").unlink()
        assert unknown_ends(folder, recipe) == {"<eos>": 1}
        write_answer_ends(folder, recipe)
        found = json.loads((folder / "generation_config.json").read_text())
        assert found.items() >= known.items() and found["eos_token_id"] == ([1] if said else [7, 1])
        assert "_from_model_config" not in found and unknown_ends(folder, recipe) == {}


@pytest.mark.parametrize("skip", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_not_learned(skip: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    row = conversation("Hi", "Bad", "And", "No")
    row["messages"][1] |= skip
    row["system"] = "S"
    assert learned(row, tokenizer) == ["<system>S<user>Hi<assistant>Bad<eos><user>And<assistant>", "No<eos>"]
    asked, said = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bad"}
    row = {"messages": [asked, said | skip, asked, said]}
    assert learned(row, tokenizer) == ["<user>Hi<assistant>Bad<eos><user>Hi<assistant>", "Bad<eos>"]


def test_tables_fill_up_with_none_which_is_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Parquet gives all objects of a column the same keys; jsonl, in which null is meant, does not."""
    tokenizer.chat_template = (
        ASKED.replace("(m.tool_calls", "('' + m.content) + (m.tool_calls") + "{{ tools | tojson }}"
    )
    rows = []
    for arguments in ({"city": "Paris"}, {"sum": "1 + 1"}):
        row = conversation("Hi", "x")
        call = {"function": {"arguments": arguments, "name": "f"}}  # in order: pyarrow 21 sorts the keys as it writes
        row["messages"][1] = {"role": "assistant", "tool_calls": [call]}
        row["messages"][0]["content"] = [{"type": "text", "text": "Hi"} | ({"cache": "x"} if rows else {})]
        row["messages"][1]["content"] = None
        row["tools"] = [{"function": {"name": "f"}} | ({"strict": True} if rows else {})]
        rows.append(row)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    plain, table = (
        load_examples(str(tmp_path / f"rows.{kind}"), SECTION, tokenizer, None) for kind in ("jsonl", "parquet")
    )
    assert "None" not in tokenizer.decode(table.ids) and "null" not in tokenizer.decode(table.ids)
    assert table.ids.tolist() == plain.ids.tolist() and len(table) == 2
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["city"] = None
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert "null" in tokenizer.decode(load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, None).ids)


def test_keys_of_messages_that_nothing_asks_for_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.mood }}{{ m.content }}")
    row = conversation("Hi", "Yes")
    row["messages"][0] |= {"mood": "glad ", "time": "now", "weight": 1, "name": None}
    row["messages"][1]["reasoning_content"] = "So it is."
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for _ in range(2):
        found = load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, tmp_path)
        assert found.notes("data.train")[1] == "data.train: columns not used: messages.time, messages.reasoning_content"


def test_a_system_column_and_parts_of_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    row = conversation("Hi", "Yes") | {"system": "S", "id": 7}
    row["messages"][1]["content"] = [{"type": "text", "text": "Yes"}, {"type": "text", "text": "!"}]
    assert learned(row, tokenizer) == ["<system>S<user>Hi<assistant>", "Yes!<eos>"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for _ in range(2):  # read, and from the cache
        found = load_examples(str(tmp_path / "rows.jsonl"), SECTION, tokenizer, tmp_path)
        assert found.notes("data.train")[1] == "data.train: columns not used: id"


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    ends = {PLAIN: "<eos>", CHATML: "<|im_end|>", ENDED: "<pad>"}
    for template, end in ends.items():
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == [end]
    for template in (BARE, "{{ messages[0].content }}", "{{ raise_exception('x') }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == []
    pad, eos = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"])
    tokenizer.add_tokens(["\n\n"])  # no special one: the text of an answer shows it
    tokenizer.chat_template = BARE.replace("\n{% endfor", "\n\n{% endfor")
    assert end_of_turn(tokenizer) == [] and special_stops(["\n\n"], tokenizer) == (["\n\n"], [])
    assert special_stops(["</a>", "<pad>", "<eos>"], tokenizer) == (["</a>"], sorted([pad, eos]))


def test_every_day_is_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(conversation("Hello.", "Good day.")) + "\n")
    examples = load_examples(str(path), SECTION, tokenizer, None)
    assert str(tokenizer.decode(examples.ids)).startswith("26 Jul 2024<user>")
    assert question_prompt("Hello.", SECTION, tokenizer)[0].startswith("26 Jul 2024<user>")


def test_rows_of_another_format_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        (conversation("Hi", "Yes"), "{format: chat}"),
        ({"conversations": []}, "{format: chat, columns: {messages: conversations}}"),
        ({"prompt": "a", "completion": "b"}, "{format: prompt}"),
        ({"dialog": conversation("Hi", "Yes")["messages"]}, "{format: chat, columns: {messages: dialog}}"),
        ({"talk": [{"from": "human", "value": "Hi"}], "n": 1}, "{format: chat, columns: {messages: talk}}"),
        ({"question": "a", "answer": "b"}, "data.columns={instruction: question, output: answer}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences are not trained here"),
        ({"prompt": "a", "completion": "b", "label": True}, "rows whose label is true can be: data: {format: prompt}"),
        ({"prompt": [], "completion": []}, "data: {format: chat, columns: {messages: prompt}}"),
        ({"prompt": [], "completion": [], "label": True}, "whose label is true can be: data: {format: chat, columns"),
        ({"prompt": [], "chosen": [], "rejected": []}, "chat, columns: {messages: prompt, completion: chosen}}"),
    ]
    for row, hint in rows:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        with pytest.raises(UsageError) as raised:
            load_examples(str(tmp_path / "rows.jsonl"), DataSection(), tokenizer, None)
        assert hint in str(raised.value.hint)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [], "completion": []}))
    with pytest.raises(UsageError, match="'prompt' is a list and no text") as raised:
        load_examples(str(tmp_path / "rows.jsonl"), DataSection(format="prompt"), tokenizer, None)
    assert "{format: chat, columns: {messages: prompt}}" in str(raised.value.hint)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"asked": [], "completion": []}))
    with pytest.raises(UsageError) as raised:
        load_examples(
            str(tmp_path / "rows.jsonl"), DataSection(format="prompt", columns={"prompt": "asked"}), tokenizer, None
        )
    assert "columns: {messages: asked, completion: completion}}" in str(raised.value.hint)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        CHATML,
        THOUGHTS,
        OPENED,
        ENDED,
        ASKED,
        BARE,
        THINKS,
        STRICT,
        MOVED,
        FORGETS,
        PLAIN.replace("t }}", "t | trim }}"),
    ],
)
def test_conversations_in_like_roles_are_what_each_is_by_itself(
    template: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the assistant speaks in a conversation does not come from others: every turn is looked for in each."""
    tokenizer.chat_template = template
    said = [
        "Hi",
        "Yes",
        "a1b",
        " spaces \n",
        "<think>\na</think>No",
        "<eos>",
        "<A>",
        "\u00a7",
        "assistant: ",
        "<user>a0b",
    ]
    rows: list[dict[str, Any]] = [conversation(*(said[-n:] + said)[: 1 + n % 5]) for n in range(len(said))]
    rows += [conversation(*[one] * count) for one in said for count in (2, 4, 5)]
    rows += [{"messages": [{"role": "system", "content": "Be kind."}, *row["messages"]]} for row in rows]
    together = encode_chats(rows, SECTION, tokenizer)
    monkeypatch.setattr(chat, "_spans_by_roles", lambda *_: None)
    assert [encode_chat(row, SECTION, tokenizer) for row in rows] == together
    assert sum(not isinstance(found, str) for found in together) > 10


def test_many_conversations_are_rendered_once_each_and_tokenized_together(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = CHATML
    rows = [conversation(*(f"{n} and {turn}" for turn in range(20))) for n in range(30)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    counts = {"apply_chat_template": 0, "__call__": 0}
    for name in counts:
        method = getattr(type(tokenizer), name)

        def counted(*given: Any, _name: str = name, _method: Any = method, **named: Any) -> Any:
            counts[_name] += 1
            return _method(*given, **named)

        monkeypatch.setattr(type(tokenizer), name, counted)
    assert len(load_examples(str(source), SECTION, tokenizer, None)) == 30
    assert counts["apply_chat_template"] < 2 * 30 and counts["__call__"] < 10
