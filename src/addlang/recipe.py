"""The recipe: one strict YAML file that says everything about a run. The only schema.

Loading collects *all* errors at once, each with its key and, for unknown names, the nearest known one. Importing this
module loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from addlang import strictyaml
from addlang.errors import AddlangError, did_you_mean

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
    "num_train_epochs": "tokens",
    "bf16": "precision",
    "fp16": "precision",
    "overwrite_output_dir": "--overwrite",
    "train_files": "datasets",
    "data": "datasets",
}

RESERVED = {"before", "after"}
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
    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"] = "auto"
    text_column: str = Field("text", description="column that holds raw text")
    weight: float | None = Field(None, gt=0, description="share of the training tokens; None: in proportion to size")
    role: Literal["target", "source", "replay"] = "target"
    language: str | None = Field(
        None, description="ISO 639 code; default: the recipe's language, or en for source data"
    )
    license: str | None = Field(None, description="licence, quoted in the model card")
    limit: Count | None = Field(None, gt=0, description="read at most this many rows")


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
        None, gt=0, description="training budget; None: one pass over the target data, at most the paper's 200M"
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


class Phase(TrainSettings):
    """Data, what may be updated, and how it is trained."""

    name: str = Field("adapt", pattern=r"^[A-Za-z0-9_-]+$")
    datasets: tuple[DatasetSpec, ...] = Field(min_length=1)
    strategy: Annotated[SerializeAsAny[Any], BeforeValidator(_strategy)] = Field(
        description="name, or mapping with name and options"
    )
    guards: Annotated[tuple[SerializeAsAny[Any], ...], BeforeValidator(_guards)] = Field(
        (), description="terms added to the loss: self_anchor and others; combine with any strategy"
    )
    execution: Literal["auto", "masked", "split", "split_assemble", "split_resident"] = "auto"
    calibration: Calibration = Calibration()

    @property
    def all_guards(self) -> tuple[Any, ...]:
        """The phase's guards and those that its strategy brings along."""
        own = {g.name for g in self.guards}
        return (*self.guards, *(g for g in self.strategy.guards() if g.name not in own))

    start: Literal["previous", "source"] = Field("previous", description="weights this phase starts from")


class RepliesEvaluation(Strict):
    """Language of free replies to English prompts, judged sentence by sentence."""

    prompts: str | None = Field(
        None, description="file with one prompt per row ('prompt' or 'text'); None: built-in English prompts"
    )
    limit: int | None = Field(None, gt=0)
    max_new_tokens: int = Field(128, gt=0)


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
    num_fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, gt=0, description="items per task")
    replies: RepliesEvaluation | None = RepliesEvaluation()
    batch_size: int = Field(16, gt=0)
    sequence_length: int | None = Field(None, gt=1, description="window for bits per byte; default: the phase's")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples for intervals")


