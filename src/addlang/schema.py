"""The parts of a recipe: data sets, calibration, training, phases, evaluation. ``Recipe`` itself is in recipe.py.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

ALIASES = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "sequence_len": "sequence_length",
    "cutoff_len": "sequence_length",
    "max_seq_length": "sequence_length",
    "max_length": "sequence_length",
    "block_size": "sequence_length",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "lr_scheduler": "lr_scheduler_type",
    "optim": "optimizer",
    "deepspeed": "sharding",
    "fsdp": "sharding",
    "fsdp_config": "sharding",
    "save_limit": "save_total_limit",
    "liger_kernel": "use_liger_kernel",
    "compile": "torch_compile",
    "embedding_lr": "embedding_learning_rate",
    "gradient_checkpointing": "activation_checkpointing",
    "max_steps": "tokens",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "bf16": "precision",
    "fp16": "precision",
    "overwrite_output_dir": "--overwrite",
    "train_files": "datasets",
    "data": "datasets",
}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(value: Any) -> Any:
    """``"200M"`` -> 200_000_000; also ``1.5B``, ``300k``, ``1e6`` and plain integers."""
    if isinstance(value, bool) or not isinstance(value, str | float):
        return value
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else value
    text = value.strip().replace("_", "").replace(",", "").lower()
    m = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)([kmbg]?)", text)
    if not m:
        raise ValueError(f"'{value}' is not a count; write for example 200M, 1.5B or 300k")
    return round(float(m[1]) * _UNITS[m[2]])


def parse_list(value: Any) -> Any:
    """``"a,b"`` -> ``["a", "b"]``, so that lists can be given on the command line."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(parse_count)]


