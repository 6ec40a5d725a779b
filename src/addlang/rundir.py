"""The run directory: the only code that knows file names inside a run, what is finished, and who may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from addlang.errors import AddlangError
from addlang.export import write_json
from addlang.recipe import Phase, Recipe

STATE = "state.json"


class RunDir:
    """One run's files. Everything is written atomically; ``state.json`` says which stages are complete."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self._lock: Any = None

    @classmethod
    def open(cls, recipe: Recipe, *, overwrite: bool = False) -> RunDir:
        """Create the directory, or continue the unfinished run of the same recipe in it.

        Raises:
            AddlangError: it holds a finished run, a run of another recipe, or files that are no run; it is not
                writable; another process is running in it.
        """
        path = Path(recipe.output_dir).expanduser()
        run = cls(path, recipe)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._acquire()
            if (path / STATE).is_file() and (overwrite or run._is_a_stranger_without_results()):
                run._clear()
            run._check_ownership()
            if not (path / STATE).is_file():
                run.write_text("recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
                run.update(
                    status="running",
                    fingerprint=recipe.fingerprint,
                    started=time.time(),
                    stages={},
                    warnings=[],
                    seconds=0.0,
                )
        except PermissionError as error:
            raise AddlangError(
                f"output directory '{path}' is not writable ({error.strerror})", "choose another --output_dir"
            ) from None
        except (NotADirectoryError, FileExistsError):
            raise AddlangError(f"output directory '{path}' is a file", "choose another --output_dir") from None
        return run

    def _is_a_stranger_without_results(self) -> bool:
        """A run of another recipe that ended before anything was computed, as after a mistyped path: nothing is lost."""
        state = self.state
        started = any(state.get("stages", {}).values()) or any(self.path.rglob("checkpoint-*"))
        return state.get("fingerprint") != self.recipe.fingerprint and not started

    def _check_ownership(self) -> None:
        if not (self.path / STATE).is_file():
            strangers = [
                p.name
                for p in self.path.iterdir()
                if p.name != ".lock" and not p.name.endswith(".tmp") and p.name != "recipe.yaml"
            ]
            if strangers:
                raise AddlangError(
                    f"'{self.path}' is not empty and is no run of addlang (it has '{sorted(strangers)[0]}')",
                    "choose another --output_dir",
                )
            return
        state = self.state
        if state.get("fingerprint") != self.recipe.fingerprint:
            changed = (
                ", ".join(_differences(self._stored_recipe(), self.recipe.resolved())) or "settings of another version"
            )
            raise AddlangError(
                f"'{self.path}' holds a run of another recipe; different: {changed}",
                "run the same settings to continue it, choose another --output_dir, or start again with --overwrite",
            )
        if state.get("status") == "finished":
            raise AddlangError(
                f"'{self.path}' holds a finished run",
                f"see {self.path / 'report.html'}; start again with --overwrite, or choose another --output_dir",
            )

    def _stored_recipe(self) -> dict[str, Any]:
        try:
            data = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return {}
        return data if isinstance(data, dict) else {}

    def _acquire(self) -> None:
        handle = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends or close()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise AddlangError(
                f"another process is running in '{self.path}'", "wait for it, or choose another --output_dir"
            ) from None
        self._lock = handle

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / ".lock")
            self._lock.close()
            self._lock = None

    def _clear(self) -> None:
        for p in self.path.iterdir():
            if p.name == ".lock":
                continue
            shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()

    @property
    def state(self) -> dict[str, Any]:
        """Content of ``state.json``."""
        return read_state(self.path)

    def update(self, **changes: Any) -> None:
        """Merge ``changes`` into ``state.json``, atomically."""
        state = self.state if (self.path / STATE).is_file() else {}
        write_json(self.path / STATE, {**state, **changes})

    def done(self, stage: str) -> bool:
        """Whether a stage is complete."""
        return bool(self.state["stages"].get(stage))

    def finish(self, stage: str, **changes: Any) -> None:
        """Mark a stage complete, together with other changes of the state."""
        self.update(stages={**self.state["stages"], stage: True}, **changes)

    def add_warnings(self, messages: list[str]) -> None:
        """Keep warnings for the report, each once."""
        have = list(self.state.get("warnings", []))
        new = [m for m in messages if m not in have]
        if new:
            self.update(warnings=have + new)

    def phase_dir(self, phase: Phase) -> Path:
        """Where a phase's model, plan, metrics and checkpoints are: the last phase owns the run directory itself."""
        if phase.name == self.recipe.phases[-1].name:
            return self.path
        path = self.path / "phases" / phase.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def plan_path(self, phase: Phase) -> Path:
        return self.phase_dir(phase) / "freeze_plan.safetensors"

    def write_text(self, name: str, text: str) -> None:
        path = self.path / name
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write_text(name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    def write_json(self, name: str, data: object) -> None:
        write_json(self.path / name, data)


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a run directory.

    Raises:
        AddlangError: there is none, or it is torn.
    """
    file = path / STATE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AddlangError(
            f"'{path}' is no run directory of addlang (no {STATE})", "give the --output_dir of a run"
        ) from None
    except ValueError as error:
        raise AddlangError(f"{file} is torn ({error})", "start the run again with --overwrite") from error
    assert isinstance(data, dict)
    return data


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ, at most eight."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *[k for k in new if k not in old]]:
            if key != "output_dir":
                yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{prefix}{i}.")
    elif old != new:
        yield f"{prefix.rstrip('.')} ({_short(old)} there, {_short(new)} here)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