class Recipe(Strict):
    """A whole run. A file without ``phases`` is one phase: its keys stand at the top level."""

    model_name_or_path: str = Field(description="hub id, local directory, or 'lab'")
    revision: str | None = None
    output_dir: str
    language: str = Field(description="target language, ISO 639 code such as ig")
    source_language: str = "en"
    seed: int = Field(0, ge=0)
    phases: tuple[Phase, ...] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    chat_template: str | None = Field(None, description="Jinja file, for a model that has no chat template")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(True, description="deterministic kernels, so that a resumed run is bit-identical")
    trust_remote_code: Literal[False] = Field(False, description="remote code is never run")

    @model_validator(mode="after")
    def _phases_are_consistent(self) -> Recipe:
        names = [p.name for p in self.phases]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"phase names must differ; '{twice[0]}' stands twice")
        if taken := sorted(RESERVED & set(names)):
            raise ValueError(f"a phase cannot be named '{taken[0]}': results use that name")
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default filled in, as written to ``recipe.yaml``."""
        data = self.model_dump(mode="json")
        for phase, live in zip(data["phases"], self.phases, strict=True):
            phase["strategy"] = {"name": live.strategy.name, **live.strategy.model_dump(mode="json")}
            phase["guards"] = [{"name": g.name, **g.model_dump(mode="json")} for g in live.guards]
        return data

    def template_path(self, base_dir: Path | None) -> Path | None:
        """The chat template's file."""
        return None if self.chat_template is None else beside(self.chat_template, base_dir)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the result (not of where it is written or how often it is saved)."""
        data = self.resolved()
        data.pop("output_dir")
        for phase in data["phases"]:
            for key in ("save_steps", "save_total_limit", "logging_steps", "report_to", "max_loss_spike", "sharding"):
                phase.pop(key)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
        """Read a YAML recipe.

        Args:
            path: the file.
            overrides: ``(dotted key, value)`` pairs that replace values of the file, e.g. ``("strategy.ratio", 0.4)``.

        Raises:
            AddlangError: every problem of the file at once, each with its key.
        """
        path = Path(path)
        try:
            data = strictyaml.read(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise AddlangError(
                f"recipe '{path}' does not exist", did_you_mean(path.name, near) if near else "check the path"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise AddlangError(f"recipe '{path}' cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise AddlangError(f"recipe '{path}' is no valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise AddlangError(f"recipe '{path}' must be a mapping of keys to values")
        for key, value in overrides:
            _set(data, key, value)
        return cls.parse(data, where=str(path), files=True, base_dir=path.resolve().parent)

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        where: str = "recipe",
        *,
        files: bool = False,
        base_dir: Path | None = None,
        problems: Sequence[str] = (),
    ) -> Recipe:
        """Validate plain data; see :meth:`load`.

        Args:
            where: what the data came from, for messages.
            files: also check that every local file it names exists.
            base_dir: directory against which relative paths are resolved; None: the working directory.
            problems: found already; reported with those found here.
        """
        data = dict(data)
        flat = "phases" not in data
        if flat:
            phase = {k: data.pop(k) for k in list(data) if k in Phase.model_fields and k not in cls.model_fields}
            data["phases"] = [phase]
        problems = [*problems, *_conflicts(data, flat), *(_missing_files(data, flat, base_dir) if files else ())]
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            problems = [*_explain(error, flat), *problems]
        if problems:
            raise AddlangError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        return recipe


def _conflicts(data: Mapping[str, Any], flat: bool) -> Iterator[str]:
    """Batch sizes that contradict each other, in every phase; from raw data, so that other errors do not hide them."""
    phases = data["phases"]
    for i, phase in enumerate(phases if isinstance(phases, list | tuple) else ()):
        if not isinstance(phase, Mapping):
            continue
        keys = ("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        batch, micro, steps = (v if type(v := phase.get(k)) is int and v > 0 else None for k in keys)
        place = "" if flat else f"phases.{i}."
        if batch and micro and steps and batch != micro * steps:
            yield (
                f"{place}batch_size: {batch} is not per_device_train_batch_size {micro} x gradient_accumulation_steps {steps}; "
                "leave one of the three out"
            )
        elif batch and not (micro and steps) and (part := micro or steps) and batch % part:
            key = keys[1] if micro else keys[2]
            yield f"{place}{key}: batch_size {batch} is not divisible by {part}"


def _missing_files(data: Mapping[str, Any], flat: bool, base_dir: Path | None) -> Iterator[str]:
    """Local files that the recipe names and that do not exist."""
    from addlang.data.sources import read_rows
    from addlang.evaluate.lm_eval import file_of

    def problem(key: str, check: Any) -> Iterator[str]:
        key = key.removeprefix("phases.0.") if flat else key
        try:
            check()
        except AddlangError as error:
            yield f"{key}: {error.message}" + (f" ({error.fix})" if error.fix else "")

    for key, path in _named_paths(data):
        spec = DatasetSpec.model_validate({"path": path})
        yield from problem(key, lambda spec=spec: read_rows(spec, base_dir=base_dir))
    evaluation = data.get("evaluation")
    tasks = parse_list(evaluation.get("tasks")) if isinstance(evaluation, Mapping) else None
    for i, task in enumerate(tasks if isinstance(tasks, list | tuple) else ()):
        if isinstance(task, str):
            yield from problem(f"evaluation.tasks.{i}", lambda task=task: file_of(task, base_dir))
    template = data.get("chat_template")
    if isinstance(template, str) and not beside(template, base_dir).is_file():
        yield f"chat_template: {beside(template, base_dir)}: the file does not exist (check the path)"


def _named_paths(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of every data set and of the prompts."""
    if isinstance(node, list | tuple):
        for i, item in enumerate(node):
            yield from _named_paths(item, f"{prefix}{i}.")
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("path", "prompts") and isinstance(value, str):
                yield f"{prefix}{key}", value
            elif key != "strategy":
                yield from _named_paths(value, f"{prefix}{key}.")


