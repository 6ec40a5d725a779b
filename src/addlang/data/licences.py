"""Licences of data: which forbid commercial use, and those of data sets that are known by name."""

from __future__ import annotations

import re

_NONCOMMERCIAL = re.compile(
    r"\bnc\b|non[-\s]?commercial|research[-\s](?:only|use|purposes)|academic|not\s+for\s+commercial", re.IGNORECASE
)
# as their own pages state them
KNOWN = {
    "tatsu-lab/alpaca": "CC BY-NC 4.0",
    "Open-Orca/OpenOrca": "MIT",
}


def licence_of(path: str, given: str | None) -> str | None:
    """The licence that a recipe gives, or that of a hub data set that addlang knows."""
    return given or {name.lower(): text for name, text in KNOWN.items()}.get(path.lower())


def forbids_commercial_use(licence: str) -> bool:
    """Whether a licence, as it is named, is for non-commercial use only."""
    return _NONCOMMERCIAL.search(licence.replace("_", "-")) is not None
