"""The study file: what all runs share, the arms that differ, and over what they are repeated. Loads no torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from addlang import strictyaml
from addlang.errors import AddlangError, did_you_mean
from addlang.recipe import Recipe
from addlang.schema import Strict

OWN = {"output_dir", "seed"}  # the study gives every run its own


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _numbers(value: Any) -> Any:
    """``0,1,2`` as it is written on the command line, a single number, or a list."""
    return value.split(",") if isinstance(value, str) else _several(value)


class Study(Strict):
    """A grid of ordinary recipes and how they are compared. ``extends: FILE`` lays a study over another beside it."""

    title: str | None = Field(None, description="heading of the report")
    output_dir: str = Field(description="the runs, their data cache and the report go here")
    recipe: dict[str, Any] = Field(description="keys that all runs share: a recipe without output_dir and seed")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="label -> recipe keys laid over `recipe`; also `learning_rates` of its own"
    )
    axes: dict[str, dict[str, dict[str, Any]]] = Field(
        {}, description="name -> label -> recipe keys; every combination is a setting with a table of its own"
    )
    learning_rates: Annotated[tuple[float, ...], BeforeValidator(_numbers)] = Field(
        (), description="of every arm (in a run with phases: of the last one); empty: the recipe's"
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field((0,), min_length=1)
    reference: str | None = Field(None, description="arm that the others are tested against; None: the first")
    gained: str = Field(
        "target/bits_per_byte", description="what is gained: role/metric, or role/metric/task if there are several"
    )
    kept: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        ("source/bits_per_byte",),
        min_length=1,
        description="what is kept, in the same form; of several the mean relative change is taken",
    )
    same_budget: bool = Field(True, description="all arms of a setting must train on the same number of tokens")
    keep_weights: bool = Field(True, description="false: a run's weights are removed once it is measured")

    @field_validator("arms", "axes", "recipe")
    @classmethod
    def _the_study_gives_seeds_and_directories(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, where in _keys(value):
            if key in OWN:
                raise ValueError(f"'{where}' is given by the study; leave it out")
        return value

    @property
    def against(self) -> str:
        """The reference arm."""
        return self.reference or next(iter(self.arms))


def _keys(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        yield key, prefix + key
        if isinstance(item, Mapping):
            yield from _keys(item, f"{prefix}{key}.")


@dataclass(frozen=True)
class Cell:
    """One run of the grid. ``setting`` has one label per axis."""

    setting: tuple[str, ...]
    arm: str
    learning_rate: float | None
    seed: int

    @property
    def folder(self) -> str:
        """Where it goes, below the study's ``runs``."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return "/".join([*map(slug, self.setting), f"{slug(self.arm)}{rate}-s{self.seed}"])


def slug(label: str) -> str:
    """A label as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label.strip()).strip("-.") or "arm"


def load_study(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study file.

    Args:
        overrides: replaces keys of the top level, and of ``recipe`` as ``recipe.KEY``.

    Raises:
        AddlangError: every problem of the file, each with its key.
    """
    path = Path(path)
    data = _read(path)
    if "arms" not in data:
        raise AddlangError(f"study '{path}' has no 'arms'", "a recipe is carried out with addlang run")
    for key, value in (overrides or {}).items():
        first, dot, rest = key.replace("-", "_").partition(".")
        if not dot:
            data[first] = value
        elif first == "recipe" and isinstance(data.get("recipe"), dict):
            _put(data["recipe"], rest, value)
        else:
            raise AddlangError(f"--{key}: only keys of the top level and recipe.KEY can be replaced")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(map(str, e["loc"]))
            unknown = e["type"] == "extra_forbidden"
            hint = did_you_mean(str(e["loc"][-1]), Study.model_fields) if unknown else ""
            lines.append(f"  {key}: {'unknown key. ' + hint if unknown else e['msg'].removeprefix('Value error, ')}")
        raise AddlangError(f"study '{path}': {len(lines)} problem(s)\n" + "\n".join(lines)) from None
    if study.against not in study.arms:
        raise AddlangError(
            f"study '{path}': reference '{study.against}' is no arm", did_you_mean(study.against, study.arms)
        )
    return study


