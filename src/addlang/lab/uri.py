"""``lab://KIND?documents=N&seed=S``: text of the lab's world wherever a recipe names a data set."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from addlang.errors import AddlangError, did_you_mean
from addlang.lab.world import LANGUAGES, documents, write_dataset

SCHEME = "lab://"
DEFAULTS = {"documents": "3000", "seed": "11", "split": "train"}


def dataset_file(uri: str, cache: Path) -> Path:
    """The rows that ``uri`` names as a file below ``cache``, made once.

    Args:
        uri: the kind is one of :func:`addlang.lab.world.write_dataset`; options are ``documents``, ``seed`` and, for raw
            text, ``split`` (train or eval; no document is in both).

    Raises:
        AddlangError: an unknown kind or option, or a number that is none.
    """
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for key in options:
        if key not in DEFAULTS:
            raise AddlangError(f"{uri}: unknown option '{key}'", did_you_mean(key, DEFAULTS))
    options = {**DEFAULTS, **options}
    kind, split = parts.netloc, options["split"]
    if split not in ("train", "eval"):
        raise AddlangError(f"{uri}: split '{split}'", "it is train or eval")
    if not (options["documents"].isdigit() and int(options["documents"]) and options["seed"].isdigit()):
        raise AddlangError(f"{uri}: documents must be a positive number, seed a number")
    n, seed = int(options["documents"]), int(options["seed"])
    path = cache / "lab" / f"{kind}-{split}-{n}-{seed}.jsonl"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        if split == "train":
            write_dataset(kind, name, n, seed)
        elif kind in LANGUAGES:
            rows = [json.dumps({"text": text}, ensure_ascii=False) for text in documents(kind, n, seed, split="eval")]
            Path(name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        else:
            raise AddlangError(
                f"{uri}: split=eval is for raw text ({', '.join(LANGUAGES)})",
                "leave target_datasets out: evaluation.holdout splits conversations off",
            )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path
