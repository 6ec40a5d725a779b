"""``report.html``: one self-contained file, made from what lies in the run directory."""

from __future__ import annotations

import functools
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from addlang.progress import duration
from addlang.report import datacard, figures, numbers
from addlang.report.analyses import analyses_of
from addlang.report.files import Comparison, RunData, read_run, write_text
from addlang.report.method import method_of
from addlang.report.phases import phase_notes
from addlang.report.samples import chosen_samples
from addlang.report.svg import Canvas, Figure
from addlang.report.tiles import tiles_of
from addlang.report.verdict import (
    BITS,
    ROLES,
    finished,
    gained,
    holm_of,
    kept,
    mean_change,
    proof_sentence,
    proof_totals,
    reply_metric,
    role_name,
    rows_of,
    verdict_of,
)

REPORT = "report.html"


@functools.cache
def environment() -> Environment:
    """Templates; everything that is not markup of ours is escaped."""
    env = Environment(
        loader=PackageLoader("addlang.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["ts"] = lambda value: numbers.typeset(str(value))
    env.filters["cell"] = _cell
    return env


def _cell(text: str) -> Markup:
    """A number above its interval."""
    if text.endswith(f" {numbers.NO_INTERVAL}"):
        main, low = text.removesuffix(numbers.NO_INTERVAL), numbers.NO_INTERVAL
    else:
        main, bracket, rest = text.partition(" [")
        low = bracket.strip() + rest
    if not low:
        return escape(numbers.typeset(main))
    inside = Markup('<span>{}<span class="sub">{}</span></span>')
    return inside.format(numbers.typeset(main.strip()), numbers.typeset(low))


def write_report(out_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a run directory, atomically.

    Raises:
        AddlangError: a file of the run cannot be read, or the report cannot be written.
    """
    path = Path(out_dir) / REPORT
    write_text(path, report_html(out_dir))
    return path


def report_html(out_dir: str | os.PathLike[str]) -> str:
    """The report of a run directory as HTML."""
    run = read_run(out_dir)
    proof = proof_totals(run)
    started = run.state.get("started")
    comparison = run.comparison or []
    sentence = proof_sentence(proof)
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            source=numbers.language_name(run.source_language),
            target=numbers.language_name(run.language),
            model="the lab model" if run.model == "lab" else run.model,
            verdict=verdict_of(run),
            started=time.strftime("%Y-%m-%d", time.gmtime(started)) if isinstance(started, int | float) else started,
            device=run.state.get("device"),
            finished=finished(run),
            warnings=[str(w) for w in run.state.get("warnings") or []],
            not_run=[
                {"task": str(n.get("task")), "reason": str(n.get("reason"))} for n in run.state.get("not_run") or []
            ],
            tiles=tiles_of(run),
            groups=_groups(run),
            forests=figures.forests(run),
            legend=_legend(run),
            methods_of_intervals=sorted({c.method for c in comparison if c.method}),
            tested=sum(c.p is not None for c in comparison),
            results=[_result(r) for r in run.results],
            front=_front(run),
            phases=_phases(run),
            proof=proof,
            proof_sentence=sentence[0].upper() + sentence[1:] + ".",
            moved_share=numbers.percent(proof.moved / proof.trainable) if proof and proof.trainable else "",
            proof_phases=_proof_phases(run),
            samples=chosen_samples(run),
            analyses=analyses_of(run.directory),
            data=_data(run),
            commands=reproduce(run),
            facts=_facts(run),
            settings=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        )
    )


def _groups(run: RunData) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the table by role."""
    rows = run.comparison or []
    adjusted = dict(zip(map(id, rows), holm_of(rows), strict=True))
    roles = [r for r in ROLES if rows_of(run, r)]
    return [(role_name(run, role), [_row(c, adjusted[id(c)]) for c in rows_of(run, role)]) for role in roles]


def _row(c: Comparison, holm: float | None) -> dict[str, Any]:
    return {
        "task": c.task,
        "metric": reply_metric(c),
        "higher_is_better": c.higher_is_better,
        "before": numbers.value(c.before, c.unit),
        "after": numbers.value(c.after, c.unit),
        "difference": numbers.difference(c.difference, c.low, c.high, c.unit),
        "relative": numbers.relative(c.relative, c.relative_low, c.relative_high),
        "n": numbers.integer(c.n),
        "p": numbers.p_value(c.p),
        "holm": numbers.p_value(holm),
    }


def _legend(run: RunData) -> list[tuple[Any, str]]:
    entries = []
    for role, (shape, colour) in figures.ROLES.items():
        if rows_of(run, role):
            canvas = Canvas(14)
            canvas.marker(7, 7, shape, f"mark {colour}", 5)
            entries.append((canvas.render(14, role), role_name(run, role)))
    return entries


def _result(r: dict[str, Any]) -> dict[str, str]:
    unit = str(r.get("unit") or "")
    stderr = r.get("stderr")
    value = r.get("value")
    return {
        **{k: str(r.get(k, "-")) for k in ("model", "task", "version", "seed")},
        "metric": numbers.metric_name(str(r.get("metric", "-"))),
        "value": numbers.value(value, unit) if isinstance(value, int | float) else "not run",
        "stderr": numbers.value(stderr, unit) if isinstance(stderr, int | float) else "-",
        "n": numbers.integer(r.get("n")),
        "settings": json.dumps(r.get("settings") or {}, ensure_ascii=False, sort_keys=True),
    }


def _front(run: RunData) -> Figure | None:
    source, target = kept(run), gained(run)
    if source is None or target is None:
        return None
    points = [figures.PathPoint("source model", (0.0, None, None), (1.0, None, None))]
    names = {c.task for c in source.tasks}, {c.task for c in target.tasks}
    for name in [p.get("name") for p in run.phases[:-1]]:
        middle = [_relative_rows(run, str(name), rows) for rows in names]
        changes = [mean_change(rows) for rows in middle]
        if changes[0] is not None and changes[1] is not None:
            points.append(
                figures.PathPoint(f"after {name}", (changes[1].change, None, None), (1 + changes[0].change, None, None))
            )
    low, high = (None if v is None else 1 + v for v in (source.low, source.high))
    points.append(
        figures.PathPoint("adapted model", (target.change, target.low, target.high), (1 + source.change, low, high))
    )
    what = "fewer bits per byte" if target.tasks[0].metric in BITS else "better scores"
    figure = figures.before_after(
        points,
        f"{numbers.language_name(run.language)} gained: {what} (%)",
        f"{numbers.language_name(run.source_language)} kept (% of the source model)",
    )
    return Figure(
        figure.wide, figure.narrow, "Lines through the point are 95 % intervals; steps between phases have none."
    )


def _relative_rows(run: RunData, model: str, tasks: set[str]) -> list[Comparison]:
    """Comparisons of an earlier phase with the source model, without intervals: items of phases are not compared."""
    found = {(r.get("model"), r.get("task"), r.get("metric")): r for r in run.results}
    rows = []
    for c in run.comparison or []:
        r = found.get((model, c.task, c.metric))
        if c.task in tasks and r and isinstance(r.get("value"), int | float) and c.before:
            after = float(r["value"])
            rows.append(
                Comparison(
                    c.task, c.role, c.language, c.metric, c.unit, c.higher_is_better, c.before, after, after - c.before,
                    relative=(after - c.before) / c.before, n=c.n,
                )
            )  # fmt: skip
    return rows


def _phases(run: RunData) -> list[dict[str, Any]]:
    phases = []
    for recipe in run.phases or [{"name": n} for n in run.metrics]:
        name = str(recipe.get("name"))
        rows = run.metrics.get(name, [])
        small = [
            figures.curve(rows, "learning_rate", "learning rate", 170, share=3),
            figures.curve(rows, "grad_norm", "gradient norm", 170, share=3),
            figures.curve(rows, "tokens_per_second", "tokens per second", 170, share=3),
            figures.curve(rows, "sampler_rate", "share of the data in use", 170, share=3),
        ]
        phases.append(
            {
                "name": name,
                **method_of(run, name, recipe),
                "notes": phase_notes(run, name),
                "loss": figures.curve(rows, "loss", "loss (nats per token)", 260, smooth=True),
                "details": [f for f in small if f is not None],
            }
        )
    return phases


def _proof_phases(run: RunData) -> list[dict[str, Any]]:
    phases = []
    for p in (run.proof or {}).get("phases") or []:
        tensors = p.get("tensors") or []
        frozen, trainable = int(p.get("frozen_elements") or 0), int(p.get("trainable_elements") or 0)
        total = frozen + trainable
        rows = [
            {
                "name": t.get("name"),
                "kind": t.get("kind"),
                "frozen_changed": t.get("frozen_changed"),
                **{f"{k}_text": numbers.integer(t.get(k)) for k in ("elements", "frozen", "moved")},
                "changed_text": numbers.integer(t.get("frozen_changed")),
            }
            for t in tensors
        ]
        share = numbers.percent(frozen / total) if total else "0 %"
        phases.append(
            {"name": p.get("phase"), "frozen_share": share, "map": figures.frozen_map(tensors), "tensors": rows}
        )
    return phases


def _data(run: RunData) -> list[dict[str, Any]]:
    cards = []
    for phase, card in (run.state.get("data") or {}).items():
        heldout = ", ".join(
            f"{numbers.integer(v)} {k}"
            for k, v in (card.get("heldout") or {}).items()
            if isinstance(v, int | float) and v
        )
        cards.append(
            {
                "phase": phase,
                "amounts": datacard.amounts(card),
                "contents": datacard.contents(card),
                "heldout": heldout,
                "languages": datacard.language_shares(card),
                "overlap": datacard.overlap(card),
            }
        )
    return cards


def reproduce(run: RunData) -> list[str]:
    """Commands that make the run again and check it."""
    out = shlex.quote(str(run.directory))
    recipe = shlex.quote(str(run.directory / "recipe.yaml"))
    return [
        f"addlang run {recipe} --output_dir NEW   # again, from the same recipe",
        f"addlang verify {out}   # recompute the proof",
        f"addlang report {out}   # write this file again",
    ]


def _facts(run: RunData) -> list[tuple[str, str]]:
    seconds = run.state.get("seconds")
    versions = run.state.get("versions") or {}
    facts = [
        ("source model", run.model + (f" (revision {run.recipe['revision']})" if run.recipe.get("revision") else "")),
        ("fingerprint", run.state.get("fingerprint")),
        ("seed", run.recipe.get("seed")),
        ("device", run.state.get("device")),
        ("time", duration(seconds) if isinstance(seconds, int | float) else None),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    return [(k, str(v)) for k, v in facts if v not in (None, "")]
