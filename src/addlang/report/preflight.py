"""A preflight as sections of tables and sentences, and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addlang.preflight.tokens import FRAGMENTS, UNKNOWN
from addlang.progress import duration
from addlang.report import datacard, numbers
from addlang.report.files import write_text


@dataclass(frozen=True)
class Table:
    """``numbers_from``: columns from this one on hold numbers; those before it hold text, which may wrap."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 1


@dataclass(frozen=True)
class Section:
    """One part of a preflight. ``state``: good, bad, unsure or none."""

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = field(default=())
    state: str = "none"


def sections(result: dict[str, Any]) -> list[Section]:
    """Every part, the recommendation first."""
    return [
        _advice(result),
        _answers(result),
        _probes(result),
        _model(result),
        _data(result),
        _similarity(result),
        _conflict(result),
        _plan(result),
        *([Section("Notes", result["notes"])] if result["notes"] else []),
    ]


def _missing(title: str) -> Section:
    return Section(title, ["Not measured; see the notes."], state="none")


def _advice(result: dict[str, Any]) -> Section:
    advice = result["advice"]
    if advice is None or advice["candidate"] is None:
        reasons = ["No recommendation."] if advice is None else advice["reasons"]
        return Section("Recommendation", reasons, state="unsure")
    c = advice["candidate"]
    keep = result["settings"]["keep"]
    said = c["forecast"]
    state = (
        "unsure"
        if said["lost"] is None
        else "good"
        if said["high"] <= 1 - keep
        else "bad"
        if said["low"] > 1 - keep
        else "unsure"
    )
    why = Table(
        ["choice", "recommended", "reason"], [[x["what"], x["value"], x["reason"]] for x in advice["choices"]], 3
    )
    return Section(
        "Recommendation",
        [f"{c['label']} at learning rate {c['learning_rate']:g}.", *advice["reasons"]],
        [why],
        state,
    )


def _answers(result: dict[str, Any]) -> Section:
    rows = [[a["question"], a["answer"], a["why"]] for a in result["answers"] or []]
    return Section("Can it be done?", tables=[Table(["question", "answer", "what it rests on"], rows, 3)])


def _probes(result: dict[str, Any]) -> Section:
    probes = result["probes"]
    if not probes:
        return _missing("Forecast of what is lost")
    rows = [
        [
            ("planned: " if p["planned"] else "") + p["label"], f"{p['learning_rate']:g}", f"{p['gained']:+.3f}", f"{p['shift']:.3f}",
            _forecast(p["forecast"]), f"{p['seconds_per_step']:.3g} s",
        ]
        for p in probes
    ]  # fmt: skip
    why = list(dict.fromkeys(line for p in probes for line in p["forecast"]["why"]))
    lines = [
        f"Probes of {result['settings']['probe_steps']} steps; the forecast is for all {result['settings']['steps']:,} steps, "
        "as the share of the source's scores that is lost, with 90 % intervals.",
        *([f"The planned setting was not probed: {result['not_probed']}"] if "not_probed" in result else []),
        *why[:6],
    ]
    columns = ["setting", "learning rate", "target gained", "source changed", "source lost, forecast", "per step"]
    return Section("Forecast of what is lost", lines, [Table(columns, rows)])


def _forecast(said: dict[str, Any]) -> str:
    if said["lost"] is None:
        return "cannot tell"
    return f"{numbers.percent(said['lost'])} [{numbers.percent(said['low'])}, {numbers.percent(said['high'])}]"


def _model(result: dict[str, Any]) -> Section:
    model = result["model"]
    if model is None:
        return _missing("The model")
    scores = [
        [
            r["task"],
            r["role"],
            numbers.metric_name(r["metric"]),
            numbers.value(r["value"], r["unit"]),
            numbers.integer(r["n"]),
        ]
        for r in model["scores"]
    ]
    scores += [[task, "-", "not run", reason, "-"] for task, reason in model["not_run"]]
    fits = []
    for role in ("source", "target"):
        f = model["tokenizer"][role]
        per_word = "-" if f["tokens_per_word"] is None else f"{f['tokens_per_word']:.2f}"
        fits.append(
            [
                role,
                per_word,
                f"{f['tokens_per_character']:.2f}",
                f"{f['bytes_per_token']:.2f}",
                numbers.percent(f["fragments"]),
                numbers.percent(f["unknown"]),
            ]
        )
    source, target = (model["tokenizer"][r] for r in ("source", "target"))
    lines = [f"{model['parameters'] / 1e6:,.1f} million parameters."]
    words = [t["tokens_per_word"] for t in (source, target)]
    if all(words):
        lines.append(f"A target word costs {words[1] / words[0]:.1f} times as many tokens as a source word.")
    state = "none"
    if target["unknown"] > UNKNOWN:
        lines.append(
            f"{numbers.percent(target['unknown'])} of the target's tokens are unknown to the tokenizer: that text cannot be learnt."
        )
        state = "bad"
    if target["fragments"] > FRAGMENTS:
        lines.append(
            f"{numbers.percent(target['fragments'])} of the target's bytes stand in pieces of characters: expect slow learning and long sequences."
        )
        state = "unsure" if state == "none" else state
    columns = ["text", "tokens per word", "per character", "bytes per token", "in pieces of characters", "unknown"]
    tables = [Table(["task", "role", "metric", "value", "n"], scores)] if scores else []
    return Section("The model", lines, [*tables, Table(columns, fits)], state)


