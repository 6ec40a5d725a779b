"""The embedded lab: a generated world, a tiny base model that knows it, and experiments that take minutes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def lab_model_path() -> Path:
    """The directory of the shipped base model, an ordinary Hugging Face checkpoint."""
    return Path(str(files("addlang.lab").joinpath("model")))
