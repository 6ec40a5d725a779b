"""``addlang analyze``: what explains forgetting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from addlang.commands.common import Json, emit, parse_overrides, quiet, split_arguments
from addlang.errors import AddlangError


def analyze(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(help="A kind (des, mpd, drift, tsne, cka, code-mixing, languages, scores) or a specification."),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="A run directory, several models, or files; each also as NAME=PATH."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Analyse models and texts: similarity, drift, code-mixing. WHAT is a kind or a YAML specification.

    Any key of the kind can follow as --key value, for example --reference before, --prompts mt_bench.jsonl,
    --encoder states --model lab, --output_dir DIR. 'addlang analyze drift --help-keys true' lists them.
    """
    from addlang.analyze.base import KINDS
    from addlang.analyze.spec import execute_spec, load_spec, parse_spec, positional

    quiet(as_json)
    given, options = split_arguments([what, *(inputs or []), *context.args])
    overrides = parse_overrides(options)
    if any(key in ("help-keys", "help_keys") for key, _ in overrides):
        _show_keys(what, as_json)
        return
    if what in KINDS:
        spec, analyses = parse_spec(positional(what, given[1:], overrides), where=f"analyze {what}")
        base_dir = None
    elif Path(what).suffix in (".yaml", ".yml"):
        if len(given) > 1:
            raise AddlangError(f"unexpected argument '{given[1]}'", "a specification names its own models and files")
        spec, analyses = load_spec(Path(what), overrides)
        base_dir = Path(what).resolve().parent
    else:
        from addlang.errors import did_you_mean

        raise AddlangError(f"'{what}' is neither a kind of analysis nor a YAML file", did_you_mean(what, KINDS))
    written = execute_spec(spec, analyses, base_dir)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in written]
    if as_json:
        emit([{**about, "file": str(path)} for about, path in zip(found, written, strict=True)])
        return
    for about, path in zip(found, written, strict=True):
        _show(about, path)


def _show(about: dict[str, Any], path: Path) -> None:
    from addlang.report import render_table

    print(f"\n{about['title']}")
    render_table(about["columns"], about["rows"])
    print(about["sentence"])
    for note in about["notes"]:
        print(f"  note: {note}")
    figure = f", {path.with_name(about['figure']).name}" if about["figure"] else ""
    print(f"  {path}{figure}")


def _show_keys(kind: str, as_json: bool) -> None:
    from addlang.analyze.base import load_kind
    from addlang.report import render_table

    fields = load_kind(kind).model_fields
    rows = [[name, str(f.get_default(call_default_factory=True)), f.description or ""] for name, f in fields.items()]
    if as_json:
        emit([dict(zip(("key", "default", "meaning"), row, strict=True)) for row in rows])
    else:
        render_table(["key", "default", "meaning"], rows)
