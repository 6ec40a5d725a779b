"""What an analysis is, what it may look at, and what it leaves behind."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from addlang.errors import AddlangError, did_you_mean
from addlang.export import write_json
from addlang.schema import DatasetSpec, Strict

if TYPE_CHECKING:
    import torch

    from addlang.analyze.states import Chosen

FORMAT = 1
KINDS: dict[str, tuple[str, str]] = {  # kind -> module, class
    "des": ("des", "Des"),
    "mpd": ("mpd", "Mpd"),
    "drift": ("drift", "Drift"),
    "tsne": ("tsne", "Tsne"),
    "cka": ("cka", "Cka"),
    "code-mixing": ("code_mixing", "CodeMixing"),
    "languages": ("languages", "Languages"),
    "scores": ("scores", "Scores"),
}


class Analysis(Strict):
    """Base of every kind. Fields are the keys of the specification.

    Attributes:
        takes: what positional arguments of ``addlang analyze KIND`` name.
    """

    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    takes: ClassVar[str] = "models"

    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="names the files; default: the kind")
    title: str = Field("", description="heading in the report")

    def run(self, context: Context) -> Result:
        """Carry it out."""
        raise TypeError(f"analysis '{self.kind}' must define run()")


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
        sentence: the finding in one sentence.
        columns, rows: the table, as text.
        data: every number, as plain data.
        settings: what the numbers depend on.
        notes: what a reader must know to read them rightly.
        draw: draws the figure on an empty matplotlib figure; None where there is nothing to draw.
        size: of the figure, in inches.
    """

    sentence: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    draw: Callable[[Any], None] | None = None
    size: tuple[float, float] = (7.6, 3.6)


@dataclass
class Context:
    """Models and texts by name, and what was already computed on them.

    Attributes:
        models: name -> directory.
        texts: name -> data set.
        base_dir: directory against which relative paths are resolved.
        device: where models run.
        run: the run directory that the specification is about, if any.
    """

    models: Mapping[str, Path]
    texts: Mapping[str, DatasetSpec] = field(default_factory=dict)
    base_dir: Path | None = None
    device: str = "cpu"
    run: Path | None = None
    _states: dict[Any, torch.Tensor] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """Directory of a model.

        Raises:
            AddlangError: no model of that name.
        """
        if name not in self.models:
            raise AddlangError(f"there is no model '{name}' in this analysis", did_you_mean(name, self.models))
        return self.models[name]

    def choose(self, names: Sequence[str], *, least: int = 1) -> list[str]:
        """The models asked for, or all.

        Raises:
            AddlangError: unknown names, or fewer than ``least``.
        """
        chosen = list(names) or list(self.models)
        for name in chosen:
            self.model(name)
        if len(chosen) < least:
            raise AddlangError(
                f"this analysis compares at least {least} models, and there {'is' if len(chosen) == 1 else 'are'} {len(chosen)}",
                "name a run directory, or several checkpoints",
            )
        return chosen

    def text(self, name: str) -> DatasetSpec:
        """A data set by name.

        Raises:
            AddlangError: no data set of that name.
        """
        if name not in self.texts:
            raise AddlangError(f"there is no data set '{name}' in this analysis", did_you_mean(name, self.texts))
        return self.texts[name]

    def states(self, name: str, chosen: Chosen) -> torch.Tensor:
        """Mean hidden states [layers + 1, n, d] of a model on some texts, computed once."""
        from addlang.analyze.states import states_of

        key = (self.model(name), chosen)
        if key not in self._states:
            self._states[key] = states_of(self.model(name), chosen, device=self.device)
        return self._states[key]


def load_kind(kind: str) -> type[Analysis]:
    """The class of that kind.

    Raises:
        AddlangError: unknown kind.
    """
    if kind not in KINDS:
        raise AddlangError(f"unknown analysis '{kind}'", did_you_mean(kind, KINDS))
    module, name = KINDS[kind]
    return getattr(importlib.import_module(f"addlang.analyze.{module}"), name)  # type: ignore[no-any-return]


def make_analysis(kind: str, options: Mapping[str, Any], where: str = "") -> Analysis:
    """Build an analysis from its kind and keys.

    Raises:
        AddlangError: unknown kind or keys, or bad values; all of them at once.
    """
    cls = load_kind(kind)
    try:
        return cls.model_validate({"name": kind, **options})
    except ValidationError as error:
        raise AddlangError("\n".join(explain(error, cls, f"{where}analysis '{kind}': "))) from None


def explain(error: ValidationError, cls: type[Any], prefix: str = "") -> list[str]:
    """One line per problem, with the nearest known key."""
    lines = []
    for e in error.errors():
        key = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            lines.append(f"{prefix}unknown key '{key}'. {did_you_mean(key, cls.model_fields)}")
        elif e["type"] == "missing":
            lines.append(f"{prefix}{key} is missing")
        else:
            message = e["msg"].removeprefix("Value error, ")
            lines.append(f"{prefix}{key or 'whole'}: {message} (given: {e.get('input')!r})")
    return lines


def save(result: Result, analysis: Analysis, folder: Path) -> Path:
    """Write ``NAME.json`` and, where there is one, the figure ``NAME.svg``; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = None
    if result.draw is not None:
        from addlang.analyze.plots import write_figure

        figure = f"{analysis.name}.svg"
        write_figure(folder / figure, result.draw, result.size)
    path = folder / f"{analysis.name}.json"
    about = {
        "format": FORMAT,
        "kind": analysis.kind,
        "name": analysis.name,
        "title": analysis.title or analysis.summary[:1].upper() + analysis.summary[1:],
        "paper": analysis.paper,
        "sentence": result.sentence,
        "columns": list(result.columns),
        "rows": [list(map(str, row)) for row in result.rows],
        "notes": list(result.notes),
        "settings": {**analysis.model_dump(mode="json", exclude={"name", "title"}), **result.settings},
        "figure": figure,
        "data": result.data,
    }
    json.dumps(about, allow_nan=False)  # a NaN would be no JSON: better a traceback here than a torn report
    write_json(path, about)
    return path


@functools.cache
def _unsafe() -> re.Pattern[str]:
    return re.compile(r"[^A-Za-z0-9_.-]+")


def short_name(path: str) -> str:
    """A name for a model or file that was given by its path."""
    if path == "lab":
        return path
    name = Path(path).expanduser().resolve().name
    return _unsafe().sub("-", name.split(".")[0] if name.count(".") else name) or "model"
