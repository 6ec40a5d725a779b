"""Data that comes with addlang."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from addlang.errors import AddlangError, did_you_mean

NAMES = ("calibration_en", "source_en", "prompts_en")


def builtin(name: str) -> Path:
    """Path of a built-in set: ``calibration_en`` (messages), ``source_en`` (text), ``prompts_en`` (prompt, category).

    Raises:
        AddlangError: there is no such set.
    """
    if name not in NAMES:
        raise AddlangError(f"there is no built-in data set '{name}'", did_you_mean(name, NAMES))
    return Path(str(files("addlang.data") / "builtin" / f"{name}.jsonl"))
