"""Cached directories are complete or absent, whatever happens while they are built."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from addlang.data.cache import cached, fingerprint, tokenizer_fingerprint
from addlang.errors import AddlangError, AddlangWarning


def build(path: Path) -> dict[str, Any]:
    (path / "a.txt").write_text("content")
    return {"n": 1}


def forbidden(path: Path) -> dict[str, Any]:
    raise AssertionError("must not be built again")


def test_second_use_builds_nothing(tmp_path: Path) -> None:
    first = cached(tmp_path / "x", build)
    assert first["n"] == 1
    assert cached(tmp_path / "x", forbidden) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("damage", ["cut", "meta", "gone", "empty"])
def test_torn_directory_is_built_again(tmp_path: Path, damage: str) -> None:
    cached(tmp_path / "x", build)
    if damage == "cut":
        (tmp_path / "x" / "a.txt").write_text("con")
    elif damage == "meta":
        (tmp_path / "x" / "meta.json").write_text('{"files": {"a.txt"')
    elif damage == "gone":
        (tmp_path / "x" / "meta.json").unlink()
    else:
        (tmp_path / "x" / "a.txt").unlink()
    cached(tmp_path / "x", build)
    assert (tmp_path / "x" / "a.txt").read_text() == "content"
    assert cached(tmp_path / "x", forbidden)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(path: Path) -> dict[str, Any]:
        (path / "half.txt").write_text("half")
        raise AddlangError("bad row")

    with pytest.raises(AddlangError, match="bad row"):
        cached(tmp_path / "x", fail)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def full(path: Path) -> dict[str, Any]:
        (path / "half.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(AddlangError, match=r"No space left(.|\n)*free some space"):
        cached(tmp_path / "x", full)
    assert not list(tmp_path.iterdir())


def test_warnings_of_the_build_are_given_on_every_use(tmp_path: Path) -> None:
    def warn(path: Path) -> dict[str, Any]:
        warnings.warn("3 rows dropped", AddlangWarning, stacklevel=1)
        return build(path)

    for b in (warn, forbidden):
        with pytest.warns(AddlangWarning, match="3 rows dropped"):
            cached(tmp_path / "x", b)


def test_another_process_that_is_faster_wins(tmp_path: Path) -> None:
    def slow(path: Path) -> dict[str, Any]:
        cached(tmp_path / "x", build)  # meanwhile
        (path / "a.txt").write_text("slow!!!")
        return {"n": 2}

    assert cached(tmp_path / "x", slow)["n"] == 1
    assert (tmp_path / "x" / "a.txt").read_text() == "content"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def _process(directory: Path, queue: Any) -> None:
    def slow(path: Path) -> dict[str, Any]:
        for i in range(20):
            (path / f"{i}.txt").write_text(str(i) * 1000)
            time.sleep(0.002)
        return {"n": 20}

    queue.put(cached(directory, slow)["n"])


def test_processes_that_build_at_once_all_get_whole_data(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    processes = [context.Process(target=_process, args=(tmp_path / "x", queue)) for _ in range(4)]
    for p in processes:
        p.start()
    assert [queue.get(timeout=60) for _ in processes] == [20] * 4
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    assert cached(tmp_path / "x", forbidden)["n"] == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_remains_of_killed_builds_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = tmp_path / f"x.{socket.gethostname()}.{gone.pid}.0a0a.tmp"
    live = tmp_path / f"x.{socket.gethostname()}.{os.getpid()}.0b0b.tmp"
    dead.mkdir()
    live.mkdir()
    cached(tmp_path / "x", build)
    assert not dead.exists()
    assert live.exists()


def test_meta_is_plain_json(tmp_path: Path) -> None:
    cached(tmp_path / "x", build)
    assert json.loads((tmp_path / "x" / "meta.json").read_text())["files"] == {"a.txt": 7}


def test_fingerprint_depends_on_content_only(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    before = tokenizer_fingerprint(tokenizer)
    assert before != tokenizer_fingerprint(bos_tokenizer)
    chat = tokenizer_fingerprint(tokenizer, chat=True)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tokenizer, chat=True) != chat
