"""A file of JSON lines to which finished work is appended, so that a process that is killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Journal:
    """Rows on disk. :meth:`append` writes several at once, and after a kill either all of them are there or none.

    Attributes:
        rows: what is there, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        whole = 0
        data = path.read_bytes() if path.is_file() else b""
        for line in data.splitlines(keepends=True):
            block = _block(line)
            if block is None:
                break
            whole += len(line)
            self.rows += block
        if whole < len(data):  # what a kill left behind
            with open(path, "r+b") as file:
                file.truncate(whole)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one block of rows: a line of the file."""
        line = json.dumps(list(rows), ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.rows += [dict(row) for row in rows]


def _block(line: bytes) -> list[dict[str, Any]] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, list) else None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; waits for a process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
