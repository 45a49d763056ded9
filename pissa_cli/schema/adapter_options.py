"""The `adapter` section of a recipe: one options class a method. Knows no torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

LEAST_ALPHA, MOST_ALPHA = 1e-6, 1e6


class Section(BaseModel):
    """A part of the recipe. Unknown keys and wrong types are errors; values never change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AdapterBase(Section):
    """What every adapter has; here for methods without alpha, whose scale is 1."""

    method: str
    rank: int | Literal["auto"] = Field(256, ge=1)
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="all-linear (every linear layer that text reaches, but the output head) or a list of name endings",
    )

    modules_to_save: list[str] = Field(
        [], description="modules that train whole beside the adapter, e.g. [embed_tokens, lm_head], by name ending"
    )

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or any(not name for name in targets):
            raise ValueError("name at least one layer, or 'all-linear'; no empty names")
        return targets

    def layer_rank(self, _name: str) -> int:
        """r of a layer."""
        return int(self.rank)

    def layer_scale(self, _name: str, _rank: int) -> float:
        """s of a layer of this rank, the factor in front of B A."""
        return 1.0


class ScaledBase(AdapterBase):
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16, description="r: columns of B, rows of A; auto: by layer, from the spectra, under a budget"
    )
    max_parameters: int | None = Field(None, ge=1, description="budget of rank auto: numbers that the factors train")
    max_error: float | None = Field(
        None, gt=0, lt=1, description="budget of rank auto, pissa in 4 bits: error of the start, a share of plain NF4's"
    )
    alpha: float | None = Field(
        None,
        ge=LEAST_ALPHA,
        le=MOST_ALPHA,
        description="scale s = alpha / rank (rslora: alpha / sqrt rank); default: s = 1",
    )
    rslora: bool = Field(False, description="rank-stabilized scale s = alpha / sqrt rank")
    rank_pattern: dict[str, int] = Field({}, description="regex on the end of a layer's name: its rank")
    alpha_pattern: dict[str, float] = Field({}, description="regex on the end of a layer's name: its alpha")

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            try:
                re.compile(_at_the_end(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"'{pattern}' is not a regular expression here: {error}") from None
            if value <= 0:
                raise ValueError(f"'{pattern}': must be above 0, found {value}")
        return patterns

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            if not LEAST_ALPHA <= value <= MOST_ALPHA:
                raise ValueError(f"'{pattern}': must be from {LEAST_ALPHA:g} to {MOST_ALPHA:g}, found {value}")
        return patterns

    @model_validator(mode="after")
    def _one_budget(self) -> ScaledBase:
        budgets = (self.max_parameters is not None) + (self.max_error is not None)
        if self.rank == "auto" and budgets != 1:
            raise ValueError("rank: auto needs one budget, max_parameters or max_error")
        if self.rank != "auto" and budgets:
            raise ValueError("max_parameters and max_error are budgets of rank: auto; set that, or remove them")
        if self.rank == "auto" and self.rank_pattern:
            raise ValueError("rank: auto chooses every rank; remove rank_pattern, or give a rank")
        return self

    @model_validator(mode="after")
    def _scale_is_used(self) -> ScaledBase:
        if self.rslora and self.alpha is None:
            raise ValueError("rslora: needs alpha (without it s = 1 whatever the rank); give alpha, e.g. the rank")
        return self

    def layer_rank(self, name: str) -> int:
        """Of the first pattern that matches the end of its name, as PEFT has it, else `rank`; 1 until it is chosen."""
        if self.rank == "auto":
            return 1
        return int(first_match(self.rank_pattern, name, self.rank))

    def layer_scale(self, name: str, rank: int) -> float:
        """alpha / r or alpha / sqrt r."""
        root = math.sqrt(rank) if self.rslora else float(rank)
        return float(first_match(self.alpha_pattern, name, self.alpha if self.alpha is not None else root) / root)


def first_match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches `name` from its start or from after a dot, to its end."""
    return next((value for key, value in patterns.items() if re.match(_at_the_end(key), name)), default)


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


class LoraOptions(ScaledBase):
    method: Literal["lora"] = "lora"
    init: Literal["A", "B"] = Field("A", description="the factor that starts random; the other starts at zero")
    distribution: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="entries of the random factor, of n columns: uniform, variance 1/(3n), as PEFT's; or normal, 1/n",
    )
    lr_ratio: float = Field(1.0, ge=1e-6, le=1e6, description="LoRA+: learning rate of B over that of A (train.lr)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")


def _accuracy(value: Any) -> str:
    text = str(value)
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if text not in ("fast", "exact") and not (percent and 0 < float(percent[1]) < 100):
        raise ValueError(f"expected fast, exact, or a share such as 1%, found '{text}'")
    return text


Accuracy = Annotated[
    str, BeforeValidator(_accuracy), WithJsonSchema({"type": "string", "pattern": r"^(fast|exact|\d+(\.\d+)?%)$"})
]


class PissaOptions(ScaledBase):
    method: Literal["pissa"] = "pissa"
    svd: Accuracy = Field("fast", description="exact, or how far above the best residual: fast is 0.1%, or e.g. 1%")
    passes: int | None = Field(None, ge=1, le=1000, description="T of QPiSSA (4 bits only); default 5")
    refit: bool = Field(
        True,
        description="4 bits: over-relaxed passes that end on an SVD, with less error; false: the paper's passes "
        "(its very algorithm together with model.absmax: largest)",
    )
    dropout: float = Field(0.0, description="must stay 0: the SVD start is exact only without dropout")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise ValueError("pissa needs dropout 0 (the start would not be the base model); remove the key")
        return dropout


class LoftqOptions(ScaledBase):
    method: Literal["loftq"] = "loftq"
    svd: Accuracy = Field("fast", description="as for pissa")
    passes: int | None = Field(None, ge=1, le=1000, description="T; default 5")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")


class VeraOptions(AdapterBase):
    method: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1, le=2**16, description="r: rows of the shared A, columns of the shared B")
    d_initial: float = Field(0.1, ge=-1e6, le=1e6, description="every entry of d at the start")
    save_projection: bool = Field(False, description="store A and B beside the seed that makes them again")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")


class SvfitOptions(AdapterBase):
    method: Literal["svfit"] = "svfit"
    rank: int = Field(256, ge=1, description="singular values trained a layer; smaller layers train all of theirs")
    svd: Accuracy = Field("fast", description="as for pissa")


class FullOptions(Section):
    method: Literal["full"] = "full"


AdapterOptions = Annotated[
    LoraOptions | PissaOptions | LoftqOptions | VeraOptions | SvfitOptions | FullOptions, Field(discriminator="method")
]

LEARNING_RATES = {"lora": 2e-4, "pissa": 2e-5, "loftq": 3e-4, "vera": 4e-3, "svfit": 1e-2, "full": 1e-5}
"""`train.lr` where the recipe gives none. PiSSA: paper, section 5; at LoRA's rate it trains worse.

LoftQ: its authors' for 7B models. VeRA: its instruction tuning, ten times LoRA's. SVFit: between VeRA's and the 5e-2
of SVFT's plain form (arXiv 2405.19597), which trains the same numbers; the paper's own is not public.
"""
