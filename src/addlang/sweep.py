"""Many recipes, several processes at a time, each run in a directory of its own.

A run that is finished is taken as it is and an interrupted one continues, so a sweep that was killed is carried on by
starting it again.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from addlang.errors import AddlangError, PreemptedError

Key = TypeVar("Key")


def sweep(
    todo: Sequence[tuple[Key, Mapping[str, Any]]],
    *,
    workers: int,
    threads: int,
    cache: Path,
    where: str = "sweep",
    base_dir: Path | None = None,
    gpus: Sequence[str] = (),
    on_error: Callable[[Key, AddlangError], None] | None = None,
    work: Callable[[dict[str, Any], str, Path | None], str] | None = None,
) -> Iterator[tuple[Key, Path]]:
    """Carry out recipes; yields each one's key and run directory as it finishes.

    Args:
        todo: recipes as plain data, started in this order.
        workers: runs at a time.
        threads: of torch, in each.
        cache: directory that all share, so that the base model is measured once (``ADDLANG_CACHE``).
        where: named in errors of the recipes.
        base_dir: where the recipes' relative paths start; None: the working directory.
        gpus: ids of :func:`devices`, dealt to the processes in turn.
        on_error: told of a run that failed, whatever its error, and the rest goes on; None: the first failure stops the
            rest.
        work: carries out one recipe and returns its directory; default: :func:`run_one`.

    Raises:
        AddlangError: a process was killed, or what the first failing run raised, unless ``on_error`` is there.
    """
    context = multiprocessing.get_context("spawn")

    def new_pool() -> ProcessPoolExecutor:
        dealt: Any = context.Queue()
        for i in range(workers if gpus else 0):
            dealt.put(gpus[i % len(gpus)])
        start = (threads, str(cache), dealt if gpus else None)
        return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=start)

    queue = [(key, dict(data)) for key, data in todo]
    pending: dict[Future[str], tuple[Key, dict[str, Any]]] = {}  # in the order in which they start
    pool = new_pool()
    try:
        while queue or pending:
            killed: list[tuple[Key, dict[str, Any]]] = []
            broken = False
            try:
                while queue and len(pending) < workers + 1:  # one waits, so that no process does
                    key, data = queue[0]
                    future = pool.submit(carry_out_one, work or run_one, data, where, base_dir, on_error is not None)
                    pending[future] = queue.pop(0)
            except BrokenProcessPool:  # never at the first run of a pool, so this does not go on for ever
                broken = True
            wait(pending, return_when=FIRST_COMPLETED)
            broken = broken or any(isinstance(f.exception(), BrokenProcessPool) for f in pending if f.done())
            if broken:
                wait(pending)
            for done in [f for f in pending if f.done()]:
                key, data = pending.pop(done)
                try:
                    path = Path(done.result())
                except BrokenProcessPool:
                    killed.append((key, data))
                except AddlangError as error:
                    if on_error is None:
                        raise
                    on_error(key, error)
                else:
                    yield key, path
            if broken:
                for key, _ in killed[:workers]:  # any of them may be at fault; the one that waited had not begun
                    ended = AddlangError(
                        "a process was killed while this run was in progress (out of memory?)",
                        "start the same command again to continue it; with a smaller --jobs fewer run at a time",
                    )
                    if on_error is None:
                        raise ended
                    on_error(key, ended)
                queue[:0] = killed[workers:]
                pool.shutdown()
                pool = new_pool()
    finally:
        pool.shutdown(cancel_futures=True)


def carry_out_one(
    work: Callable[[dict[str, Any], str, Path | None], str],
    data: dict[str, Any],
    where: str,
    base_dir: Path | None,
    named: bool,
) -> str:
    """One recipe, in a process of the pool.

    Args:
        named: any error is one that can be named beside the run; its traceback goes to stderr.
    """
    try:
        return work(data, where, base_dir)
    except PreemptedError:  # SIGTERM, as when another process of the pool was killed: it waits for this one to end
        os._exit(PreemptedError.exit_code)
    except AddlangError:
        raise
    except Exception as error:  # here, because some errors of libraries do not survive the way to another process
        if not named:
            raise
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        raise AddlangError(f"{type(error).__name__}: {first}") from None


def devices() -> list[str]:
    """The GPUs that processes can be given, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def dealt(gpus: Sequence[str], processes: int) -> list[str]:
    """The GPUs in groups of ``processes``, as ``CUDA_VISIBLE_DEVICES`` takes them; none where there are none.

    Raises:
        AddlangError: there are some, but too few for a single group.
    """
    if gpus and len(gpus) < processes:
        raise AddlangError(
            f"--processes {processes}: only {len(gpus)} GPU{'s' * (len(gpus) > 1)} here", "a smaller --processes"
        )
    return [",".join(gpus[i : i + processes]) for i in range(0, len(gpus) - processes + 1, processes)]


def start_worker(threads: int, cache: str, gpus: Any = None) -> None:
    """Settings of a process of the pool."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["ADDLANG_CACHE"] = cache
    from addlang.progress import quiet_libraries, set_quiet

    set_quiet(True)
    quiet_libraries()
    import torch

    torch.set_num_threads(threads)


def end_with(parent: int) -> None:
    """End this process, whose run can be continued, when the one that started it is no more."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(75)


def run_one(data: dict[str, Any], where: str, base_dir: Path | None = None) -> str:
    """Carry out one recipe unless its directory holds the finished run; returns the directory."""
    from addlang.recipe import Recipe
    from addlang.run import execute
    from addlang.rundir import holds_finished

    recipe = Recipe.parse(data, where=where, base_dir=base_dir)
    path = Path(recipe.output_dir)
    return str(path if holds_finished(path, recipe, base_dir) else execute(recipe, base_dir=base_dir))
