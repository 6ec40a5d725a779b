"""What is wrong with a recipe: contradictions, missing files, unknown keys, each with its remedy; and overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from addlang.errors import AddlangError, did_you_mean
from addlang.recipe import Recipe
from addlang.schema import (
    ALIASES,
    Calibration,
    Condition,
    DatasetSpec,
    Evaluation,
    Part,
    Phase,
    Replay,
    RepliesEvaluation,
    SelfPaced,
    beside,
    parse_list,
)


def conflicts(data: Mapping[str, Any], flat: bool) -> Iterator[str]:
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


def missing_files(data: Mapping[str, Any], flat: bool, base_dir: Path | None) -> Iterator[str]:
    """Local files that the recipe names and that do not exist."""
    from addlang.data.builtin_sets import CHAT_TEMPLATES, builtin_template
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
    if isinstance(template, str) and not builtin_template(template) and not beside(template, base_dir).is_file():
        known = ", ".join(CHAT_TEMPLATES)
        yield f"chat_template: {beside(template, base_dir)}: the file does not exist (built in are {known})"


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


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
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
    "continue_if": Condition,
    "sampler": SelfPaced,
    "replay": Replay,
    "parts": Part,
}


def _hint(key: str, known: set[str]) -> str:
    alias = ALIASES.get(key)
    return f"addlang calls it '{alias}'" if alias else did_you_mean(key, known)


def explain(error: ValidationError, flat: bool) -> list[str]:
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
