"""Data cards as tables and sentences: for the report, the model card and ``addlang data card``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addlang.report import numbers

LICENCES = 3  # named in a table; state.json has them all
Table = tuple[list[str], list[list[str]]]


def amounts(card: Mapping[str, Any]) -> Table:
    """What each source holds, and what was drawn from it."""
    columns = ["source", "role", "licence", "documents", "duplicates left out", "bytes", "tokens", "share", "epochs"]
    rows = []
    for s in card.get("sources") or []:
        share, epochs = s.get("share"), s.get("epochs")
        rows.append(
            [
                str(s.get("path")),
                str(s.get("role") or "-"),
                licence(s),
                numbers.integer(s.get("documents", s.get("rows"))),
                numbers.integer(left_out(s)),
                numbers.integer(s.get("bytes")),
                numbers.integer(s.get("tokens")),
                numbers.percent(share) if isinstance(share, int | float) else "-",
                f"{epochs:.2f}" if isinstance(epochs, int | float) else "-",
            ]
        )
    return columns, rows


def contents(card: Mapping[str, Any]) -> Table:
    """Languages and lengths of each source, and what did not fit."""
    columns = [
        "source", "declared", "detected (documents judged)", "tokens per document: 5 %", "median", "95 %", "longest",
        "too long: dropped", "cut",
    ]  # fmt: skip
    rows = []
    for s in card.get("sources") or []:
        length = s.get("lengths") or {}
        rows.append(
            [
                str(s.get("path")),
                str(s.get("language") or "-"),
                detected(s),
                *(numbers.integer(length.get(key)) for key in ("p5", "p50", "p95", "p100")),
                numbers.integer(s.get("dropped")),
                numbers.integer(s.get("truncated")),
            ]
        )
    return columns, rows


def detected(source: Mapping[str, Any]) -> str:
    """``ha 97.1 %, en 2.4 % (of 1,902)``: the languages with at least one per cent, the most frequent one in any case."""
    languages = source.get("languages") or {}
    found = languages.get("detected") or {}
    shown = [(code, share) for n, (code, share) in enumerate(found.items()) if share >= 0.01 or n == 0]
    if not shown:
        return "-"
    listed = ", ".join(f"{code} {numbers.percent(share)}" for code, share in shown)
    return f"{listed} (of {numbers.integer(languages.get('judged'))})"


def left_out(source: Mapping[str, Any]) -> int | None:
    """Copies and near copies that were not packed; None where nobody counted."""
    known = [source.get(key) for key in ("duplicates", "copies_across", "near_copies")]
    return sum(n for n in known if n is not None) if any(n is not None for n in known) else None


def language_shares(card: Mapping[str, Any]) -> str:
    """``es 40.0 %, ja 60.0 %`` of the training tokens; empty for a single language."""
    shares: dict[str, float] = {}
    for s in card.get("sources") or []:
        code = str(s.get("language") or "-")
        shares[code] = shares.get(code, 0.0) + float(s.get("share") or 0)
    if len(shares) < 2 or not sum(shares.values()):
        return ""
    return ", ".join(f"{code} {numbers.percent(share)}" for code, share in sorted(shares.items()))


def overlap(card: Mapping[str, Any]) -> str:
    """What the search for evaluation items found; empty where none was made."""
    found = card.get("overlap") or {}
    if not found:
        return ""
    looked = ", ".join(f"{task} {numbers.integer(n)}" for task, n in (found.get("texts") or {}).items())
    rows = found.get("rows") or 0
    result = "No training row contains one" if not rows else f"{numbers.integer(rows)} training row(s) contain one"
    short = found.get("too_short") or 0
    return (
        f"Searched for texts of evaluation items ({looked}). {result}. The rule: {found.get('rule')}. "
        f"{numbers.integer(short)} texts are too short to be searched for."
    )


def licence(source: Mapping[str, Any]) -> str:
    """Licence of a data source as it was given; ``not stated`` otherwise."""
    given = source.get("licenses") or source.get("license")
    if isinstance(given, dict):
        if len(given) == 1:
            return str(next(iter(given)))
        most = sorted(given.items(), key=lambda item: -item[1])
        rest = f", {len(most) - LICENCES} more" if len(most) > LICENCES else ""
        return ", ".join(f"{name} ({numbers.integer(n)})" for name, n in most[:LICENCES]) + rest or "not stated"
    if isinstance(given, list | tuple):
        return ", ".join(map(str, given))
    return str(given) if given else "not stated"
