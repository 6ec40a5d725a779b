"""Data and chat templates that come with addlang."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from addlang.errors import AddlangError, did_you_mean

NAMES = ("calibration_en", "source_en", "prompts_en")
CHAT_TEMPLATES = ("alpaca", "chatml", "llama3", "mistral")


def builtin(name: str) -> Path:
    """Path of a built-in set: ``calibration_en`` (messages), ``source_en`` (text), ``prompts_en`` (prompt, category).

    Raises:
        AddlangError: there is no such set.
    """
    if name not in NAMES:
        raise AddlangError(f"there is no built-in data set '{name}'", did_you_mean(name, NAMES))
    return Path(str(files("addlang.data") / "builtin" / f"{name}.jsonl"))


def builtin_template(name: str) -> Path | None:
    """Path of a built-in chat template, or None if it is none of ``CHAT_TEMPLATES``.

    ``alpaca`` and ``mistral`` are written in plain text and need no token but eos, so they suit any base model;
    ``chatml`` and ``llama3`` suit models whose vocabulary has their control tokens.
    """
    return Path(str(files("addlang.data") / "templates" / f"{name}.jinja")) if name in CHAT_TEMPLATES else None
