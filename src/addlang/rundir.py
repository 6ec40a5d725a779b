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
from addlang.export import CONFIG_FILES, write_json, write_text
from addlang.inputs import changed, digests
from addlang.recipe import WITHOUT_EFFECT, WITHOUT_EFFECT_IN_A_PHASE, Phase, Recipe

STATE = "state.json"
LOCK = ".lock"
OWN = (
    STATE, "recipe.yaml", "README.md", "report.html", "freeze_plan.safetensors", "metrics.jsonl", "results.jsonl",
    "comparison.json", "numbers.json", "proof.json", "bad_batch.json", "replay.jsonl", "samples", "phases", "analysis",
    "checkpoint-*", "addlang", "*.tmp",
    "model*.safetensors", "model.safetensors.index.json", *CONFIG_FILES,
)  # fmt: skip


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
            run._refuse_strangers()  # before anything is written
            run._acquire()
        except PermissionError as error:
            raise AddlangError(
                f"output directory '{path}' is not writable ({error.strerror})", "choose another --output_dir"
            ) from None
        except (NotADirectoryError, FileExistsError):
            raise AddlangError(f"output directory '{path}' is a file", "choose another --output_dir") from None
        except OSError as error:
            raise AddlangError(
                f"output directory '{path}' cannot be used ({error.strerror})", "choose another --output_dir"
            ) from None
        try:
            if (path / STATE).is_file() and (overwrite or run._is_another_recipe_without_results()):
                run._clear()
            run._sweep()  # what a killed process was writing
            if (path / STATE).is_file():
                run._check_recipe()
            else:
                run.update(
                    status="running",
                    fingerprint=recipe.fingerprint,
                    started=time.time(),
                    stages={},
                    warnings=[],
                    seconds=0.0,
                )
            if not (path / "recipe.yaml").is_file():
                run.write_text("recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
        except BaseException:
            run.abandon()
            raise
        return run

    def _refuse_strangers(self) -> None:
        """Raise unless the directory is empty, a run of ours, or what is left of one that was killed as it began."""
        if _is_run(self.path):
            return
        for p in sorted(self.path.iterdir()):
            if p.name in (LOCK, STATE + ".tmp"):
                continue
            raise AddlangError(
                f"'{self.path}' is not empty and is no run of addlang (it has '{p.name}')",
                "choose another --output_dir",
            )

    def _is_another_recipe_without_results(self) -> bool:
        """A run of another recipe that ended before anything was computed, as after a mistyped path: nothing is lost."""
        state = self.state
        started = any(state["stages"].values()) or any(self.path.rglob("checkpoint-*"))
        another = not is_of(self.path, state, self.recipe) or other_defaults(self.path, self.recipe)
        return bool(another) and not started

    def _check_recipe(self) -> None:
        if not is_of(self.path, self.state, self.recipe):
            changed = (
                ", ".join(_differences(_stored_recipe(self.path), self.recipe.resolved()))
                or "settings of another version"
            )
            raise AddlangError(
                f"'{self.path}' holds a run of another recipe; different: {changed}",
                "run the same settings to continue it, choose another --output_dir, or start again with --overwrite",
            )
        if other := other_defaults(self.path, self.recipe):
            raise AddlangError(
                f"'{self.path}' holds a run of this recipe for which other defaults held: {', '.join(other)}",
                "continue it with the version of addlang that began it, choose another --output_dir, or start again with --overwrite",
            )
        if self.finished:
            raise AddlangError(
                f"'{self.path}' holds a finished run",
                f"see {self.path / 'report.html'}; start again with --overwrite, or choose another --output_dir",
            )

    @property
    def finished(self) -> bool:
        """Every stage is complete and the report, which is written last, is there."""
        return self.state.get("status") == "finished" and (self.path / "report.html").is_file()

    def _acquire(self) -> None:
        while True:
            handle = open(self.path / LOCK, "w")  # noqa: SIM115 - held until the process ends or close()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                raise AddlangError(
                    f"another process is running in '{self.path}'", "wait for it, or choose another --output_dir"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), os.stat(self.path / LOCK)):
                    break
            handle.close()  # its holder removed the file between open and flock: that lock excludes nobody
        self._lock = handle

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path / LOCK)
            self._lock.close()
            self._lock = None

    def _clear(self) -> None:
        """Remove what a run writes, ``state.json`` last so that a kill in between leaves a run; other files stay."""
        for pattern in reversed(OWN):  # OWN begins with state.json
            for p in self.path.glob(pattern):
                shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()

    def _sweep(self) -> None:
        """Remove files that were being written when a process was killed or the disk was full."""
        for p in [*self.path.glob("*.tmp"), *(self.path / "samples").rglob("*.tmp"), *self.path.glob("phases/*/*.tmp")]:
            shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()

    def abandon(self) -> None:
        """After an error: leave no half-written file, and let other processes in."""
        with contextlib.suppress(OSError):
            self._sweep()
        self.close()

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

    def check_inputs(self, base_dir: Path | None) -> None:
        """Note what the local files hold that the recipe names, as the first stage begins.

        Raises:
            AddlangError: a stage is complete, and they have changed since.
        """
        now = digests(self.recipe, base_dir)
        if not any(self.state["stages"].values()):
            self.update(inputs=now)
        elif other := changed(self.state.get("inputs", {}), now):
            raise AddlangError(
                f"{', '.join(other)}: changed since this run began", "restore it, or start again with --overwrite"
            )

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
        write_text(self.path / name, text)

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write_text(name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    def write_json(self, name: str, data: object) -> None:
        write_json(self.path / name, data)


class FollowedRun(RunDir):
    """A run as all but the first of its processes see it: they read what the first one writes."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(Path(recipe.output_dir).expanduser(), recipe)

    def update(self, **changes: Any) -> None:
        """The first process does it."""

    def abandon(self) -> None:
        """The first process does it."""

    def write_text(self, name: str, text: str) -> None:
        """The first process does it."""

    def write_json(self, name: str, data: object) -> None:
        """The first process does it."""


def holds_finished(path: Path, recipe: Recipe, base_dir: Path | None) -> bool:
    """Whether a directory holds the finished run of this very recipe.

    Raises:
        AddlangError: it does, but of other files that have the same names, or other defaults held.
    """
    if not (path / STATE).is_file():
        return False
    state = read_state(path)
    if state["status"] != "finished" or not is_of(path, state, recipe):
        return False
    if other := other_defaults(path, recipe):
        raise AddlangError(
            f"'{path}' holds a finished run for which other defaults held: {', '.join(other)}",
            "choose another output_dir, or remove this directory to have the run done again",
        )
    if other := changed(state.get("inputs", {}), digests(recipe, base_dir)):
        raise AddlangError(
            f"'{path}' holds a finished run of other files, which have changed since: {', '.join(other)}",
            "restore them, choose another output_dir, or remove this directory to have the run done again",
        )
    return True


def is_of(path: Path, state: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the run in a directory is of this recipe.

    A fingerprint leaves out what is the default of its version. Where a default has changed since, the same settings have
    another one: then that of the stored recipe, which names every value, counts.
    """
    if state["fingerprint"] == recipe.fingerprint:
        return True
    try:
        return bool(Recipe.parse(_stored_recipe(path), where=str(path)).fingerprint == recipe.fingerprint)
    except AddlangError:
        return False


def other_defaults(path: Path, recipe: Recipe) -> list[str]:
    """Settings of the run in a directory whose values differ from the recipe's, though the recipe may not name them.

    Keys that only one of them knows are no difference: versions add keys.
    """
    here = recipe.resolved()
    for key in WITHOUT_EFFECT:
        del here[key]
    for phase in here["phases"]:
        for key in WITHOUT_EFFECT_IN_A_PHASE:
            del phase[key]
    return list(_differences(_stored_recipe(path), here, only_shared=True))


def _stored_recipe(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


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
    if not isinstance(data, dict) or "stages" not in data:
        raise AddlangError(f"{file} is no state of an addlang run", "give the --output_dir of a run")
    return data


def _is_run(path: Path) -> bool:
    """Whether a directory holds a run: a state with our keys, or a torn one beside a recipe of ours."""
    try:
        data = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        try:
            recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(recipe, dict) and {"model_name_or_path", "output_dir", "phases"} <= set(recipe)
    return isinstance(data, dict) and {"fingerprint", "stages"} <= set(data)


def _differences(old: Any, new: Any, prefix: str = "", *, only_shared: bool = False) -> Iterator[str]:
    """Dotted keys whose values differ.

    Args:
        only_shared: a key that one side lacks is no difference.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *[k for k in new if k not in old]]:
            if key != "output_dir" and not (only_shared and (key not in old or key not in new)):
                yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.", only_shared=only_shared)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{prefix}{i}.", only_shared=only_shared)
    elif old != new:
        yield f"{prefix.rstrip('.')} ({_short(old)} there, {_short(new)} here)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
