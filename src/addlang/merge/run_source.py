"""The run behind a trained model."""

from __future__ import annotations

from pathlib import Path

from addlang import strictyaml
from addlang.errors import AddlangError
from addlang.recipe import Recipe

FILE = "recipe.yaml"


def recipe_of_run(directory: Path) -> Recipe | None:
    """The recipe of a run directory; None if it is none."""
    file = directory / FILE
    if not file.is_file():
        return None
    try:
        return Recipe.parse(strictyaml.read(file.read_text(encoding="utf-8")), where=str(file))
    except (OSError, ValueError) as error:
        if isinstance(error, AddlangError):
            raise
        raise AddlangError(f"{file} cannot be read: {error}", "name the source model with --source") from error


def source_of_run(directory: Path) -> str:
    """Name of the model that a run started from.

    Raises:
        AddlangError: the directory holds no run.
    """
    recipe = recipe_of_run(directory)
    if recipe is None:
        raise AddlangError(
            f"'{directory}' is no run of addlang, so what it was trained from is not known", "name it with --source"
        )
    return recipe.model_name_or_path if recipe.revision is None else f"{recipe.model_name_or_path}@{recipe.revision}"
