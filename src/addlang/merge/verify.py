"""``addlang verify`` of a merged model: the merge, computed again and compared bit for bit with what lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.merge.layout import stored_weights
from addlang.merge.spec import parse
from addlang.merge.write import FORMAT, RECORD, Merging
from addlang.models import Checkpoint


def is_merge(directory: Path) -> bool:
    """Whether a directory holds the result of a merge."""
    return (directory / RECORD).is_file()


def read_record(directory: Path) -> dict[str, Any]:
    """``merge.json`` of a merged model.

    Raises:
        AddlangError: it is torn or of another version.
    """
    file = directory / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError("another format")
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AddlangError(f"{file} cannot be used: {error}", "merge again with --overwrite") from error


def verify_merge(directory: Path) -> dict[str, Any]:
    """``{"ok", "tensors", "differing"}``: names of the tensors that are not what the recipe gives.

    Raises:
        AddlangError: a merged model is missing, or its weights are not those that were merged.
    """
    from addlang.freeze.proof import bits
    from addlang.progress import progress

    record = read_record(directory)
    # where a model was, if it cannot be found by its name from here
    places = {m["model"]: Path(m["directory"]) for m in record["models"] if Path(m["directory"]).is_dir()}
    merging = Merging(parse(record["merge"], where=str(directory / RECORD)), directories=places)
    for model in record["models"]:
        source = merging.models[model["model"]]
        if source.checkpoint.hash != model["hash"]:
            raise AddlangError(
                f"'{source.directory}' is not the model that was merged: its weights have hash {source.checkpoint.hash}, not {model['hash']}",
                "restore it, or merge again",
            )
    written = Checkpoint(directory)
    names = stored_weights(merging.stated.checkpoint)
    differing = sorted(set(names) ^ set(written.header))
    with progress("merging again", total=len(names), unit="tensors") as bar:
        for number, name in enumerate(n for n in names if n in written.header):
            if not _same(merging, written, name, bits):
                differing.append(name)
            bar.update(number + 1)
    return {"ok": not differing, "tensors": len(names), "differing": differing, "hash": written.hash}


def _same(merging: Merging, written: Checkpoint, name: str, bits: Any) -> bool:
    shape = merging.models.layout.shapes[merging.parameter(name)]
    if written.header[name] != (merging.dtype(name), shape):
        return False
    start = 0
    same = True
    for block in merging.blocks(name):
        stored = written.rows(name, start, start + block.shape[0])
        same = same and bool((bits(stored) == bits(block)).all())
        start += block.shape[0]
    return same
