"""A journal keeps whole blocks whatever happens, and lets one process at a time work on it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from addlang.data.journal import Journal, locked


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([{"a": "ọ"}, {"a": 2}])
    journal.append([{"a": 3}])
    assert Journal(tmp_path / "j.jsonl").rows == journal.rows == [{"a": "ọ"}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_block_that_was_being_written_is_dropped_as_a_whole_and_can_be_written_again(
    cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append([{"a": 1}])
    whole = path.stat().st_size
    journal.append([{"a": 2}, {"a": "a long second row"}])
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - cut)
    again = Journal(path)
    assert again.rows == [{"a": 1}]
    assert path.stat().st_size == whole
    again.append([{"a": 4}])
    assert Journal(path).rows == [{"a": 1}, {"a": 4}]


def hold(path: Path, seconds: float) -> None:
    with locked(path):
        time.sleep(seconds)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    other = context.Process(target=hold, args=(tmp_path / "lock", 0.5))
    other.start()
    while not (tmp_path / "lock").is_file():
        time.sleep(0.01)
    time.sleep(0.1)
    began = time.monotonic()
    with locked(tmp_path / "lock"):
        waited = time.monotonic() - began
    other.join()
    assert waited > 0.2
