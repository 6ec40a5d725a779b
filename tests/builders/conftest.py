"""A translation job against a local server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from server import Server

from addlang.builders.budget import Budget
from addlang.builders.endpoint import Endpoint
from addlang.builders.prompt import SYSTEM
from addlang.builders.protect import Protector
from addlang.builders.translate import Translation, translate

ROWS = [
    {
        "instruction": f"Explain to the class how step number {i} of the old recipe works, please.",
        "input": "" if i % 2 else f"Run `step_{i}()` and then open https://example.org/{i} in your browser window.",
        "output": f"First heat the oven to {150 + i} °C.\n- mix the flour\n- add the water and wait for a while",
    }
    for i in range(6)
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


Job = Callable[..., dict[str, Any]]


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


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
