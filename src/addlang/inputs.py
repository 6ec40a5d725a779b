"""What a run reads from local files, by content, so that a run is not taken for one of other data or another model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.recipe import Recipe


def digests(recipe: Recipe, base_dir: Path | None) -> dict[str, str]:
    """Local file or directory, as the recipe names it -> hash of what it holds, wherever it lies.

    What is not there is left out, and so is what has no file of its own: data of the hub, ``lab`` and ``lab://``.
    """
    found = {}
    for name, files in _named(recipe, base_dir):
        if files and all(file.is_file() for file in files):
            found[name] = _digest(files)
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs; what only one of them knows does not."""
    return [name for name, digest in before.items() if now.get(name, digest) != digest]


def _named(recipe: Recipe, base_dir: Path | None) -> Iterator[tuple[str, list[Path]]]:
    from addlang.data.sources import LAB, read_rows
    from addlang.evaluate.lm_eval import file_of
    from addlang.schema import DatasetSpec

    models = [recipe.model_name_or_path]
    models += [p.strategy.reference_model for p in recipe.phases if "reference_model" in p.strategy.requires()]
    for model in models:
        yield model, _model_files(Path(model).expanduser())
    for path in dict.fromkeys(_paths(recipe.resolved())):
        if not path.startswith(LAB):
            try:
                yield path, read_rows(DatasetSpec(path=path), base_dir=base_dir).files or []
            except AddlangError:
                continue  # it is not there
    for task in recipe.evaluation.tasks:
        try:
            file = file_of(task, base_dir)
        except AddlangError:
            continue
        yield task, [file] if file else []
    if recipe.chat_template is not None and (template := recipe.template_path(base_dir)):
        yield recipe.chat_template, [template]


def _paths(node: Any) -> Iterator[str]:
    """Path of every data set and of the prompts."""
    if isinstance(node, list):
        for item in node:
            yield from _paths(item)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("path", "prompts") and isinstance(value, str):
                yield value
            else:
                yield from _paths(value)


def _model_files(directory: Path) -> list[Path]:
    from addlang.models import SNAPSHOT_PATTERNS

    return sorted({file for pattern in SNAPSHOT_PATTERNS for file in directory.glob(pattern)})


def _digest(files: list[Path]) -> str:
    """Hash of the files' contents and, of several, their names."""
    contents = []
    for file in files:
        stat = file.stat()
        contents.append(_content(file, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    if len(contents) == 1:
        return contents[0]
    together = "".join(f"{file.name} {content}\n" for file, content in zip(files, contents, strict=True))
    return hashlib.sha256(together.encode()).hexdigest()[:16]


@functools.cache
def _content(file: Path, *_stat: int) -> str:
    """Hash of a file's content; many runs of a study name the same one, which may be large."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