def _data(result: dict[str, Any]) -> Section:
    card = result["data"]
    if card is None:
        return _missing("The data")
    unstated = [s["path"] for s in card["sources"] if datacard.licence(s) == "not stated"]
    lines = [
        datacard.overlap(card) or "No evaluation items were searched for: no task has items of its own.",
        *([f"No licence is stated for {', '.join(unstated)}."] if unstated else []),
        *map(str, card.get("notes") or []),
    ]
    return Section("The data", lines, [Table(*datacard.amounts(card)), Table(*datacard.contents(card))])


def _similarity(result: dict[str, Any]) -> Section:
    part = result["similarity"]
    if part is None:
        return _missing("Similarity")
    lines, tables = [], []
    if part["des"] is not None:
        d = part["des"]
        lines.append(
            f"DES of source and target prompts: {d['value']:.3f} [{d['low']:.3f}, {d['high']:.3f}], by {d['encoder']}."
        )
        if not d["language_agnostic"]:
            lines.append("That encoder does not find translations: the value is one of language and form too.")
    if part["forms"] is not None:
        f = part["forms"]
        lines.append(
            f"Forms of the model's replies to {f['replies']} target prompts and of the data's answers overlap by {numbers.percent(f['overlap'], 0)}."
        )
        names = list(dict.fromkeys([*f["model"], *f["data"]]))
        tables.append(
            Table(
                ["form", "model", "data"],
                [
                    [n, numbers.percent(f["model"].get(n, 0.0), 0), numbers.percent(f["data"].get(n, 0.0), 0)]
                    for n in names
                ],
            )
        )
        codes = list(dict.fromkeys([*f["model_languages"], *f["data_languages"]]))[:5]
        if codes:
            tables.append(
                Table(
                    [
                        "language of sentences",
                        f"model ({f['model_judged']} long enough)",
                        f"data ({f['data_judged']} long enough)",
                    ],
                    [
                        [
                            c,
                            numbers.percent(f["model_languages"].get(c, 0.0), 0),
                            numbers.percent(f["data_languages"].get(c, 0.0), 0),
                        ]
                        for c in codes
                    ],
                )
            )
    if not lines:
        return _missing("Similarity")
    return Section("Similarity", lines, tables)


def _conflict(result: dict[str, Any]) -> Section:
    c = result["conflict"]
    if c is None:
        return _missing("Gradient conflict")
    direction = "against" if c["cosine"] < -0.02 else "with" if c["cosine"] > 0.02 else "at right angles to"
    lines = [
        f"The model's own loss on the target data (of conversations: the answers) is {c['target_loss']:.2f} nats per token, "
        f"on the source text {c['source_loss']:.2f}.",
        f"The target's gradient points {direction} the source's (cosine {c['cosine']:+.3f}); below 0 the first steps raise the source's loss.",
    ]
    rows = [[g, f"{v:+.3f}"] for g, v in sorted(c["groups"].items(), key=lambda kv: kv[1])]
    return Section("Gradient conflict", lines, [Table(["module", "cosine"], rows)])


def _plan(result: dict[str, Any]) -> Section:
    plan = result["plan"]
    if plan is None:
        return _missing("Memory and time")
    time = (
        "not known, because the planned setting was not probed"
        if plan["seconds"] is None
        else f"about {duration(plan['seconds'])} on {plan['device']}, evaluation not counted"
    )
    lines = [
        f"{plan['steps']:,} steps, {plan['tokens']:,} tokens; {numbers.percent(plan['trainable_fraction'])} of the parameters are trained.",
        f"Time: {time}. Disk: {plan['disk_bytes'] / 2**30:.2f} GiB.",
    ]
    rows = [[k.replace("_", " "), f"{v / 2**30:.3f} GiB"] for k, v in plan["memory"].items()]
    return Section("Memory and time", lines, [Table(["memory per device", "size"], rows)])


def write_preflight(result: dict[str, Any], path: Path) -> Path:
    """Write the page, atomically.

    Raises:
        AddlangError: the file cannot be written.
    """
    write_text(path, preflight_html(result))
    return path


def preflight_html(result: dict[str, Any]) -> str:
    """The page."""
    from addlang.report.html import environment

    settings = result["settings"]
    return (
        environment()
        .get_template("preflight.html.j2")
        .render(
            model="the lab model" if settings["model"] == "lab" else settings["model"],
            target=numbers.language_name(settings["language"]),
            plan=f"{settings['strategy']['name']} at learning rate {settings['learning_rate']:g}, {settings['tokens']:,} tokens",
            sections=sections(result),
        )
    )
