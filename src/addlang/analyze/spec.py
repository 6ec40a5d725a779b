"""An analysis specification: models, texts and what to find out about them, as one strict YAML file.

models: {phase1: runs/english, phase2: runs/multilingual}
datasets: {alpaca: alpaca.jsonl}
analyses:
  - {kind: drift, reference: phase1}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from addlang import strictyaml
from addlang.analyze.base import Analysis, Context, explain, load_kind, make_analysis, save, short_name
from addlang.errors import AddlangError
from addlang.schema import DatasetSpec, Strict

FOLDER = "analysis"


class AnalysisSpec(Strict):
    """A whole specification."""

    title: str = ""
    output_dir: str | None = Field(None, description="default: 'analysis' in the run directory, or here")
    run: str | None = Field(None, description="run directory: its source, phases and final model become models")
    models: dict[str, str] = Field({}, description="name -> run directory, checkpoint, hub id or 'lab'")
    datasets: dict[str, DatasetSpec] = Field({}, description="name -> file, or mapping as in a recipe")
    analyses: tuple[dict[str, Any], ...] = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"


def load_spec(path: Path, overrides: Sequence[tuple[str, Any]] = ()) -> tuple[AnalysisSpec, list[Analysis]]:
    """Read a specification.

    Args:
        overrides: top-level keys that replace those of the file.

    Raises:
        AddlangError: every problem of the file at once.
    """
    data = strictyaml.read_mapping(path, "specification")
    return parse_spec({**data, **dict(overrides)}, where=str(path))


def parse_spec(data: Mapping[str, Any], where: str = "specification") -> tuple[AnalysisSpec, list[Analysis]]:
    """Validate plain data; see :func:`load_spec`."""
    data = dict(data)
    sets = data.get("datasets")
    if isinstance(sets, Mapping):
        data["datasets"] = {k: {"path": v} if isinstance(v, str) else v for k, v in sets.items()}
    problems: list[str] = []
    spec = None
    try:
        spec = AnalysisSpec.model_validate(data)
    except ValidationError as error:
        problems += explain(error, AnalysisSpec)
    analyses: list[Analysis] = []
    listed = data.get("analyses")
    for i, item in enumerate(listed if isinstance(listed, list | tuple) else ()):
        if not isinstance(item, Mapping) or "kind" not in item:
            problems.append(f"analyses.{i}: write a mapping with 'kind'")
            continue
        try:
            analyses.append(
                make_analysis(str(item["kind"]), {k: v for k, v in item.items() if k != "kind"}, f"analyses.{i}: ")
            )
        except AddlangError as error:
            problems += [error.message + (f" ({error.fix})" if error.fix else "")]
    names = [a.name for a in analyses]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"analyses: the name '{twice[0]}' stands twice; give each a 'name' of its own")
    if problems or spec is None:
        raise AddlangError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
    return spec, analyses


def positional(kind: str, given: Sequence[str], options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The specification of ``addlang analyze KIND GIVEN... --key value``, as plain data.

    ``given`` are models or files, each also as ``name=path``; a single run directory stands for all its models.
    """
    cls = load_kind(kind)
    top = {"output_dir", "run", "device", "models", "datasets", "title"}
    data: dict[str, Any] = {}
    own: dict[str, Any] = {"kind": kind}
    for key, value in options:
        key = key.replace("-", "_")
        parent, _, child = key.partition(".")
        place = data if parent in top and parent not in cls.model_fields else own
        if child:
            place.setdefault(parent, {})[child] = value
        else:
            place[key] = value
    named: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = short_name(item), item
        while name in named:
            name += "_2"
        named[name] = path
    if len(given) == 1 and "=" not in given[0] and is_run(Path(given[0]).expanduser()):
        data["run"] = given[0]
    elif kind == "scores":
        own["runs"] = {**own.get("runs", {}), **named}
    elif cls.takes == "models":
        data["models"] = {**data.get("models", {}), **named}
    else:
        data["datasets"] = {**data.get("datasets", {}), **named}
    return {**data, "analyses": [own]}


def is_run(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "recipe.yaml").is_file()


def models_of_run(path: Path) -> dict[str, str]:
    """``before``, every phase but the last by its name, ``after``: the models of a run directory.

    Raises:
        AddlangError: it is no run directory.
    """
    from addlang.report.files import read_run

    if not is_run(path):
        raise AddlangError(f"'{path}' is no run directory of addlang", "give the output_dir of a run")
    run = read_run(path)
    phases = [str(p.get("name")) for p in run.phases[:-1]]
    return {"before": run.model, **{n: str(path / "phases" / n) for n in phases}, "after": str(path)}


def execute_spec(spec: AnalysisSpec, analyses: Sequence[Analysis], base_dir: Path | None = None) -> list[Path]:
    """Carry out a specification; returns the JSON files. In a run directory the report is written again.

    As in a recipe, models, runs and the output directory are relative to the working directory, data to ``base_dir``.

    Raises:
        AddlangError: a model, file or library that is missing; results of earlier analyses are kept.
    """
    from addlang.models import resolve
    from addlang.progress import note

    models = dict(spec.models)
    run = None if spec.run is None else Path(spec.run).expanduser()
    if run is not None:
        models = {**models_of_run(run), **models}
    places = {name: resolve(given) for name, given in models.items()}
    context = Context(places, spec.datasets, base_dir, device_of(spec.device), run)
    folder = folder_of(spec, run)
    written = []
    for analysis in analyses:
        note(f"{analysis.name}: {analysis.summary}")
        written.append(save(analysis.run(context), analysis, folder))
    owner = folder.parent
    if folder.name == FOLDER and is_run(owner):
        from addlang.report import write_report

        write_report(owner)
    return written


def folder_of(spec: AnalysisSpec, run: Path | None) -> Path:
    """Where the results go."""
    if spec.output_dir is not None:
        given = Path(spec.output_dir).expanduser()
        return given / FOLDER if is_run(given) else given
    return (run or Path()) / FOLDER


def device_of(wanted: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        AddlangError: CUDA is asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise AddlangError("device: cuda, but torch sees no CUDA device", "use device: auto")
    return "cuda" if there and wanted != "cpu" else "cpu"
