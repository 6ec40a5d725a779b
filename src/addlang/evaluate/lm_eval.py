"""The only module that knows EleutherAI's lm-evaluation-harness: its tasks in, measurements out.

What it returns is read by :mod:`addlang.evaluate.harness_results`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from addlang.data.chat import require_chat_template
from addlang.errors import AddlangError, did_you_mean
from addlang.evaluate.generation import inference
from addlang.evaluate.harness_results import measurements
from addlang.evaluate.measurement import Measurement, NotMeasuredError, Role

BOOTSTRAP = 100  # resamples of a corpus metric; the harness itself takes no more for BLEU and chrF


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    apply_chat_template: bool,
    roles: Mapping[str, Role] | None = None,
    languages: Mapping[str, str] | None = None,
    base_dir: Path | None = None,
    generation: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Run harness tasks on a model in memory.

    Args:
        tasks: names of harness tasks, groups or tags, or paths of task YAML files. Where only files are asked for, the
            harness's own 14,000 task files are not read (15 s). Relative ``data_files`` in a task file are looked up
            beside that file.
        num_fewshot: examples in the prompt; None: as the task says.
        limit: first items of each task; None: all.
        batch_size: sequences per forward pass.
        seed: of the choice of few-shot examples; the process's own random states are left as they were.
        apply_chat_template: put prompts through the chat template, few-shot examples as earlier turns.
        roles, languages: by entry of ``tasks``; default ``source`` and ``en``.
        base_dir: directory against which relative paths in ``tasks`` are resolved; None: the working directory.
        generation: laid over the ``generation_kwargs`` of every task.
        progress: called with the number of sequences done and of all, for each entry of ``tasks`` anew.

    Returns:
        A measurement for every metric (and filter of replies) of every entry of ``tasks``.

    Raises:
        AddlangError: the harness is not installed, an unknown task or file, data that cannot be loaded, or ``generation``
            for a task that generates nothing.
        NotMeasuredError: a chat template is asked for and there is none.
    """
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise NotMeasuredError("the model has no chat template", "evaluate without it, or give one with chat_template")
    require()
    from lm_eval.evaluator import evaluate

    files = {name: file_of(name, base_dir) for name in tasks}
    found: list[Measurement] = []
    with _undisturbed(seed), inference(model):
        loaded = {name: _load(name, file) for name, file in files.items()}
        contents = {name: _content(loaded[name]["tasks"]) for name, file in files.items() if file is not None}
        decoding: dict[str, dict[str, Any]] = {name: {} for name in files}
        own = copy.deepcopy(tokenizer)  # it sets padding
        if apply_chat_template:
            own.chat_template = require_chat_template(own)  # with a fixed date
        lm = _model_class()(
            pretrained=model,
            tokenizer=own,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        lm.on_progress = progress
        for name, file in files.items():
            members = loaded[name]
            for task in members["tasks"].values():
                # 0 in a task's own file means that examples make no sense there, as in the harness itself
                if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                    task.set_config(key="num_fewshot", value=num_fewshot)
                elif task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)
                if generation and task.OUTPUT_TYPE != "generate_until":
                    raise AddlangError(
                        f"task '{task.task_name}' generates nothing", f"leave '{name}' out of generation_kwargs"
                    )
                kwargs = {**(task.get_config("generation_kwargs") or {}), **(generation or {})}
                if task.OUTPUT_TYPE == "generate_until" and kwargs:
                    task.set_config(key="generation_kwargs", value=kwargs)
                    decoding[name][task.task_name] = json.loads(json.dumps(kwargs, default=str))
            results = evaluate(
                lm=lm,
                task_dict=members,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
            settings = {
                "harness": version(),
                "num_fewshot": {t: results["n-shot"].get(t) for t in sorted(members["tasks"])},
                "limit": limit,
                "seed": seed,
                "chat_template": apply_chat_template,
            }
            if decoding[name]:
                settings["generation"] = decoding[name]
            if file is not None:
                settings["content"] = contents[name]
            found += measurements(
                name if file is None else file.stem,
                results,
                sorted(members["tasks"]),
                settings,
                role=(roles or {}).get(name, "source"),
                language=(languages or {}).get(name, "en"),
            )
    return found


def documents(
    name: str, *, limit: int | None = None, base_dir: Path | None = None
) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """``(task, number from 0, columns)`` of everything that an entry is evaluated on; nothing is run.

    Args:
        name: of a harness task, group or tag, or the path of a task file.
        limit: first documents of each task.

    Raises:
        AddlangError: see :func:`run_tasks`.
    """
    require()
    with _undisturbed(0):
        tasks = _load(name, file_of(name, base_dir))["tasks"]
    for task in sorted(tasks):
        yield from ((task, i, dict(row)) for i, row in enumerate(islice(tasks[task].eval_docs, limit)))


def version() -> str:
    """Name and version of the harness."""
    from importlib.metadata import version as installed

    return f"lm-eval {installed('lm_eval')}"


def content(file: Path) -> str:
    """Hash of all that a task file determines: its resolved configuration, the code that it names and its data."""
    require()
    with _undisturbed(0):
        return _content(_load(str(file), file)["tasks"])


def _content(tasks: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tasks):
        config = dict(tasks[name].dump_config())  # functions as their source
        config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
        kwargs = config.pop("dataset_kwargs", None) or {}
        config["dataset_kwargs"] = {k: v for k, v in kwargs.items() if k != "data_files"}  # where they lie is no matter
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for split in sorted(tasks[name].dataset):
            for row in tasks[name].dataset[split]:
                digest.update(json.dumps([split, row], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def file_of(name: str, base_dir: Path | None = None) -> Path | None:
    """The task file that an entry names, or None for a name of the harness.

    Raises:
        AddlangError: it ends like a task file and does not exist.
    """
    path = (base_dir or Path()) / Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if path.suffix in (".yaml", ".yml"):
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AddlangError(
            f"task file '{path}' does not exist", did_you_mean(path.name, near) if near else "check the path"
        )
    return None


def require() -> None:
    """Make sure that the harness is installed; otherwise AddlangError with the command that installs it."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        if error.name is not None and not error.name.startswith("lm_eval"):
            raise
        raise AddlangError(
            "these tasks need the lm-evaluation-harness, which is not installed", "pip install 'addlang[lm-eval]'"
        ) from error


@functools.cache
def _manager() -> Any:
    """The harness's own tasks. Slow: reads all of its task files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(name: str, file: Path | None) -> dict[str, Any]:
    """Load one entry with its data: the harness's ``{"tasks": {name: Task}, "groups": ...}``."""
    from lm_eval.tasks import TaskManager

    if file is None and name not in _manager().all_tasks:
        raise AddlangError(f"'{name}' is no task of {version()} and no file", _nearest(name, _manager().all_tasks))
    loaded: dict[str, Any]
    try:
        if file is None:
            loaded = _manager().load([name])
            return loaded
        # by its registered name: loaded by path, a group would take its list of tasks for its name
        manager = TaskManager(include_path=str(file.parent), include_defaults=False)
        own = sorted(key for key, entry in manager.task_index.items() if entry.yaml_path == file)
        groups = [key for key in own if key in manager.all_groups]
        with contextlib.chdir(file.parent):  # data_files are relative to the working directory in the harness
            loaded = manager.load(groups or own or [str(file)])
            return loaded
    except AddlangError:
        raise
    except Exception as error:  # task files can run into anything: YAML, templates, data sets, the hub
        first = next(iter(str(error).strip().splitlines()), "")
        raise AddlangError(
            f"task '{name if file is None else file}' cannot be loaded ({type(error).__name__}: {first})",
            _remedy(error, file),
        ) from error


def _nearest(name: str, known: Sequence[str]) -> str:
    """``did_you_mean`` over 14,000 names without listing them all."""
    import difflib

    near = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return (
        did_you_mean(name, near) if near else "list them with: lm-eval ls tasks; or give the path of a task YAML file"
    )


def _remedy(error: BaseException, file: Path | None) -> str:
    """What a user can do about a task that does not load."""
    kinds = " ".join(type(e).__name__ for e in _causes(error))
    if any(word in kinds for word in ("Connect", "Offline", "Timeout", "MaxRetry", "LocalEntryNotFound")):
        return (
            "its data come from the Hugging Face hub, which cannot be reached: load them where there is a network, "
            "or write a task YAML file over local data_files"
        )
    if "DatasetNotFound" in kinds or "RepositoryNotFound" in kinds or "Gated" in kinds:
        return "the data set is missing, private or gated: accept its terms on the hub and set HF_TOKEN"
    if "FileNotFound" in kinds and file is not None:
        return f"data_files are looked up beside the task file, in {file.parent}"
    return "correct the task file" if file is not None else "this task does not work with the installed versions"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def _model_class() -> Any:
    """The harness's wrapper of a transformers model, counting the sequences that it has run."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]
        on_progress: Callable[[int, int], None] | None = None
        _done = _total = 0

        def _start(self, total: int) -> None:
            self._done, self._total = 0, total

        def _count(self, rows: int) -> None:
            self._done = min(self._done + rows, self._total)  # batches whose size is searched for count twice
            if self.on_progress is not None and self._total:
                self.on_progress(self._done, self._total)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._start(len(requests))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._start(len(requests))
            return super().generate_until(requests, *args, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            replies = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return replies

    return Counting


@contextlib.contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Seed the harness without touching the process's random states, in one process, without its bars and messages."""
    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    states = random.getstate(), np.random.get_state()
    multiprocessing = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # a forked bootstrap can deadlock beside torch's threads
    level, make_bar = logging.root.manager.disable, tqdm.__init__

    def make_no_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        make_bar(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = make_no_bar
    logging.disable(max(level, logging.WARNING))
    try:
        with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        tqdm.__init__ = make_bar
        logging.disable(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing
