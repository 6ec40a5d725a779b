"""A translation job against a local server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from addlang.builders.budget import Budget
from addlang.builders.endpoint import Endpoint
from addlang.builders.prompt import SYSTEM
from addlang.builders.protect import Protector
from addlang.builders.translate import Translation, translate
from chatserver import ROWS, Job, Server


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def job(rows_file: Path, tmp_path: Path) -> Job:
    """Translate the rows into German with a server; returns what the job says about itself."""

    def run(
        server: Server, *, budget: Budget | None = None, names: dict[str, str] | None = None, **changes: Any
    ) -> Any:
        protector = Protector(names or {})
        own = {"attempts", "limit", "parts", "unit", "check_language", "target", "columns"}
        settings = {"concurrency": 3, "timeout": 5.0, "pause": 0.01, **changes}
        translation = Translation(
            (str(rows_file),), tmp_path / "out.jsonl", "en", settings.pop("target", "de"), protector,
            **{k: settings.pop(k) for k in list(settings) if k in own},
        )  # fmt: skip
        used = budget or Budget()
        with server.serving() as url:
            backend = Endpoint(
                url, "some-model", prompt=SYSTEM, source="English", target="German", mark=protector.mark.format(1),
                budget=used, **settings,
            )  # fmt: skip
            return translate(translation, backend, used)

    return run
