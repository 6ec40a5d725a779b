"""A run directory as plain data. The only part of the report that knows file names; never loads a model.

Only the directory itself must exist. A file that is not there means "not run", and the report says so; a file that is
there but cannot be read is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from addlang.errors import AddlangError

SAMPLES_READ = 2000  # details read per task; a handful is shown


@dataclass(frozen=True)
class Comparison:
    """One task before and after on the same items, with paired 95 % intervals; a row of ``comparison.json``."""

    task: str
    role: str
    language: str
    metric: str
    unit: str
    higher_is_better: bool
    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    n: int = 0
    method: str = ""
    items_id: str = ""  # empty in runs of earlier versions

    def improvement(self) -> tuple[float, float | None, float | None]:
        """Difference and its interval in the metric's unit, with the sign that plus is better."""
        return _oriented(self.difference, self.low, self.high, self.higher_is_better)

    def relative_improvement(self) -> tuple[float, float | None, float | None] | None:
        """As :meth:`improvement`, as a share of the value before; None where that is 0."""
        if self.relative is None:
            return None
        return _oriented(self.relative, self.relative_low, self.relative_high, self.higher_is_better)


def _oriented(
    value: float, low: float | None, high: float | None, higher_is_better: bool
) -> tuple[float, float | None, float | None]:
    if higher_is_better:
        return value, low, high
    return -value, None if high is None else -high, None if low is None else -low


@dataclass(frozen=True)
class RunData:
    """Everything that the report shows. Empty or None: not run.

    Attributes:
        metrics: training log by phase, in the order of the phases.
        samples: model -> task -> per-item details.
    """

    directory: Path
    recipe: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    results: list[dict[str, Any]]
    comparison: list[Comparison] | None
    samples: dict[str, dict[str, list[dict[str, Any]]]]
    proof: dict[str, Any] | None
    state: dict[str, Any]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """Phases of the recipe."""
        return list(self.recipe.get("phases") or [])

    @property
    def model(self) -> str:
        """The source model as the user named it."""
        return str(self.recipe.get("model_name_or_path") or "unknown model")

    @property
    def language(self) -> str:
        """Code of the target language."""
        return str(self.recipe.get("language") or "und")

    @property
    def source_language(self) -> str:
        """Code of the source language."""
        return str(self.recipe.get("source_language") or "en")


def read_run(directory: str | os.PathLike[str]) -> RunData:
    """Read a run directory.

    Raises:
        AddlangError: no such directory, or a file in it that is torn or not what it should be.
    """
    root = Path(directory)
    if not root.is_dir():
        raise AddlangError(f"run directory '{root}' does not exist", "give the output_dir of a run")
    recipe = _read_yaml(root / "recipe.yaml")
    names = [str(p.get("name")) for p in recipe.get("phases") or []]
    metrics = {}
    for i, name in enumerate(names):
        own = root if i == len(names) - 1 else root / "phases" / name
        if rows := read_jsonl(own / "metrics.jsonl"):
            metrics[name] = rows
    if not names and (rows := read_jsonl(root / "metrics.jsonl")):
        metrics["adapt"] = rows
    comparison = read_json(root / "comparison.json", list)
    return RunData(
        directory=root,
        recipe=recipe,
        metrics=metrics,
        results=read_jsonl(root / "results.jsonl"),
        comparison=None if comparison is None else [_comparison(row, root / "comparison.json") for row in comparison],
        samples=_read_samples(root / "samples"),
        proof=read_json(root / "proof.json", dict),
        state=read_json(root / "state.json", dict) or {},
    )


def _comparison(row: Mapping[str, Any], path: Path) -> Comparison:
    known = {f.name for f in fields(Comparison)}
    try:
        return Comparison(**{k: v for k, v in row.items() if k in known})
    except (TypeError, AttributeError) as error:
        raise AddlangError(f"{path}: a row is not a comparison ({error})", "run addlang evaluate again") from error


def _read_samples(root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Items of ``samples/<model>/<task>.jsonl``, or of a stored measurement ``<task>.<metric>.json``."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model in sorted(root.iterdir()) if root.is_dir() else ():
        for path in sorted(model.glob("*.json*")) if model.is_dir() else ():
            if path.suffix == ".jsonl":
                samples.setdefault(model.name, {})[path.stem] = read_jsonl(path, SAMPLES_READ)
            elif path.suffix == ".json":
                data = read_json(path, dict)
                items = [i for i in data.get("items") or [] if isinstance(i, dict)]
                samples.setdefault(model.name, {})[str(data.get("task") or path.stem)] = items[:SAMPLES_READ]
    return samples


def read_json(path: Path, kind: type) -> Any:
    """The file's data, or None where there is no such file.

    Raises:
        AddlangError: not JSON, or not of the kind expected.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AddlangError(f"{path} cannot be read: {error}", "run the same command again to write it anew") from error
    if not isinstance(data, kind):
        raise AddlangError(f"{path} holds a {type(data).__name__}, not a {kind.__name__}")
    return data


def read_jsonl(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file; no rows where there is no such file."""
    return list(_rows(path, limit)) if path.is_file() else []


def _rows(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, start=1):
                if limit is not None and number > limit:
                    return
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if not line.endswith("\n"):  # the last line of a run that is writing right now, or was killed
                        return
                    raise AddlangError(f"{path}, line {number}: {error}", "remove that line") from error
                if not isinstance(row, dict):
                    raise AddlangError(f"{path}, line {number}: not a JSON object", "remove that line")
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise AddlangError(f"{path} cannot be read: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AddlangError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise AddlangError(f"{path} is no recipe")
    return data


def check_folder(path: Path) -> None:
    """Make the folder that a file is to be written into, before the work that it will hold.

    Raises:
        AddlangError: it cannot be made, or the file is a directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AddlangError(f"{path} cannot be written: {error}", "choose another --output") from error
    if path.is_dir():
        raise AddlangError(f"{path} is a directory", "name the file to write, such as preflight.html")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise AddlangError(f"{path} cannot be written: {error}") from error