def beside(path: str, base_dir: Path | None) -> Path:
    """A path of the recipe, relative to the recipe's directory."""
    return (base_dir or Path()) / Path(path).expanduser()


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a bare strategy name becomes a mapping so that its options can be set."""
    *parents, last = key.replace("-", "_").split(".")
    node: Any = data
    first = (parents or [last])[0]
    if isinstance(data.get("phases"), list) and first not in Recipe.model_fields:
        if first not in Phase.model_fields:
            known = {*Recipe.model_fields, *Phase.model_fields}
            raise AddlangError(f"unknown key --{key}", _hint(first, known))
        if len(data["phases"]) != 1:
            raise AddlangError(f"--{key}: the recipe has {len(data['phases'])} phases", f"write --phases.0.{key}")
        node = data["phases"][0]
    for i, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise AddlangError(f"--{key}: '{'.'.join(parents[: i + 1])}' is no item of a list of {len(node)}")
            node = node[int(part)]
            continue
        if part == "strategy" and isinstance(node.get(part), str):
            node[part] = {"name": node[part]}
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise AddlangError(f"--{key}: '{part}' is a plain value, not a mapping")
    if last == "strategy" and isinstance(value, str) and isinstance(node, dict) and isinstance(node.get(last), dict):
        value = {"name": value}
    if isinstance(node, list):
        raise AddlangError(f"--{key}: name an item and one of its keys, for example --{'.'.join(parents)}.0.{last}")
    node[last] = value


_MODELS: dict[str, type[BaseModel]] = {
    "datasets": DatasetSpec,
    "source_datasets": DatasetSpec,
    "target_datasets": DatasetSpec,
    "calibration": Calibration,
    "evaluation": Evaluation,
    "replies": RepliesEvaluation,
    "phases": Phase,
}


def _hint(key: str, known: set[str]) -> str:
    alias = ALIASES.get(key)
    return f"addlang calls it '{alias}'" if alias else did_you_mean(key, known)


def _explain(error: ValidationError, flat: bool) -> list[str]:
    """One line per problem: key, what is wrong, the remedy."""
    lines = []
    found = error.errors()
    for e in found:
        loc = list(e["loc"])
        if e["type"] == "too_short" and any(o["loc"][: len(loc)] == tuple(loc) for o in found if o is not e):
            continue  # its items are there, but have errors of their own
        if flat and loc[:2] == ["phases", 0]:
            loc = loc[2:]
        key = ".".join(str(p) for p in loc) or "(whole recipe)"
        if e["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key. {_meant(list(e['loc']), flat)}")
        elif e["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            message = e["msg"].removeprefix("Value error, ")
            given = e.get("input")
            shown = (
                f" (given: {given!r})"
                if isinstance(given, str | int | float | bool) and repr(given) not in message
                else ""
            )
            lines.append(f"{key}: {message}{shown}")
    return lines


def _meant(loc: list[Any], flat: bool) -> str:
    """What the user may have meant by an unknown key."""
    *parents, last = [p for p in loc if isinstance(p, str)]
    model = _MODELS.get(parents[-1], Recipe) if parents else Recipe
    known = set(model.model_fields)
    if model is Recipe and flat:
        known |= set(Phase.model_fields) - {"name"}
        known -= {"phases"}
    elsewhere = (
        (Recipe, "the top level"),
        (Phase, "a phase"),
        (Evaluation, "'evaluation'"),
        (Calibration, "'calibration'"),
    )
    if places := [place for other, place in elsewhere if last in other.model_fields and last not in known]:
        return f"It belongs to {' or '.join(places)}"
    return _hint(last, known)