def _read(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A study file laid over the one that it ``extends``."""
    if path.resolve() in inside:
        raise AddlangError(f"study '{path}' extends itself")
    data = strictyaml.read_mapping(path, "study")
    if (base := data.pop("extends", None)) is None:
        return data
    if not isinstance(base, str):
        raise AddlangError(f"study '{path}': 'extends' must name a file beside it")
    below = path.parent / base
    if below.parent.resolve() != path.parent.resolve():  # relative paths in it would mean other files
        raise AddlangError(f"study '{path}' extends '{base}'", "the two files must lie in one directory")
    merged: dict[str, Any] = overlay(_read(below, (*inside, path.resolve())), data)
    return merged


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise AddlangError(f"--recipe.{key}: '{part}' is a plain value, not a mapping")
    data[last] = value


def overlay(base: Any, top: Any) -> Any:
    """``top`` laid over ``base``: mappings merge, all else replaces; so do mappings with another ``name``."""
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    if "name" in top and top["name"] != base.get("name"):
        return top
    return {**base, **{key: overlay(base[key], value) if key in base else value for key, value in top.items()}}


def cells(study: Study, base_dir: Path, *, files: bool | Callable[[Cell], bool] = True) -> dict[Cell, dict[str, Any]]:
    """Every run with its recipe as plain data; runs that share a seed stand together.

    Args:
        files: also check that every local file exists; a function says for which runs.

    Raises:
        AddlangError: a recipe is wrong (naming its arm), budgets differ, or two runs would share a directory.
    """
    root = Path(study.output_dir).resolve()
    out: dict[Cell, dict[str, Any]] = {}
    budgets: dict[tuple[str, ...], dict[str, int | str | None]] = {}
    folders: dict[str, Cell] = {}
    grid = itertools.product(
        study.seeds, itertools.product(*(axis.items() for axis in study.axes.values())), study.arms.items()
    )
    checked: set[tuple[tuple[str, ...], str]] = set()
    for seed, combination, (arm, keys) in grid:
        setting = tuple(label for label, _ in combination)
        merged: dict[str, Any] = dict(study.recipe)
        for _, part in combination:
            merged = overlay(merged, part)
        merged = overlay(merged, {k: v for k, v in keys.items() if k != "learning_rates"})
        rates = _several(keys["learning_rates"]) if "learning_rates" in keys else list(study.learning_rates)
        for rate in rates or [None]:
            cell = Cell(setting, arm, None if rate is None else float(rate), seed)
            if cell.folder in folders:
                raise AddlangError(
                    f"two runs would share '{cell.folder}'", "give the arms labels that differ as file names"
                )
            folders[cell.folder] = cell
            data = {**merged, "seed": seed, "output_dir": str(root / "runs" / cell.folder)}
            if rate is not None:
                data = _with_rate(data, rate)
            where = f"arm '{arm}'" + (f" ({', '.join(setting)})" if setting else "")
            check = (setting, arm) not in checked and (files(cell) if callable(files) else files)
            recipe = Recipe.parse(data, where=where, files=check, base_dir=base_dir)
            if check:
                checked.add((setting, arm))
            budgets.setdefault(setting, {})[arm] = recipe.budget
            out[cell] = data
    if study.same_budget:
        for setting, by_arm in budgets.items():
            _require_same(setting, by_arm)
    return out


def _with_rate(data: dict[str, Any], rate: float) -> dict[str, Any]:
    if "phases" not in data:
        return {**data, "learning_rate": rate}
    return {**data, "phases": [*data["phases"][:-1], {**data["phases"][-1], "learning_rate": rate}]}


def _require_same(setting: tuple[str, ...], budgets: Mapping[str, int | str | None]) -> None:
    where = f" of {', '.join(setting)}" if setting else ""
    if missing := [arm for arm, tokens in budgets.items() if tokens is None and len(set(budgets.values())) > 1]:
        raise AddlangError(
            f"arms{where}: '{missing[0]}' states no tokens, others do", "set recipe.tokens, or same_budget: false"
        )
    if len(set(budgets.values())) > 1:
        shown = ", ".join(f"{arm} {b:,}" if isinstance(b, int) else f"{arm} ({b})" for arm, b in budgets.items())
        raise AddlangError(
            f"arms{where} train on different numbers of tokens: {shown}",
            "give every arm the same budget, or set same_budget: false and say so where you report it",
        )
