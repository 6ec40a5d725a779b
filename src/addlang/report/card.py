"""The model card: ``README.md`` with YAML front matter. Strings from data are escaped for Markdown and HTML."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from addlang.report import numbers
from addlang.report.datacard import detected, licence, overlap
from addlang.report.files import RunData, read_run, write_text
from addlang.report.method import method_of
from addlang.report.phases import phase_notes
from addlang.report.verdict import ROLES, proof_sentence, proof_totals, reply_metric, role_name, rows_of, verdict_of

CARD = "README.md"
_ABSOLUTE = re.compile(r"(?<![\w:/.~])/(?:[^\s,;|/]+/)+([^\s,;|/]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def write_model_card(out_dir: str | os.PathLike[str]) -> Path:
    """Write ``README.md`` of a run directory, atomically."""
    path = Path(out_dir) / CARD
    write_text(path, model_card(out_dir))
    return path


def escape(text: object) -> str:
    """Text as itself in Markdown: no markup, no HTML, one line."""
    flat = " ".join(str(text).split())
    flat = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", flat)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def published(text: object) -> str:
    """Text without the directories of absolute paths: a card is read elsewhere, and they tell only where it was made."""
    if os.path.isabs(str(text)):
        return Path(str(text)).name or str(text)
    return _ABSOLUTE.sub(r"\1", str(text))


def is_hub_id(model: str) -> bool:
    """``owner/name`` that is no local path."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def model_card(out_dir: str | os.PathLike[str]) -> str:
    """The card of a run directory as Markdown."""
    run = read_run(out_dir)
    source, target = numbers.language_name(run.source_language), numbers.language_name(run.language)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(run), sort_keys=False, allow_unicode=True)}---",
        f"# {'The lab model' if run.model == 'lab' else escape(published(run.model))} adapted to {escape(target)}",
        escape(verdict_of(run)),
        "## Method\n\n" + _method(run),
        f"## {escape(source)} kept, {escape(target)} gained\n\n" + _comparison(run),
        "## Data\n\n" + _data(run),
        "## Proof\n\n" + _proof(run),
        "## Check it yourself\n\n" + _verify(run),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(run)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: RunData) -> dict[str, Any]:
    names = [method_of(run, str(p.get("name")), p)["strategy"] for p in run.phases]
    data: dict[str, Any] = {"language": list(dict.fromkeys([run.source_language, run.language]))}
    if run.state.get("license"):
        data["license"] = str(run.state["license"])
    data["library_name"] = "transformers"
    data["pipeline_tag"] = "text-generation"
    if is_hub_id(run.model):  # the hub refuses a card whose base model is no hub id
        data["base_model"] = run.model
        data["base_model_relation"] = "finetune"
    data["tags"] = list(dict.fromkeys(["addlang", "continual-pretraining", "multilingual", *names]))
    return data


def _method(run: RunData) -> str:
    lines = [f"Source model: {escape(published(run.model))}."]
    for p in run.phases:
        m = method_of(run, str(p.get("name")), p)
        summary = f": {escape(m['summary'])}" if m["summary"] else ""
        options = "; ".join(f"{escape(k)} {escape(published(v))}" for k, v in m["options"])
        lines.append(
            f"- **{escape(p.get('name'))}**: {escape(m['strategy'])}{summary}. Paper: {escape(m['paper'])}. {options}."
        )
        lines += [f"  {escape(published(note))}" for note in phase_notes(run, str(p.get("name")))]
    return "\n".join([lines[0], "", *lines[1:]]) if lines[1:] else lines[0]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    return "\n".join([head, *("| " + " | ".join(escape(c) for c in row) + " |" for row in rows)])


def _comparison(run: RunData) -> str:
    not_run = [
        f"- not run: {escape(n.get('task'))} ({escape(n.get('reason'))})" for n in run.state.get("not_run") or []
    ]
    if not run.comparison:
        return "\n".join(["Not run: there is no comparison of before and after.", *not_run])
    rows = [
        [
            role_name(run, c.role),
            c.task,
            reply_metric(c) + (" (higher is better)" if c.higher_is_better else " (lower is better)"),
            numbers.value(c.before, c.unit),
            numbers.value(c.after, c.unit),
            numbers.difference(c.difference, c.low, c.high, c.unit),
            numbers.relative(c.relative, c.relative_low, c.relative_high),
            numbers.integer(c.n),
        ]
        for role in ROLES
        for c in rows_of(run, role)
    ]
    columns = ["", "task", "metric", "before", "after", "difference [95 %]", "relative [95 %]", "n"]
    text = (
        _table(columns, rows)
        + "\n\nIntervals are 95 %, paired by item; one that includes zero shows neither a loss nor a gain."
    )
    return "\n".join([text, "", *not_run]) if not_run else text


def _data(run: RunData) -> str:
    rows, notes = [], []
    for phase, card in (run.state.get("data") or {}).items():
        for s in card.get("sources") or []:
            rows.append(
                [
                    phase,
                    published(s.get("path")),
                    str(s.get("role") or "-"),
                    licence(s),
                    numbers.integer(s.get("documents", s.get("rows"))),
                    numbers.integer(s.get("tokens")),
                    detected(s),
                ]
            )
        notes += [f"{escape(phase)}: {escape(text)}" for text in [overlap(card)] if text]
    if not rows:
        return "No data card was written."
    table = _table(["phase", "source", "role", "licence", "documents", "tokens", "languages detected"], rows)
    return "\n\n".join([table, *notes])


def _proof(run: RunData) -> str:
    proof = proof_totals(run)
    text = proof_sentence(proof)
    text = text[0].upper() + text[1:] + "."
    if proof is None:
        return text
    share = f" ({numbers.percent(proof.moved / proof.trainable)})" if proof.trainable else ""
    moved = f"Of {proof.trainable:,} trainable elements {proof.moved:,} moved{share}."
    return f"{text} {moved} Compared bit by bit with the source checkpoint."


def _verify(run: RunData) -> str:
    out = shlex.quote(run.directory.name or ".")
    return f"    addlang verify {_line(out)}\n    addlang run {_line(out)}/recipe.yaml --output_dir NEW"


def _line(text: str) -> str:
    """Keep an indented code block on its line."""
    return " ".join(text.splitlines())


def _limits(run: RunData) -> list[str]:
    source = escape(numbers.language_name(run.source_language))
    lines = [
        f"What was not measured is not known to be kept: the table above is all that is claimed about {source}.",
        "Safety behaviour can be lost by any further training"
        + (
            "; see the safety rows above."
            if any(c.role == "safety" for c in run.comparison or [])
            else ", and was not measured."
        ),
        "One run, one seed: another seed gives another model; the intervals speak about items, not about seeds.",
    ]
    lines += [f"Warning of the run: {escape(published(w))}" for w in run.state.get("warnings") or []]
    if run.state.get("status") != "finished":
        lines.insert(0, "The run that made this model is not finished.")
    return lines
