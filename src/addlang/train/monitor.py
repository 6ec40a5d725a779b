"""What a training loop watches and writes: metrics, trackers, the signal to stop, loss spikes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.recipe import Phase

SPIKE_WINDOW = 100  # steps of the running median
SPIKE_FEWEST = 20  # steps before anything is called a spike


class Flag:
    """Set by a signal, read between steps."""

    is_set = False


@contextlib.contextmanager
def preemption() -> Iterator[Flag]:
    """Turn SIGTERM into a flag while training, so that the step in flight ends and is saved."""
    flag = Flag()

    def handle(_number: int, _frame: FrameType | None) -> None:
        flag.is_set = True

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


class SpikeWatch:
    """Recent losses, and whether one leaps out of them.

    A spike is a loss above ``factor`` times the median of the last 100 steps, where a median below 1 nat counts as 1:
    small losses vary by large factors without anything being wrong.
    """

    def __init__(self, factor: float | None, recent: Iterable[float] = ()) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(recent, SPIKE_WINDOW)

    def see(self, loss: float) -> float | None:
        """Take note of a step's loss (nats per token); the limit that it exceeds, if it does."""
        if self.factor is not None and len(self.recent) >= SPIKE_FEWEST:
            limit = self.factor * max(1.0, statistics.median(self.recent))
            if loss > limit:
                return limit
        self.recent.append(loss)
        return None


def check_step(
    loss: float, norm: float, watch: SpikeWatch, *, step: int, phase: Phase, where: Path
) -> AddlangError | None:
    """The error that a step's loss or gradient norm is, or None. Before weights are updated, so nothing is spoilt."""
    fix = f"look at the batch's rows in {where}; lower learning_rate ({phase.learning_rate:g})"
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = "gradient" if math.isfinite(loss) else "loss"
        return AddlangError(
            f"the {what} became NaN or infinite at step {step} of phase '{phase.name}'", f"{fix} or use precision: fp32"
        )
    limit = watch.see(loss)
    if limit is None:
        return None
    return AddlangError(
        f"the loss leapt to {loss:.3g} at step {step} of phase '{phase.name}', above {limit:.3g}, "
        f"{phase.max_loss_spike:g} times its running median",
        f"{fix}, remove the rows, or raise max_loss_spike (null: never stop)",
    )


def write_bad_batch(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """The rows of the batch on which training stopped."""
    path.write_text(json.dumps({"step": step, "rows": rows}, ensure_ascii=False, indent=1), encoding="utf-8")


class MetricsLog:
    """``metrics.jsonl``: one row per logging step. On resume, rows after the checkpoint are dropped: they will come again."""

    def __init__(self, path: Path, *, after_step: int, write: bool = True) -> None:
        self.path, self._write = path, write
        rows = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that was being written when the run was killed
                    continue
                if row["step"] <= after_step:
                    rows.append(row)
        self.last_loss = rows[-1]["loss"] if rows else math.nan
        if not write:
            return
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        os.replace(tmp, path)

    def write(self, row: dict[str, Any]) -> None:
        if not self._write:
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


class Trackers:
    """Experiment trackers of ``report_to``, through accelerate."""

    def __init__(self, phase: Phase, directory: Path, *, write: bool = True) -> None:
        self._accelerator: Any = None
        if phase.report_to and write:
            try:
                from accelerate import Accelerator

                self._accelerator = Accelerator(
                    log_with=list(phase.report_to), project_dir=str(directory), cpu=not _has_cuda()
                )
                self._accelerator.init_trackers("addlang")
            except (ImportError, ValueError) as error:
                raise AddlangError(
                    f"report_to {list(phase.report_to)} cannot be used: {error}",
                    "install the tracker, for example pip install 'addlang[trackers]'",
                ) from error

    def log(self, row: dict[str, Any]) -> None:
        if self._accelerator is not None:
            self._accelerator.log(
                {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "steps")},
                step=row["step"],
            )

    def close(self) -> None:
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # end_training() would end the process group too
                tracker.finish()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
