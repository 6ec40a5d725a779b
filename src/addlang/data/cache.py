"""Directories that appear complete or not at all, under a name that is a hash of everything they depend on.

A directory is built under a temporary name and renamed. ``meta.json`` is written last and states the size of every
file, so that a torn directory (an interrupted copy, a full disk, a file edited later) is recognised and built again.
Two processes may build the same directory at once: the first one that finishes wins, the other uses its result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from addlang.data.chat import dated
from addlang.errors import AddlangError, AddlangWarning


def fingerprint(*parts: Any) -> str:
    """Hash of plain data (anything that JSON can hold; other values by their ``str``)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def tokenizer_fingerprint(tokenizer: Any, *, chat: bool = False) -> str:
    """Hash of a tokenizer's content: vocabulary, merges, normaliser, special tokens; with ``chat`` its template."""
    if getattr(tokenizer, "is_fast", False):
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None) if chat else None
    template = dated(template) if isinstance(template, str) else template
    return fingerprint(hashlib.sha256(content.encode()).hexdigest(), tokenizer.special_tokens_map, template)


def read_meta(directory: Path) -> dict[str, Any] | None:
    """``meta.json`` of a complete directory; None if it is missing or torn."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        whole = all((directory / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole and isinstance(meta, dict) else None


def cached(directory: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The meta data of ``directory``, built first if it is missing or torn.

    Warnings of the build are kept with the data and issued again whenever it is used, so that a run that finds the data
    in the cache reports the same as the run that built it.

    Args:
        directory: where the data is to stand.
        build: fills an empty directory and returns plain data to be kept in its ``meta.json``.

    Raises:
        AddlangError: the disk is full or the directory cannot be written.
    """
    meta = read_meta(directory)
    if meta is None:
        try:
            meta = _build(directory, build)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            fix = "free some space, or choose another cache directory" if full else "check the cache directory"
            raise AddlangError(f"the packed data cannot be written to {directory} ({error})", fix) from error
    for message in meta["warnings"]:
        warnings.warn(message, AddlangWarning, stacklevel=3)
    return meta


def _build(directory: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    temporary = directory.with_name(f"{directory.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AddlangWarning)
            meta = build(temporary)
        own = [str(w.message) for w in caught if issubclass(w.category, AddlangWarning)]
        for w in caught:
            if not issubclass(w.category, AddlangWarning):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        for path in temporary.iterdir():
            _sync(path)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        meta = meta | {"warnings": own, "files": files}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
        _sync(temporary / "meta.json")
        return _publish(temporary, directory, meta)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Rename; if a complete directory stands there by now, another process was faster and its data is the same."""
    for _ in range(10):
        try:
            os.replace(temporary, directory)
            return meta
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        theirs = read_meta(directory)
        if theirs is not None:
            return theirs
        torn = directory.with_name(f"{directory.name}.torn.{uuid.uuid4().hex[:8]}.tmp")
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it away just now
            os.replace(directory, torn)
        shutil.rmtree(torn, ignore_errors=True)
    raise AddlangError(f"{directory} is replaced by other processes again and again", "choose another cache directory")


def _sweep(directory: Path) -> None:
    """Remove what builds of this directory left behind that were killed on this machine."""
    for path in directory.parent.glob(f"{directory.name}.{socket.gethostname()}.*.tmp"):
        pid = path.name.removeprefix(f"{directory.name}.{socket.gethostname()}.").split(".")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
