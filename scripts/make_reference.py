"""Write docs/reference.md from the schema and the command line, so that it cannot fall behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from pydantic_core import PydanticUndefined

from addlang.analyze.base import KINDS, Analysis, load_kind
from addlang.cli import app
from addlang.guards import available as guards
from addlang.guards import load_guard
from addlang.merge.methods import METHODS, Merge
from addlang.recipe import Calibration, DatasetSpec, Evaluation, Phase, Recipe, RepliesEvaluation
from addlang.schema import Condition, Replay, SelfPaced
from addlang.strategies import Strategy, available, load_strategy

TARGET = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
PARTS: list[tuple[str, type, str]] = [
    (
        "Recipe",
        Recipe,
        "The top level. A file without `phases` is one phase: the phase's keys stand here too. With `phases`, keys of a phase "
        "that stand here hold for every phase that does not give its own.",
    ),
    ("Phase", Phase, "Data, strategy and training. Defaults are those of Table 8 of the SSU paper."),
    ("Data set", DatasetSpec, "An item of `datasets`."),
    ("Calibration", Calibration, "`calibration`: what importance is scored on."),
    ("Condition", Condition, "An item of `continue_if` of a phase."),
    ("Replay", Replay, "`replay` of a phase. See [two-phase tuning](two-phase.md)."),
    ("Sampler", SelfPaced, "`sampler` of a phase."),
    ("Evaluation", Evaluation, "`evaluation`: what is measured before and after."),
    ("Replies", RepliesEvaluation, "`evaluation.replies`."),
]
MERGES = (
    "For `addlang merge FILE.yaml`; see [merging](merging.md). A *setting* is a number, a list of numbers (interpolated over the "
    "depth), or a list of `{filter: part of a tensor's name, value: ...}` of which the first that applies counts. An item of a "
    "*list of models* is a name, or `{model: ..., parameters: {weight: ..., density: ...}}`. Keys of every method:"
)


def main() -> None:
    text = build()
    if "--check" in sys.argv:
        if TARGET.read_text(encoding="utf-8") != text:
            sys.exit("docs/reference.md is out of date: run python scripts/make_reference.py")
        return
    TARGET.write_text(text, encoding="utf-8")


def build() -> str:
    lines = ["# Reference", "", "Made by `scripts/make_reference.py` from the schema.", "", "## Commands", ""]
    group = typer.main.get_command(app)
    lines += _commands(group, "addlang")
    lines += ["## Recipe", ""]
    for title, model, about in PARTS:
        lines += [f"### {title}", "", about, "", *_fields(model), ""]
    lines += ["## Strategies", "", "Options of every strategy:", "", *_fields(Strategy), ""]
    for name in available():
        cls = load_strategy(name)
        lines += [f"### {name}", "", f"{cls.summary[:1].upper()}{cls.summary[1:]}. {cls.paper}.", ""]
        own = [n for n in cls.model_fields if n not in Strategy.model_fields]
        if own:
            lines += [*_fields(cls, own), ""]
    lines += ["## Guards", "", "An item of `guards` of a phase: a name, or a mapping with `name` and these keys.", ""]
    for name in guards():
        guard = load_guard(name)
        lines += [f"### guard: {name}", "", f"{guard.summary[:1].upper()}{guard.summary[1:]}. {guard.paper}.", ""]
        lines += [*_fields(guard), ""]
    lines += ["## Merge files", "", MERGES, "", *_fields(Merge), ""]
    for name, method in METHODS.items():
        own = [n for n in method.model_fields if n not in Merge.model_fields and n != "parameters"]
        lines += [f"### merge_method: {name}", "", f"{method.title}. {method.paper}.", "", *_fields(method, own), ""]
        parameters = method.model_fields["parameters"].annotation if "parameters" in method.model_fields else None
        if parameters is not None:
            lines += ["`parameters`:", "", *_fields(parameters), ""]
    lines += ["## Analyses", "", "The keys of every kind of `addlang analyze`, and `name` and `title` of each.", ""]
    for kind in KINDS:
        cls = load_kind(kind)
        lines += [f"### {kind}", "", f"{cls.summary[:1].upper()}{cls.summary[1:]}. {cls.paper}.", ""]
        lines += [*_fields(cls, [n for n in cls.model_fields if n not in Analysis.model_fields]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any, path: str) -> list[str]:
    lines = []
    for name, command in sorted(group.commands.items()):
        full = f"{path} {name}"
        about = (command.help or "").split("\n\n")[0].replace("\n", " ").strip()
        lines += [f"### `{full}`", "", about, ""]
        rows = []
        for p in command.params:
            if p.name == "help":
                continue
            shown = p.name.upper() if p.param_type_name == "argument" else ", ".join(p.opts)
            rows.append(f"| `{shown}` | {(getattr(p, 'help', '') or '').replace('|', '/')} |")
        if rows:
            lines += ["| argument | meaning |", "|---|---|", *rows, ""]
        if hasattr(command, "commands"):
            lines += _commands(command, full)
    return lines


def _fields(model: Any, only: list[str] | None = None) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{_short(default)}`"
        lines.append(
            f"| `{field.alias or name}` | {_type(field.annotation)} | {shown} | {(field.description or '').replace('|', '/')} |"
        )
    return lines


def _short(value: Any) -> str:
    if hasattr(type(value), "model_fields"):
        return "{...}"
    return "[]" if value == () else str(value)


def _type(annotation: Any) -> str:
    text = re.sub(r"Annotated\[(\w+), FieldInfo\([^()]*(?:\([^()]*\)[^()]*)*\)\]", r"\1", str(annotation))
    text = (
        text.replace("typing.", "")
        .replace("collections.abc.", "")
        .replace("addlang.recipe.", "")
        .replace("addlang.schema.", "")
        .replace("NoneType", "None")
    )
    text = re.sub(r"addlang\.(merge|guards)\.\w+\.", "", text)
    text = text.replace("float | tuple[float, ...] | Conditional | tuple[Conditional, ...]", "setting")
    if "Weighted" in text:
        text = "list of models"
    if text.startswith("<class '"):
        text = text[8:-2]
    return "`" + text.split(", BeforeValidator")[0].replace("Annotated[", "").replace("|", "or") + "`"


if __name__ == "__main__":
    main()