class Strict(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        numbers = {Count, Count | None, int, int | None, float, float | None}
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in numbers:
            raise ValueError("must be a number, not a boolean")
        return value


class DatasetSpec(Strict):
    """One source of text or conversations."""

    path: str = Field(description="local file (jsonl, json, csv, parquet, txt; also .gz, .zst), directory, or hub id")
    name: str | None = Field(None, description="hub configuration name")
    split: str = Field("train", description="hub split")
    revision: str | None = Field(None, description="hub revision")
    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt", "openorca"] = "auto"
    text_column: str = Field("text", description="column that holds raw text")
    prompt_template: str | None = Field(
        None,
        description="makes a conversation of any columns, as in 'Parse: {query}'; together with completion_template",
    )
    completion_template: str | None = Field(None, description="its answer, as in '{parse}'")
    weight: float | None = Field(None, gt=0, description="share of the training tokens; None: in proportion to size")
    role: Literal["target", "source", "replay"] = "target"
    language: str | None = Field(
        None, description="ISO 639 code; default: the recipe's language, or en for source data"
    )
    license: str | None = Field(
        None, description="licence, quoted in the model card; a warning if it forbids commercial use"
    )
    limit: Count | None = Field(None, gt=0, description="read at most this many rows")

    @model_validator(mode="after")
    def _templates_stand_together(self) -> DatasetSpec:
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template stand together; give both")
        if self.prompt_template is not None and self.format != "auto":
            raise ValueError("templates take the place of format; leave one out")
        return self


class Calibration(Strict):
    """Source-language chat data on which importance is scored (methods: SSU section 3, appendix B)."""

    datasets: tuple[DatasetSpec, ...] = Field((), description="empty: the built-in English set")
    sequences: int = Field(500, gt=0, description="number of sequences (paper: 500)")
    sequence_length: int = Field(2048, gt=0, description="tokens; longer conversations are cut (paper: 2,048)")
    batch_size: int = Field(8, gt=0, description="sequences per forward pass")
    allow_fewer: bool = Field(False, description="score on fewer sequences than asked for, with a warning")


class TrainSettings(Strict):
    """One phase's optimisation. Defaults: Table 8 of the SSU paper."""

    tokens: Count | None = Field(
        None,
        gt=0,
        description="training budget; None: one pass over the target data, and what is mixed in by weight on top, at most the paper's 200M",
    )
    epochs: float | None = Field(
        None, gt=0, description="the budget as passes over the phase's data, in place of tokens; whole batches"
    )
    sequence_length: int = Field(512, gt=1, description="tokens per sequence")
    batch_size: int | None = Field(
        None, gt=0, description="sequences per optimizer step; None: 32, less where that leaves under 200 steps"
    )
    per_device_train_batch_size: int | None = Field(
        None, gt=0, description="sequences per forward pass; default: as many as fit"
    )
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, description="default: batch_size / (per device x devices)"
    )
    learning_rate: float = Field(5e-5, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: float = Field(0.05, ge=0, description="steps, or a fraction of all steps when below 1")
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    embedding_learning_rate: float | None = Field(
        None, gt=0, description="of the input embedding and the head; None: learning_rate"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16_sr"] = Field(
        "adamw",
        description="adamw: fused; adamw_8bit: 8-bit state; adamw_bf16_sr: bf16 weights, stochastic rounding, fp32 state",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="compute type; auto: bf16 on GPUs, fp32 on CPUs"
    )
    master_weights: Literal["fp32", "model"] = Field(
        "fp32", description="type of what is trained; 'model': the checkpoint's own"
    )
    activation_checkpointing: bool = False
    sharding: Literal["auto", "none", "ddp", "fsdp"] = Field(
        "auto", description="over the processes of torchrun; auto: none on one process, fsdp on several"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="passed to transformers; None: its default (sdpa where the model has it)")
    )
    torch_compile: bool = Field(False, description="compile each decoder layer")
    use_liger_kernel: bool = Field(False, description="fused norms, rotary embeddings and SwiGLU of liger-kernel (GPU)")
    max_loss_spike: float | None = Field(
        5.0,
        gt=1,
        description="stop where the loss exceeds this many times its running median (of at least 1 nat); None: never",
    )
    isolate_documents: bool = Field(True, description="tokens do not attend across documents packed into one sequence")
    loss_on: Literal["responses", "all"] = Field("responses", description="chat data: which tokens carry loss")
    save_steps: int = Field(500, gt=0)
    save_total_limit: int = Field(2, gt=0)
    logging_steps: int = Field(10, gt=0)
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], BeforeValidator(parse_list)
    ] = ()

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainSettings:
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("tokens and epochs both state the budget; leave one out")
        if self.optimizer == "adamw_bf16_sr" and self.master_weights != "model":
            raise ValueError("optimizer adamw_bf16_sr rounds bf16 weights, so it needs master_weights: model")
        if (
            self.attn_implementation in ("flash_attention_2", "flash_attention_3")
            and self.isolate_documents
            and self.per_device_train_batch_size != 1
        ):
            raise ValueError(
                f"{self.attn_implementation} isolates packed documents only with per_device_train_batch_size: 1 "
                "(transformers); set that, isolate_documents: false, or attn_implementation: sdpa"
            )
        return self


def _strategy(value: Any) -> Any:
    from addlang.strategies import Strategy, make_strategy

    if isinstance(value, Strategy):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError("a strategy is a name, or a mapping with 'name' and its options")
    return make_strategy(value["name"], {k: v for k, v in value.items() if k != "name"})


def _guards(value: Any) -> Any:
    from addlang.guards import Guard, make_guard

    out = []
    for item in [value] if isinstance(value, str | Mapping) else value or []:
        if isinstance(item, Guard):
            out.append(item)
            continue
        data = {"name": item} if isinstance(item, str) else dict(item)
        if "name" not in data:
            raise ValueError("a guard is a name, or a mapping with 'name' and its options")
        out.append(make_guard(data["name"], {k: v for k, v in data.items() if k != "name"}))
    names = [g.name for g in out]
    if len(set(names)) != len(names):
        raise ValueError("a guard stands twice")
    return tuple(out)


