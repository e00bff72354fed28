"""The recipe language on one page: every section, key, type, range and default.

The models are frozen, strict and closed: an unknown key is an error. The `adapter` section is
validated by the chosen method's own settings, which the reader is handed, so this file knows no
method but the default's name. A path stays as the user wrote it; `Recipe.origin` says which
folder it is relative to.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorakit.errors import Place
from lorakit.recipe.bounds import read_bound
from lorakit.recipe.origin import Origin

DEFAULT_METHOD = "lora"
SHORTEST_ROW = 8  # tokens that `data.max_length` allows at least

Metric = Literal["loss", "perplexity", "token_accuracy", "exact_match", "json_valid", "stop_rate"]
GENERATED = frozenset({"exact_match", "json_valid", "stop_rate"})  # what needs answers
Optimizer = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "sgd",
    "adafactor",
]
BaseWeights = Literal["original", "dequantised"]
Normalization = Literal["strip", "casefold", "punctuation", "number", "json"]


def _as_sources(value: Any) -> Any:
    """Turn a path, a source or a list of either into a tuple of sources."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


def _as_held_out(value: Any) -> Any:
    """Keep a fraction as it is; everything else names sources."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+%?", value):
        sentence = f"expected a number in (0, 1) or a path, got the text '{value[:20]}'"
        raise fault("recipe.wrong-type", sentence, help="write 0.05, without quotes")
    is_fraction = isinstance(value, int | float) or value is None
    return value if is_fraction else _as_sources(value)


def _as_model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def fault(id: LiteralString, sentence: str, *below: str, help: str = "") -> PydanticCustomError:
    """Make the error that a validator raises: an id, a sentence, and what to do about it.

    `below` are the keys under the validated value that lead to the place at fault.
    """
    context = {"sentence": sentence, "below": below, "help": help}
    return PydanticCustomError(id, "{sentence}", context)


_Text = Annotated[str, Field(min_length=1)]
# Strict models refuse a list where a tuple is kept; YAML has nothing but lists.
FromList = Strict(False)
Names = Annotated[tuple[str, ...], FromList]


class Section(BaseModel):
    """One block of a recipe."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """The base model, and how it is held in memory. The short form is `model: PATH`."""

    path: str = Field(min_length=1, description="hub id, local folder, or a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="how the frozen weights of the decoder's layers are held; see `dtype`"
    )
    double_quant: bool = Field(
        True,
        description="of nf4 and fp4: hold the scales in 8 bits, which saves 0.37 bits a weight",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where that is fast, else fp16 on a GPU, fp32 on a CPU"
    )
    attention: Literal["auto", "sdpa", "flash", "eager"] = Field(
        "auto", description="attention kernel; auto: packed attention without a mask where possible"
    )
    trust_remote_code: bool = Field(
        False, description="run the model's own code; needs --allow-remote-code as well"
    )


class Adapter(Section):
    """What is trained: `method` names a file in `lorakit/adapters/`, which has the other keys."""

    method: str = Field(DEFAULT_METHOD, description="see `lorakit methods`")


class Source(Section):
    """Rows to read. The short form is a path or a hub id."""

    path: str = Field(
        min_length=1, description="a .jsonl, .json, .csv or .parquet file, or a hub id"
    )
    subset: str | None = Field(None, description="configuration of a hub data set, such as main")
    split: str | None = Field(None, description="split of a hub data set, written like train[:100]")
    format: str | None = Field(None, description="as data.format, for this source alone")
    columns: dict[str, str] = Field(
        default_factory=dict, description="field of the format: column of the file"
    )
    weight: float = Field(1.0, gt=0, description="repeats per epoch; 0.5 takes half of the rows")
    max_samples: int | None = Field(None, ge=1, le=10**15, description="take only this many rows")


# What a user may write for sources; the recipe always holds a tuple of them.
_Written = _Text | Source | Annotated[list[_Text | Source], Field(min_length=1)]
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_Several = Annotated[tuple[Source, ...], Field(min_length=1)]

Sources = Annotated[_Several, BeforeValidator(_as_sources, json_schema_input_type=_Written)]
HeldOut = Annotated[
    _Fraction | _Several | None,
    BeforeValidator(_as_held_out, json_schema_input_type=_Fraction | _Written | None),
]


class Data(Section):
    """What to learn from: rows, their format, the template and the loss mask."""

    train: Sources = Field(description="path, hub id, source, or a list of them")
    eval: HeldOut = Field(None, description="a fraction of train, or a path, source or list")
    format: str = Field(
        "auto",
        description="auto, messages, prompt_completion, alpaca, sharegpt, text, or module:function",
    )
    chat_template: str = Field(
        "auto", description="auto: the tokenizer's own; else a name or a .jinja file"
    )
    system: str | None = Field(None, description="system message for rows that have none")
    train_on: Literal["completions", "last", "all"] = Field(
        "completions", description="which tokens count: every answer, the last answer, or all"
    )
    max_length: Literal["auto"] | Annotated[int, Field(ge=SHORTEST_ROW)] = Field(
        "auto", description="longest row in tokens; auto: 2,048, or the model's positions if fewer"
    )
    too_long: Literal["auto", "drop", "truncate", "error"] = Field(
        "auto", description="longer rows, always counted; auto: drop, but error above a tenth"
    )
    packing: bool | Literal["dense", "auto"] = Field(
        "auto",
        description="true: the rows of a step, packed without seeing each other; "
        "dense: best fit over the data set, train.batch_size counts packs; false: padded; "
        "auto: true where the model and the method can",
    )


class Skip(Section):
    """Leave out this many non-finite steps before stopping."""

    skip: int = Field(ge=1, description="optimizer steps")


class Train(Section):
    """The loop: how long, how fast, how often it looks and saves."""

    epochs: float = Field(
        1.0,
        gt=0,
        le=1_000_000,
        description="passes over the data; the smaller of this and max_steps stops",
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch_size: int = Field(
        16, ge=1, description="sequences per optimizer step over all devices and micro-batches"
    )
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="sequences per forward pass; auto: as many tokens as fit, up to 8,192"
    )
    learning_rate: float = Field(2e-4, gt=0, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="after warm-up; wsd: constant, then down over the last fifth"
    )
    warmup: float = Field(0.03, ge=0, description="below 1 a fraction of the steps, else steps")
    optimizer: Optimizer = Field(
        "adamw",
        description="8bit: states in 8 bits; paged: states that leave a full GPU for the host; "
        "lion wants a third to a tenth of the rate; sgd has no states",
    )
    strict_optimizer: bool = Field(
        False, description="refuse an optimizer that this device lacks, instead of the nearest one"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled; not on biases and norms")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    gradient_checkpointing: bool | Literal["auto", "offload"] = Field(
        "auto",
        description="recompute layers in the backward pass; auto: as few as memory asks; "
        "offload: all, their inputs wait in host memory",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="make one kernel of the operations between matrix products, in models unlike "
        "Llama of the loss's alone; auto: in models like Llama, on a GPU, and on a CPU in long "
        "runs that are not in fp32",
    )
    deterministic: bool = Field(False, description="bit-equal runs on CUDA too, slower")
    on_oom: Literal["stop", "halve"] = Field(
        "stop",
        description="memory runs out: stop, or take the step again in micro-batches half as large",
    )
    on_non_finite: Literal["stop"] | Skip = Field(
        "stop", description="a loss or gradient that is not finite: stop, or {skip: N} steps"
    )
    log_every: int = Field(10, ge=1, description="steps")
    eval_every: Literal["epoch"] | Annotated[int, Field(ge=1)] = Field(
        "epoch", description="steps, or epoch"
    )
    save_every: Literal["epoch"] | Annotated[int, Field(ge=1)] = Field(
        "epoch", description="steps, or epoch"
    )
    keep_checkpoints: int = Field(2, ge=2, description="the newest; the best is kept besides")

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Self:
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > self.batch_size:
            raise fault(
                "recipe.conflict",
                f"{self.micro_batch_size} sequences per forward pass are more than the "
                f"{self.batch_size} of train.batch_size",
                "micro_batch_size",
            )
        return self


class Generate(Section):
    """How answers are generated for the metrics that need them."""

    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")


class Gate(Section):
    """A bound on one metric: a number, or `base` or `baseline` with +, -, * and %."""

    min: float | str | None = Field(None, description="at least this")
    max: float | str | None = Field(None, description="at most this")
    confidence: float | None = Field(
        None, gt=0.5, lt=1, description="the bound must hold at this one-sided confidence"
    )

    @field_validator("min", "max")
    @classmethod
    def _is_bound(cls, bound: float | str | None) -> float | str | None:
        try:
            if bound is not None:
                read_bound(bound)
        except ValueError as error:
            raise fault("recipe.conflict", str(error)) from None
        return bound

    @model_validator(mode="after")
    def _binds(self) -> Self:
        low, high = self.min, self.max
        if low is None and high is None:
            raise fault("recipe.conflict", "a gate needs min or max")
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise fault("recipe.conflict", f"nothing is at least {low:g} and at most {high:g}")
        return self


class Eval(Section):
    """Metrics of the adapter and of the base, and the gates that decide the exit code."""

    data: Sources | None = Field(None, description="a path, source or list; else data.eval")
    metrics: Annotated[tuple[Metric, ...], FromList] = Field(
        ("loss", "perplexity"), min_length=1, description="what is computed"
    )
    normalize: Annotated[tuple[Normalization, ...], FromList] = Field(
        ("strip",),
        description="before exact_match compares; number: the last number, json: parsed values",
    )
    generate: Generate = Field(Generate(), description="how answers are generated")
    gates: dict[Metric, Gate] = Field(
        default_factory=dict, description="metric: its bounds; a missed one ends in exit code 1"
    )

    @model_validator(mode="after")
    def _gates_have_metrics(self) -> Self:
        for metric in self.gates:
            if metric not in self.metrics:
                raise fault(
                    "recipe.conflict",
                    "a gate on a metric that is not computed",
                    "gates",
                    metric,
                    help=f"add {metric} to eval.metrics",
                )
        return self


class Merge(Section):
    """The merged model, written after training when enabled."""

    enabled: bool = Field(False, description="write the merged model")
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = Field(
        "keep", description="keep: the base's own"
    )
    base_weights: BaseWeights = Field(
        "original",
        description="of a base that training holds in 4 or 8 bits: those that this is made from, "
        "or its own, dequantised; the loss of both is measured where there are eval rows",
    )
    measure: bool = Field(True, description="of such a base: the losses before and after")
    out: str = Field("{output_dir}/merged", min_length=1, description="folder of the merged model")


class Recipe(Section):
    """A whole run, defaults filled in."""

    model: Annotated[Model, BeforeValidator(_as_model, json_schema_input_type=_Text | Model)] = (
        Field(description="the base model; a text is its path")
    )
    task: Literal["causal-lm"] = Field("causal-lm", description="what the model is trained to do")
    adapter: SerializeAsAny[Adapter] = Field(Adapter(), description="what is trained")
    data: Data = Field(description="what it learns from")
    train: Train = Field(Train(), description="the loop")
    eval: Eval = Field(Eval(), description="metrics and gates")
    merge: Merge = Field(Merge(), description="the merged model")
    output_dir: str = Field(
        "runs/{name}",
        min_length=1,
        description="folder of the run, relative to the working folder; "
        "{name} is the recipe's file name, {date} and {seed} work too",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="of initial values, order and dropout")

    _origin: Origin = PrivateAttr(default_factory=lambda: Origin(Path("recipe.yaml"), b""))

    @property
    def origin(self) -> Origin:
        return self._origin

    def place_of(self, message: str) -> Place | None:
        """Return where the first key stands that a message names, None when it names none."""
        for section, key in re.findall(r"\b([a-z]+)\.([a-z_]+)", message):
            part = getattr(self, section, None)
            if isinstance(part, Section) and key in type(part).model_fields:
                return self.origin.place(section, key)
        return None

    @property
    def run_folder(self) -> Path:
        """The run's folder, relative to the working folder."""
        return Path(self.output_dir)
