"""Fixtures of the tests that carry out whole runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from addlang.progress import set_quiet

# before torch is imported: models of the tests are tiny, and several test processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch reads it once

from tinyrun import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def offline(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed data and evaluations are shared by the tests; nothing asks the hub."""
    monkeypatch.setenv("ADDLANG_CACHE", str(shared_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """A command with --json makes its process quiet; the next test is another command."""
    yield
    set_quiet(False)