class Condition(Strict):
    """What must hold of a measurement so that a phase is run (two-phase paper, appendix D.2)."""

    metric: str = Field(
        pattern=r"^(source|target|safety)/[^/]+(/.+)?$",
        description="role/metric, or role/metric/task if there are several, as in source/exact_match/lab",
    )
    at_least: float | None = Field(None, description="the smallest value with which the phase is run")
    at_most: float | None = Field(None, description="the largest")
    relative_to: str | None = Field(
        None, description="'before' or an earlier phase: the bounds are multiples of the value of that model"
    )

    @model_validator(mode="after")
    def _has_a_bound(self) -> Condition:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least or at_most")
        return self


def _conditions(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class SelfPaced(Strict):
    """From easy to hard, by the current model's own loss (X-CIT; Kumar et al., 2010)."""

    name: Literal["self_paced"] = "self_paced"
    start: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of the units, the easiest, in the first stage; 1 in the last (guide: 0.3 to 0.5)",
    )
    pacing: Literal["linear", "geometric", "root"] = Field("linear", description="how the share grows")
    weights: Literal["hard", "linear"] = Field(
        "hard",
        description="of a unit of loss l: 1 if l < lambda; or max(0, 1 - l / lambda), by which its loss is multiplied",
    )
    update_every: int | None = Field(
        None, gt=0, description="steps per stage: then every unit's loss is measured anew; None: a tenth of the phase"
    )


