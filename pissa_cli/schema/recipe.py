"""The recipe: one strict schema for all commands. Knows no torch, nor where a value was written (`recipe_file`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pissa_cli.schema.adapter_options import (
    LEARNING_RATES,
    AdapterOptions,
    FullOptions,
    LoftqOptions,
    PissaOptions,
    ScaledBase,
    Section,
)
from pissa_cli.schema.data_options import DataSection
from pissa_cli.schema.glue import GLUE

_RATES = ", ".join(f"{method} {lr:g}" for method, lr in LEARNING_RATES.items())


class ModelSection(Section):
    name: str = Field(min_length=1, description="alias (a file in configs/model), Hub id, or local folder")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    bits: Literal[4, 16, 32] = Field(16, description="how frozen weights are stored: 4 = NF4, 16 = bf16, 32 = fp32")
    double_quant: bool = Field(False, description="quantize the NF4 block scales as well (0.37 bits a weight less)")
    absmax: Literal["fitted", "largest"] = Field(
        "fitted", description="NF4 block scales: fitted for the least squared error, or bitsandbytes' and the papers'"
    )
    task: Literal["causal-lm", "sequence-classification"] = Field(
        "causal-lm", description="what the model is trained for; a classifier gets a new head, which trains whole"
    )
    labels: list[str] = Field(
        [],
        description="classes in the order of their numbers; one name: a quantity",
        json_schema_extra={"items": {"type": ["string", "number", "boolean"]}},
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, labels: Any) -> Any:
        """Numbers, true and false are names of classes as they are written."""
        if not isinstance(labels, list):
            return labels
        return [json.dumps(label) if isinstance(label, int | float) else label for label in labels]

    @model_validator(mode="after")
    def _a_folder_has_no_revision(self) -> ModelSection:
        if self.revision is not None and Path(self.name).is_absolute():
            raise ValueError(f"revision: {self.name} is a folder; remove it, or --set model.revision=null")
        return self


class TrainSection(Section):
    lr: float | None = Field(None, ge=1e-12, le=100, description=f"peak learning rate; default by method: {_RATES}")
    head_lr: float | None = Field(
        None,
        ge=1e-12,
        le=100,
        description="peak learning rate of a classifier's head and adapter.modules_to_save; default: lr",
    )
    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the data; default 1")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(32, ge=1, description="examples in one optimizer step, over all processes")
    micro_batch_size: int = Field(8, ge=1, description="examples in one forward pass on one device")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup: float = Field(0.03, ge=0, description="share of all steps if below 1, else a number of steps")
    weight_decay: float = Field(0.0, ge=0, le=1000, description="of AdamW, on what trains")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    optimizer: Literal["adamw", "paged-adamw-8bit"] = Field("adamw", description="the latter from bitsandbytes")
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="dtype of the matrix products; default fp32 if model.bits is 32, else bf16"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    eval_every: int | None = Field(None, ge=1, description="steps between losses on data.eval; default: at the end")
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; default: every 10 minutes; there is one at the end, too"
    )
    keep: int = Field(
        2, ge=1, description="checkpoints kept, the newest; that with the lowest held-out loss stays, too (not of full)"
    )
    spike: float | None = Field(
        None, gt=1, description="a loss or gradient norm this many times the median of 50 steps is a fault, too"
    )
    on_fault: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="after infinite numbers: stop, leave the step out, or go back to the last checkpoint of save_every",
    )
    torch_compile: bool = Field(
        False, description="compile the model's blocks when they first run: for GPUs; not with gradient_checkpointing"
    )
    use_liger_kernel: bool | Literal["auto"] = Field(
        "auto",
        description="Liger's kernels for norms, rotary embeddings and MLPs, on a GPU; auto: where they are there",
    )
    shard: bool = Field(False, description="spread the model over the processes (FSDP2), instead of a copy in each")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs: give epochs or steps, not both")
        if self.on_fault == "rollback" and self.save_every is None:
            raise ValueError("on_fault: rollback goes back to a checkpoint; set train.save_every")
        if self.torch_compile and self.gradient_checkpointing:
            raise ValueError("torch_compile: not together with gradient_checkpointing; set one of them to false")
        if self.shard and self.optimizer != "adamw":
            raise ValueError("shard: bitsandbytes' optimizer cannot be spread over processes; set optimizer to adamw")
        return self


class EvalSection(Section):
    bench: list[str] = Field(
        [], description="benchmarks: gsm8k, math, humaneval, mbpp, mt_bench, glue/<task>, loss, lm_eval:<task>"
    )
    data: dict[str, str] = Field({}, description="bench: file, instead of the published data on the Hub")
    limit: int | None = Field(None, ge=1, description="score the first N questions")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what writes the answers; vllm serves merged/ (extra vllm)"
    )
    batch_size: int | None = Field(None, ge=1, description="prompts generated together; default: as many as fit")
    max_new_tokens: int = Field(1024, ge=1, description="longest answer")
    samples: int = Field(
        1, ge=1, description="answers to each question, for pass@k (not of mt_bench); needs a temperature"
    )
    temperature: float = Field(0.0, ge=0, le=100, description="0: the likeliest tokens; else sampled, top_p 0.95")
    stop: list[str] = Field([], description="texts that end an answer, beside end-of-text")
    judge_url: str | None = Field(None, description="mt_bench: a server of OpenAI's chat completions, up to /v1")
    judge_model: str | None = Field(None, description="mt_bench: the model that judges; its key in PISSA_JUDGE_KEY")

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("an empty text ends every answer before it begins; remove it")
        return stop

    @model_validator(mode="after")
    def _sampled(self) -> EvalSection:
        if 0 < self.temperature < 0.01:
            raise ValueError("temperature: 0 for the likeliest tokens, else at least 0.01")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples: more than one answer to a question needs eval.temperature, e.g. 0.8")
        return self


class HubSection(Section):
    repo: str | None = Field(None, description="user/name to push to; default <user>/<base>-<method>-r<rank>")
    private: bool = Field(False, description="make a new repository private, and refuse a public one")

    @field_validator("repo")
    @classmethod
    def _a_name_on_the_hub(cls, repo: str | None) -> str | None:
        if repo is not None:
            from huggingface_hub.utils._validators import validate_repo_id

            validate_repo_id(repo)
        return repo


class Recipe(Section):
    """Everything a run needs. `pissa_cli.schema.recipe_file.load` makes one from files and flags."""

    model: ModelSection
    adapter: AdapterOptions = Field(default_factory=PissaOptions)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    hub: HubSection = Field(default_factory=HubSection)
    output: str = Field("out", min_length=1, description="the run folder")
    seed: int = Field(42, ge=0, lt=2**63, description="of everything random")

    @model_validator(mode="before")
    @classmethod
    def _labels_of_glue(cls, tree: Any) -> Any:
        """A GLUE format says what the classes are."""
        data, model = (tree.get(key) for key in ("data", "model")) if isinstance(tree, dict) else (None, None)
        if not isinstance(data, dict) or not isinstance(model, dict) or model.get("labels"):
            return tree
        task = GLUE.get(str(data.get("format")).removeprefix("glue/"))
        return tree if task is None else {**tree, "model": {**model, "labels": list(task.labels)}}

    @model_validator(mode="after")
    def _task(self) -> Recipe:
        model, data = self.model, self.data
        if model.task == "causal-lm":
            if data.classifies:
                raise ValueError(f"data.format {data.format} needs model.task sequence-classification; set it")
            if model.labels:
                raise ValueError("model.labels are the classes of model.task sequence-classification; remove them")
            return self
        if not data.classifies:
            raise ValueError(
                f"model.task sequence-classification needs data.format classification or glue/<task>, not {data.format}"
            )
        if not model.labels or len(set(model.labels)) < len(model.labels):
            raise ValueError(
                "model.labels: name every class once, in the order of their numbers, e.g. [negative, positive]; "
                "one name for a quantity"
            )
        if data.glue is not None and len(model.labels) != len(GLUE[data.glue].labels):
            raise ValueError(f"model.labels: {data.format} has {', '.join(GLUE[data.glue].labels)}; remove the key")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        adapter, bits = self.adapter, self.model.bits
        if isinstance(adapter, FullOptions) and bits != 32:
            raise ValueError(
                "adapter.method full needs model.bits 32: small steps are lost in the rounding of 16-bit weights "
                "(train.precision bf16 still computes the products in 16 bits)"
            )
        if isinstance(adapter, LoftqOptions) and bits != 4:
            raise ValueError(
                "adapter.method loftq makes up for 4-bit rounding, of which there is none here: both factors would be "
                "zero and never train; set model.bits to 4, or adapter.method to pissa or lora"
            )
        if isinstance(adapter, PissaOptions) and adapter.passes is not None and adapter.passes > 1 and bits != 4:
            raise ValueError("adapter.passes is about 4-bit rounding: set model.bits to 4, or remove it")
        if isinstance(adapter, ScaledBase) and adapter.max_error is not None:
            if bits != 4:
                raise ValueError("adapter.max_error is about 4-bit error: set model.bits to 4, or use max_parameters")
            if not isinstance(adapter, PissaOptions):
                raise ValueError("adapter.max_error is for pissa, whose ranks lower it; use max_parameters")
        if isinstance(adapter, PissaOptions) and not adapter.refit and bits != 4:
            raise ValueError("adapter.refit is about 4-bit error: set model.bits to 4, or remove it")
        if self.model.double_quant and bits != 4:
            raise ValueError("model.double_quant needs model.bits 4; set it, or remove the key")
        has_head = self.model.task != "causal-lm" or bool(getattr(adapter, "modules_to_save", []))
        if self.train.head_lr is not None and isinstance(adapter, FullOptions):
            raise ValueError("train.head_lr: full fine-tuning has one rate for everything, train.lr; remove it")
        if self.train.head_lr is not None and not has_head:
            raise ValueError("train.head_lr is the rate of adapter.modules_to_save, which is empty; remove it")
        if self.model.absmax == "largest" and bits != 4:
            raise ValueError("model.absmax needs model.bits 4; set it, or remove the key")
        if self.train.precision == "fp32" and bits == 16:
            raise ValueError("train.precision fp32 over 16-bit weights: set model.bits to 32, or precision to bf16")
        return self

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """The dtype of the products: as written, else fp32 over 32-bit weights and bf16 over the rest."""
        return self.train.precision or ("fp32" if self.model.bits == 32 else "bf16")

    @property
    def autocasts(self) -> bool:
        """Whether products are in bf16 over weights in fp32."""
        return self.model.bits == 32 and self.precision == "bf16"

    def with_model(self, **values: Any) -> Recipe:
        """The same with other values in the section `model`, unchecked; the dtype of the products stays."""
        train = self.train.model_copy(update={"precision": self.precision})
        return self.model_copy(update={"model": self.model.model_copy(update=values), "train": train})

    @property
    def dense(self) -> Recipe:
        """The same over dense weights in the dtype of the products: how exported models are compared."""
        return self.with_model(bits=32 if self.precision == "fp32" else 16)

    @property
    def lr(self) -> float:
        """Peak learning rate: as written, else the method's default."""
        return self.train.lr if self.train.lr is not None else LEARNING_RATES[self.adapter.method]

    @property
    def doubles_rank(self) -> bool:
        """Whether `adapter/` has twice the trained rank: of PiSSA, made valid on the plain base (PiSSA, appendix C)."""
        return self.adapter.method == "pissa" and self.model.bits != 4

    @property
    def passes(self) -> int:
        """T, the number of split-and-quantize passes: 1 but for QPiSSA and LoftQ."""
        if not isinstance(self.adapter, PissaOptions | LoftqOptions) or self.model.bits != 4:
            return 1
        return self.adapter.passes or 5


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. `use` and the model's name in a block make both optional there."""
    schema = Recipe.model_json_schema()
    schema["title"] = "pissa recipe"
    schema["properties"]["use"] = {
        "type": "object",
        "description": "section: name of a block in configs/<section>",
        "additionalProperties": {"type": "string"},
    }
    schema.pop("required", None)
    return schema
