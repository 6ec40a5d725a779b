"""The report of a study, from its ``results.json``: per setting a front, every arm, and arms at equal gain."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.progress import duration
from addlang.report import numbers
from addlang.report.files import read_json, write_text
from addlang.report.front import Arm, Interval, front_figure
from addlang.report.html import REPORT, environment

RESULTS = "results.json"
MANY = 14  # points in a figure; of more only the front and the reference are named


def read_study(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``results.json`` of a study.

    Raises:
        AddlangError: there is none, or it is torn.
    """
    path = Path(directory) / RESULTS
    data = read_json(path, dict)
    if data is None:
        raise AddlangError(f"'{path}' does not exist", "give the output directory of a study")
    return dict(data)


def write_study_report(directory: str | os.PathLike[str]) -> None:
    """Write ``report.html`` and ``table.md``, atomically."""
    data = read_study(directory)
    write_text(Path(directory) / REPORT, study_html(data))
    write_text(Path(directory) / "table.md", study_markdown(data))


def study_tables(data: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) for the terminal and the report."""
    out = []
    for s in data["settings"]:
        name = ", ".join(s["setting"].values())
        out.append((name or str(data["title"]), *_arms(data, s)))
        if s["equal_gain"]:
            title = f"at equal gain, against {data['reference']}"
            out.append((f"{name}: {title}" if name else title[0].upper() + title[1:], *_equal(data, s)))
    return out


def study_markdown(data: Mapping[str, Any]) -> str:
    """The tables in Markdown, and the command."""
    lines = [f"# {data['title']}", "", *(line for note in _notes(data) for line in (note, ""))]
    for title, columns, rows in study_tables(data):
        lines += [f"## {title}", ""]
        for row in (columns, ["---"] * len(columns), *rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return "\n".join([*lines, "```", str(data["command"]), "```", ""])


def study_html(data: Mapping[str, Any]) -> str:
    """The report as HTML."""
    settings = []
    for s in data["settings"]:
        columns, rows = _arms(data, s)
        equal_columns, equal_rows = _equal(data, s)
        settings.append(
            {
                "title": ", ".join(s["setting"].values()) or "All arms",
                "lead": _lead(s),
                "figure": _figure(data, s),
                "columns": columns,
                "rows": rows,
                "equal_columns": equal_columns,
                "equal_rows": equal_rows,
            }
        )
    runs = data["runs"]
    broken = [r["folder"] for r in runs if not r["proof_ok"]]
    took = duration(sum(r["seconds"] for r in runs))
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            title=data["title"],
            facts=f"{len(runs)} runs · {took} of run time",
            verdict=_verdict(data),
            broken=broken,
            failed=[(f["run"], f["error"]) for f in data["failed"]],
            settings=settings,
            notes=_notes(data),
            equal_lead=f"Each arm against {data['reference']} at the highest gain that both reach with every seed, read off "
            "linearly on the front of each one's own learning rates, seed by seed; an arm with one learning rate, at what "
            "it gained. Paired t tests over seeds, Holm's correction. The last column is the difference averaged over all "
            "gains that both span.",
            command=data["command"],
            run_columns=["run", "tokens", "read before", "training time", "trained", "proof"],
            runs=[
                [
                    r["folder"],
                    numbers.integer(r["tokens"]),
                    "-" if r.get("tokens_before") is None else numbers.integer(r["tokens_before"]),
                    duration(r["train_seconds"]),
                    numbers.percent(r["trainable_fraction"]),
                    "holds" if r["proof_ok"] else "FAILED",
                ]
                for r in runs
            ],
        )
    )


def _unit(data: Mapping[str, Any]) -> str:
    """Of what is kept: relative if several results are averaged."""
    return "share" if len(data["kept"]) > 1 else str(data["kept"][0]["unit"])


def _name(metric: Mapping[str, Any]) -> str:
    role, name, task = str(metric["key"]).split("/", 2)
    return f"{role} {numbers.metric_name(name)}" + (f" ({task})" if name != "bits_per_byte" else "")


def _kept_name(data: Mapping[str, Any]) -> str:
    kept = data["kept"]
    return _name(kept[0]) if len(kept) == 1 else f"mean relative change of {len(kept)} results"


def _arms(data: Mapping[str, Any], s: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["arm", "learning rate", f"gained: {_name(data['gained'])}", f"kept: {_kept_name(data)}"]
    columns += ["seeds", "front", "trained", "time"]
    kept = data["kept"][0] if len(data["kept"]) == 1 else None
    rows = []
    for r in s["rows"]:
        rate = r["learning_rate"]
        change = _change(r["kept"], _unit(data))
        if kept is not None:
            change = f"{numbers.value(r['after'][kept['key']][0], kept['unit'])} ({change})"
        rows.append(
            [
                r["arm"],
                "-" if rate is None else numbers.scientific(rate),
                _change(r["gained"], data["gained"]["unit"]),
                change,
                str(r["seeds"]),
                "yes" if r["on_front"] else "",
                numbers.percent(r["trainable_fraction"]),
                duration(r["seconds"]),
            ]
        )
    return columns, rows


def _equal(data: Mapping[str, Any], s: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    unit, gained = _unit(data), data["gained"]["unit"]
    columns = [
        "arm",
        "at gain",
        "its change",
        f"{data['reference']} there",
        "difference",
        "p",
        "p (Holm)",
        "over shared gains",
    ]
    rows = []
    for r in s["equal_gain"]:
        level = numbers.change(r["gained"], None, None, gained)
        if "note" in r:
            rows.append([r["arm"], level, r["note"], *"-----"])
            continue
        shown = [_change(r[key], unit) for key in ("kept", "reference_kept", "difference")]
        over = _change(r["over"]["difference"], unit) if "over" in r else "-"
        rows.append([r["arm"], level, *shown, numbers.p_value(r.get("p")), numbers.p_value(r.get("p_holm")), over])
    return columns, rows


def _lead(s: Mapping[str, Any]) -> str:
    seeds = {r["seeds"] for r in s["rows"]}
    bars = (
        "One seed each, no intervals."
        if seeds == {1}
        else "Crosses are 95 % t intervals over seeds"
        + (", small dots single seeds." if any("points" in r for r in s["rows"]) else ".")  # not in older results.json
    )
    if len(s["rows"]) > MANY:
        bars += " Named are the front and the reference; small grey marks are the other arms."
    return f"Right and up is better. {bars} The dashed line is the front: no arm beats these in both."


def _figure(data: Mapping[str, Any], s: Mapping[str, Any]) -> Any:
    unit, gained = _unit(data), data["gained"]
    y_factor, x_factor = (100 if u == "share" else 1 for u in (unit, gained["unit"]))
    arms = []
    for r in s["rows"]:
        label = r["arm"] if r["learning_rate"] is None else f"{r['arm']} {numbers.scientific(r['learning_rate'])}"
        faint = len(s["rows"]) > MANY and not r["on_front"] and r["arm"] != data["reference"]
        seeds = tuple((x_factor * x, y_factor * y) for x, y in r.get("points", ()))
        arms.append(Arm(label, _times(r["gained"], x_factor), _times(r["kept"], y_factor), seeds, r["on_front"], faint))
    points = " (points)"
    return front_figure(
        arms,
        x_label=f"gained: {_name(gained)}" + (points if x_factor == 100 else ""),
        y_label=f"kept: change of {_kept_name(data)}" + (points if y_factor == 100 else ""),
        x_higher_is_better=True,
        y_reference=(0.0, "the source model", "the source model: nothing lost"),
    )


def _times(values: Sequence[float | None], factor: float) -> Interval:
    mean, low, high = values
    assert mean is not None
    return factor * mean, None if low is None else factor * low, None if high is None else factor * high


def _change(values: Sequence[float | None], unit: str) -> str:
    mean, low, high = values
    assert mean is not None
    return numbers.change(mean, low, high, unit)


def _verdict(data: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for s in data["settings"]:
        names = dict.fromkeys(r["arm"] for r in s["rows"] if r["on_front"])
        where = ", ".join(s["setting"].values())
        parts.append((f"{where}: o" if where else "O") + f"n the front: {_listed(names)}.")
        shown = [r for r in s["equal_gain"] if r.get("p_holm") is not None and r["p_holm"] < 0.05]
        worse = [r["arm"] for r in shown if r["difference"][0] < 0]
        better = [r["arm"] for r in shown if r["difference"][0] > 0]
        if better:
            parts.append(f"Better than {data['reference']} at equal gain (Holm, p < 0.05): {_listed(better)}.")
        if worse:
            parts.append(f"Worse: {_listed(worse)}.")
        if not any("p" in r for r in s["equal_gain"]):
            if max(r["seeds"] for r in s["rows"]) == 1:
                parts.append("One seed: nothing is tested.")
            else:
                parts.append(f"No arm could be tested against {data['reference']} at equal gain.")
        elif not better and not worse:
            parts.append(f"At equal gain no difference from {data['reference']} is shown.")
    return " ".join(parts)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ("; " if any("," in n for n in names) else ", ").join(names)


def _notes(data: Mapping[str, Any]) -> list[str]:
    kept = "What is kept" if len(data["kept"]) == 1 else "What is kept (mean relative change)"
    notes = [
        "Differences are after minus before, signed so that higher is better; intervals are 95 % t intervals over seeds.",
        f"{kept}: {', '.join(k['key'] for k in data['kept'])}. What is gained: {data['gained']['key']}.",
    ]
    budgets = sorted({r["tokens"] for s in data["settings"] for r in s["rows"]})
    if len(budgets) == 1:
        notes.append(f"Every run read {budgets[0]:,} tokens; replayed and anchored ones count.")
    else:
        notes.append(f"Runs read between {budgets[0]:,} and {budgets[-1]:,} tokens; replayed and anchored ones count.")
    before: dict[int, dict[str, None]] = {}  # tokens -> arms, each once and in order
    for run in data["runs"]:
        if run.get("tokens_before"):
            before.setdefault(run["tokens_before"], {})[run["arm"]] = None
    if before:
        told = "; ".join(f"{_listed(arms)} {read:,}" for read, arms in sorted(before.items()))
        notes.append(f"Read before the first step, for scores, a warm-up or a guard, and in no budget: {told}.")
    if data["missing"]:
        notes.append(f"{data['missing']} runs of the study are missing here.")
    if data["failed"]:
        notes.append(f"{len(data['failed'])} runs failed.")
    return notes
