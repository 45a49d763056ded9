"""The recipe's section `data`, and the fields of a row by its format. Knows no torch."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pissa_cli.errors import UsageError
from pissa_cli.schema.adapter_options import Section

FIELDS = {
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "classification": ("text", "label"),
}
"""The fields a row needs, by `data.format`; those of GLUE's formats are in `pissa_cli.schema.glue`."""
OPTIONAL_FIELDS = {"alpaca": ("input",), "chat": ("completion", "tools", "system"), "classification": ("text_pair",)}
_Glue = Literal["glue/cola", "glue/sst2", "glue/mrpc", "glue/stsb", "glue/qqp", "glue/mnli", "glue/qnli", "glue/rte"]
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
Format = Literal["alpaca", "prompt", "chat", "text", "classification", _Glue]


class DataSection(Section):
    train: str | list[str] | None = Field(
        None,
        description="training rows: jsonl, json, csv, tsv or parquet file, or id[:subset[:split]]; or a list of these",
    )
    eval: str | list[str] | None = Field(
        None, description="held-out rows, same forms; or a share of the training rows, which leaves them out: 5%"
    )
    format: Format = Field("alpaca", description="what the rows hold; glue/*: those of a GLUE task")
    columns: dict[str, str] = Field(
        {}, description="our field: their column, e.g. {instruction: query, output: response}"
    )
    template: str | None = Field(
        None,
        description="alpaca: text with {instruction} and {output}, default PiSSA's; chat: Jinja, default the model's",
    )
    max_length: int = Field(
        512, ge=8, description="tokens an example may have; what is longer is cut at the end, of format text into parts"
    )
    limit: int | None = Field(
        None, ge=1, description="train on the first N rows (of each file); rows of data.eval are all used"
    )
    packing: bool | Literal["auto"] = Field(
        "auto", description="lay the examples of a micro-batch out in one row without padding; auto: where it is sound"
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError("a share of the training rows is written as 5%")
        return value

    @model_validator(mode="after")
    def _sources(self) -> DataSection:
        for key in ("train", "eval"):
            if getattr(self, key) == [] or "" in sources_of(getattr(self, key)):
                raise ValueError(f"{key}: names nothing; remove it, or name a file")
        share = self.held_out_share
        mistyped = share is None and isinstance(self.eval, str) and self.eval.endswith("%")
        if mistyped or (share is not None and not 0 < share < 1):
            raise ValueError("eval: a share lies between 0% and 100%, as 5% or 2.5%")
        if any(_SHARE.fullmatch(source) for source in sources_of(self.train)):
            raise ValueError("train: a share is for data.eval; limit takes the first rows")
        if isinstance(self.eval, list) and any(_SHARE.fullmatch(source) for source in self.eval):
            raise ValueError("eval: either a share of the training rows or rows of their own")
        return self

    @model_validator(mode="after")
    def _known_fields(self) -> DataSection:
        if self.glue is not None and self.columns:
            raise ValueError(f"columns: format {self.format} knows its columns; use format classification for others")
        needed = FIELDS.get(self.format, ())
        known = needed + OPTIONAL_FIELDS.get(self.format, ())
        for name in self.columns:
            if name not in known:
                raise ValueError(f"columns: format {self.format} has no field '{name}'; it has: {', '.join(known)}")
        readers: dict[str, str] = {}
        for name in dict.fromkeys((*needed, *self.columns)):
            first = readers.setdefault(self.column(name), name)
            if first != name:
                raise ValueError(f"columns: '{self.column(name)}' is {first} and {name}; each field has its own column")
        if self.classifies and self.packing is True:
            raise ValueError("packing: texts that are classified are never packed; remove it")
        if self.template is not None:
            if self.format not in ("alpaca", "chat"):
                raise ValueError("template: only the formats alpaca and chat have one; remove it, or set one of these")
            if self.format == "chat" and "messages" not in self.template:
                raise ValueError("template: that of format chat is Jinja, and writes `messages`")
            before, _, after = self.template.partition("{output}")
            if self.format == "alpaca" and ("{instruction}" not in before or "{output}" not in self.template):
                raise ValueError("template: the text of one, no name: with {instruction}, and {output} after it")
            if self.format == "alpaca" and any(name in after for name in ("{instruction}", "{input}", "{output}")):
                raise ValueError("template: nothing but text may follow {output}, with which begins what is learned")
        return self

    @property
    def held_out_share(self) -> float | None:
        """The share of the training examples that is held out, where data.eval is one."""
        found = _SHARE.fullmatch(self.eval) if isinstance(self.eval, str) else None
        return float(found[1]) / 100 if found else None

    def column(self, field: str) -> str:
        """The column of a field that a row needs."""
        return self.columns.get(field, field)

    def optional_column(self, field: str) -> str | None:
        """The column of an optional field; None if that of its name is mapped to another field. A `completion` that is
        not mapped is one beside TRL's `prompt` alone: beside other messages it may be a text, or their last."""
        if field == "completion" and field not in self.columns and self.columns.get("messages") != "prompt":
            return None
        return self.columns.get(field, None if field in self.columns.values() else field)

    @property
    def chat_template(self) -> str | None:
        """The template of conversations that takes the place of the tokenizer's."""
        return self.template if self.format == "chat" else None

    @property
    def glue(self) -> str | None:
        """The GLUE task of the rows."""
        return self.format.removeprefix("glue/") if self.format.startswith("glue/") else None

    @property
    def classifies(self) -> bool:
        """Whether rows are texts with a label."""
        return self.glue is not None or self.format == "classification"


def sources_of(named: str | list[str] | None) -> list[str]:
    """The files and data sets that `data.train` or `data.eval` names."""
    return [] if named is None else [named] if isinstance(named, str) else named


def held_out_sources(section: DataSection) -> list[str]:
    """The files and data sets that hold what is held out. UsageError for a share of nothing."""
    if section.held_out_share is not None and section.train is None:
        raise UsageError(f"data.eval: {section.eval} of data.train, which names nothing", "name a file or a Hub id")
    return sources_of(section.eval if section.held_out_share is None else section.train)


def held_out_name(section: DataSection) -> str:
    """What is held out, in words."""
    if section.held_out_share is None:
        return ", ".join(sources_of(section.eval))
    return f"{section.eval} of {', '.join(sources_of(section.train))}"