def _sampler(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Replay(Strict):
    """Source-language conversations that are trained on beside a phase's data (two-phase paper, section 5.1)."""

    kind: Literal["english", "generative"] = Field(
        description="english: a sample of the datasets with their own responses (ER); generative: the model that the phase "
        "starts from answers their prompts (GR)"
    )
    datasets: tuple[DatasetSpec, ...] = Field(
        min_length=1, description="conversations; of generative replay the prompts, for which raw text does too"
    )
    share: float = Field(
        0.1, gt=0, lt=1, description="tokens, as a share of those of the phase's data (paper: 0.05, 0.1)"
    )
    mode: Literal["append", "replace"] = Field(
        "append", description="append: the phase grows by the share; replace: its budget stays and its data give way"
    )
    seed: int = Field(0, ge=0, description="which rows; not the run's seed, so that seeds share the model's answers")
    max_new_tokens: int = Field(256, gt=0, description="of an answer; one that is not finished by then is dropped")
    temperature: float = Field(0.0, ge=0, description="of answers; 0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    batch_size: int = Field(16, gt=0, description="prompts answered at a time")
    language_filter: bool = Field(True, description="drop answers that are not in the recipe's source language")


class Part(Strict):
    """One of the phases that a mixture stands for; written by ``arrangement: mixture``."""

    name: str
    datasets: int = Field(gt=0, description="how many of the mixture's datasets are its own, in order")
    tokens: Count | None = Field(None, gt=0, description="its budget")
    epochs: float | None = Field(None, gt=0, description="its budget in passes over its data")


class Phase(TrainSettings):
    """Data, what may be updated, and how it is trained."""

    name: str = Field("adapt", pattern=r"^[A-Za-z0-9_-]+$")
    datasets: tuple[DatasetSpec, ...] = Field(min_length=1)
    sampling_temperature: float = Field(
        1.0,
        ge=1,
        description="data sets without a weight get shares in proportion to tokens ** (1 / temperature); 1: to size",
    )
    language_weights: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="share of the training tokens per language; weights of data sets then hold within their language",
    )
    sample_languages: bool = Field(
        False, description="the temperature is over languages, not data sets (implied by language_weights)"
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact", description="rows left out: copies of an earlier row of the phase, or also what is nearly a copy"
    )
    near_duplicate_threshold: float = Field(
        0.8, gt=0, le=1, description="estimated share of common character windows that makes two rows nearly copies"
    )
    long_conversations: Literal["drop", "truncate"] = Field(
        "drop", description="what happens to conversations longer than sequence_length; counted in the data card"
    )
    strategy: Annotated[SerializeAsAny[Any], BeforeValidator(_strategy)] = Field(
        description="name, or mapping with name and options"
    )
    guards: Annotated[tuple[SerializeAsAny[Any], ...], BeforeValidator(_guards)] = Field(
        (),
        description="terms added to the loss: self_anchor and others; combine with any strategy, ewc and l2sp not with adapters",
    )
    execution: Literal["auto", "masked", "split", "split_assemble", "split_resident"] = "auto"
    calibration: Calibration = Calibration()
    start: Literal["previous", "source"] = Field("previous", description="weights this phase starts from")
    continue_if: Annotated[tuple[Condition, ...], BeforeValidator(_conditions)] = Field(
        (),
        description="a condition, or several that must all hold, on the model as it is before this phase; otherwise the "
        "run ends with that model as its result",
    )
    no_previous_data: bool = Field(
        False, description="no row of an earlier phase's data may be in this one's: checked row by row before training"
    )
    no_previous_weights: bool = Field(
        False, description="nothing may hold training to the weights or outputs that the phase starts from"
    )
    sampler: Annotated[SelfPaced | None, BeforeValidator(_sampler)] = Field(
        None, description="self_paced, or a mapping with its options: data from easy to hard; None: in random order"
    )
    replay: Replay | None = Field(None, description="source-language conversations to train on beside the datasets")
    parts: tuple[Part, ...] = Field(
        (), description="of a mixture: the phases it stands for; it has as many steps as they have together"
    )

    @model_validator(mode="after")
    def _keeps_its_promises(self) -> Phase:
        if self.no_previous_weights:
            holding = [p.name for p in (self.strategy, *self.all_guards) if p.needs_start]
            if holding:
                raise ValueError(
                    f"no_previous_weights: '{holding[0]}' holds training to what the phase starts from; leave it out"
                )
        if self.embedding_learning_rate and not (self.strategy.train_embeddings or self.strategy.train_lm_head):
            raise ValueError(
                "embedding_learning_rate is set, but neither the embedding nor the head is trained; leave it out, or set "
                "train_embeddings or train_lm_head in the strategy"
            )
        if twice := {g.name for g in self.guards} & {g.name for g in self.strategy.guards()}:
            name = min(twice)
            raise ValueError(
                f"strategy '{self.strategy.name}' brings the guard {name} along; give its options there, or take strategy: full"
            )
        if pulling := [g.name for g in self.all_guards if g.pulls_weights and not self.strategy.own_weights]:
            raise ValueError(
                f"the guard {pulling[0]} pulls every trained weight to its value in the source, but what strategy "
                f"'{self.strategy.name}' trains beside the model's weights has none there: it would be pulled to where it happened to "
                "start; take the guard kl or self_anchor, which hold to the source's outputs, or strategy: full"
            )
        if self.read_by_guards >= 0.9:
            who = ", ".join(f"{g.name} {g.token_share:.0%}" for g in self.all_guards if g.token_share)
            raise ValueError(
                f"guards read {self.read_by_guards:.0%} of all tokens ({who}), which leaves too little target text; "
                "lower their shares"
            )
        if self.parts and self.replay is not None:
            raise ValueError("a mixture has the data of all phases; it takes no replay")
        if self.parts and sum(part.datasets for part in self.parts) != len(self.datasets):
            raise ValueError(
                f"the parts have {sum(p.datasets for p in self.parts)} datasets, the phase {len(self.datasets)}"
            )
        return self

    @property
    def total_tokens(self) -> int | None:
        """What the recipe says that is trained on, replay included; None: it depends on the data."""
        if self.tokens is None or self.replay is None or self.replay.mode == "replace":
            return self.tokens
        return round(self.tokens * (1 + self.replay.share))

    def amounts(self) -> list[str | None]:
        """What is trained on, in words, of the phase or of each part of a mixture; None where it depends on the data."""
        out: list[str | None] = []
        rest = [spec.path for spec in self.datasets]
        for owner in self.parts or (self,):
            own, rest = (rest[: owner.datasets], rest[owner.datasets :]) if isinstance(owner, Part) else (rest, [])
            amount = (
                f"{owner.tokens:,} tokens" if owner.tokens else f"{owner.epochs:g} epochs" if owner.epochs else None
            )
            extra = f" and {self.replay.share:.0%} replay" if self.replay and self.replay.mode == "append" else ""
            out.append(amount and f"{amount} of {', '.join(own)}{extra}")
        return out

    @property
    def all_guards(self) -> tuple[Any, ...]:
        """The phase's guards and those that its strategy brings along."""
        return (*self.guards, *self.strategy.guards())

    @property
    def read_by_guards(self) -> float:
        """Share of the budget's tokens that guards read."""
        return float(sum(guard.token_share for guard in self.all_guards))


class RepliesEvaluation(Strict):
    """Language of free replies to English prompts, judged sentence by sentence."""

    prompts: str | None = Field(
        None, description="file with one prompt per row ('prompt' or 'text'); None: built-in English prompts"
    )
    limit: int | None = Field(None, gt=0)
    max_new_tokens: int = Field(128, gt=0)


Shots = Annotated[int, Field(ge=0)]


class Evaluation(Strict):
    """What is measured before and after, on the same items."""

    holdout: float = Field(
        0.02, gt=0, lt=0.5, description="share of target documents kept for evaluation, split off before training"
    )
    holdout_max: Count = Field(500, gt=0, description="at most this many held-out documents")
    holdout_seed: int = Field(
        0, ge=0, description="which documents; not the run's seed, so that seeds share their items"
    )
    source_datasets: tuple[DatasetSpec, ...] = Field(
        (), description="source-language text for bits per byte; empty: built-in English"
    )
    target_datasets: tuple[DatasetSpec, ...] = Field(
        (), description="held-out target text; empty: split off the training data"
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(parse_list)] = Field(
        (), description="'lab', 'lab-target', lm-eval task names, or paths of task YAML files"
    )
    task_roles: Mapping[str, Literal["source", "target", "safety"]] = Field(
        {}, description="role of a task; default: source"
    )
    num_fewshot: Shots | Mapping[str, Shots] | None = Field(
        None, description="examples in the prompt, of all tasks or by task; None: as the task says"
    )
    generation_kwargs: Mapping[str, Mapping[str, Any]] = Field(
        {}, description="by task: how the harness decodes, as in its task files (temperature, top_p, max_gen_toks, ...)"
    )
    limit: int | None = Field(None, gt=0, description="items per task")
    replies: RepliesEvaluation | None = RepliesEvaluation()
    batch_size: int = Field(16, gt=0)
    sequence_length: int | None = Field(None, gt=1, description="window for bits per byte; default: the phase's")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples for intervals")
    scale_back: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(parse_list)] = Field(
        (), description="also measure the source model plus these shares of the whole update: w0 + a (w - w0)"
    )

    @model_validator(mode="after")
    def _settings_of_tasks_are_of_tasks_that_are_run(self) -> Evaluation:
        shots = self.num_fewshot if isinstance(self.num_fewshot, Mapping) else {}
        for key, by_task in (("num_fewshot", shots), ("generation_kwargs", self.generation_kwargs)):
            if odd := sorted(set(by_task) - set(self.tasks)):
                raise ValueError(
                    f"{key}: '{odd[0]}' is none of the tasks ({', '.join(self.tasks) or 'there are none'})"
                )
        return self

    def shots(self, task: str) -> int | None:
        """Examples in the prompt of a task; None: as the task says."""
        return self.num_fewshot.get(task) if isinstance(self.num_fewshot, Mapping) else self.num_fewshot


def template_file(name: str | None, base_dir: Path | None) -> Path | None:
    """File of a chat template: a built-in one, or one beside the recipe."""
    from addlang.data.builtin_sets import builtin_template

    return None if name is None else builtin_template(name) or beside(name, base_dir)


def beside(path: str, base_dir: Path | None) -> Path:
    """A path of the recipe, relative to the recipe's directory."""
    return (base_dir or Path()) / Path(path).expanduser()
