"""Analyses of a run for its report: what lies in ``analysis/*.json``, with the figures beside it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from addlang.errors import AddlangError
from addlang.report.files import read_json

FOLDER = "analysis"
KEYS = ("title", "sentence", "columns", "rows", "notes", "settings")


def analyses_of(run: Path) -> list[dict[str, Any]]:
    """Every analysis of a run, by name; its figure as an image that can run nothing.

    Raises:
        AddlangError: a file that is torn or no analysis.
    """
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        data = read_json(path, dict)
        missing = [key for key in KEYS if key not in data]
        if missing:
            raise AddlangError(f"{path} is no analysis: it has no '{missing[0]}'", "run addlang analyze again")
        settings = {k: v for k, v in data["settings"].items() if v not in (None, [], {}, "")}
        found.append(
            {
                **{key: data[key] for key in KEYS},
                "name": path.stem,
                "paper": data.get("paper") or "",
                "image": _image(path.parent / str(data["figure"])) if data.get("figure") else None,
                "settings": [
                    (k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in settings.items()
                ],
            }
        )
    return found


def _image(path: Path) -> Markup | None:
    if not path.is_file() or path.suffix != ".svg":
        return None
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return Markup("data:image/svg+xml;base64,{}").format(encoded)
