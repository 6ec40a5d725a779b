"""Progress of anything longer than two seconds, on stderr; stdout belongs to results.

On a terminal all running jobs share one live display; elsewhere (logs, pipes) they print a plain line every ten
seconds. Short jobs print nothing. rich is imported only where a live display is drawn; torch never is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

DELAY = 2.0  # seconds before a job shows itself
INTERVAL = 10.0  # seconds between plain lines

_lock = threading.RLock()
_quiet = False
_console: Console | None = None
_display: RichProgress | None = None  # one for all jobs: two live displays on one terminal overwrite each other
_shown = 0  # jobs in the display


def set_quiet(quiet: bool) -> None:
    """Print nothing (True) or progress and notes (False), from now on."""
    global _quiet
    _quiet = quiet


def quiet_libraries() -> None:
    """Keep off the terminal what torchao says when it is imported, which transformers does wherever it is installed."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def note(message: str) -> None:
    """Print one line of information to stderr, above a live display if there is one."""
    if _quiet:
        return
    with _lock:
        if _display is not None:
            _display.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            _plain(message)


def progress(label: str, total: float | None = None, unit: str = "") -> Progress:
    """A job to be used in a ``with`` statement.

    Args:
        label: what is being done, such as ``training``.
        total: amount of work; None where it is not known.
        unit: what is counted, in the plural, such as ``tokens``.
    """
    return Progress(label, total, unit)


class Progress:
    """One running job; see :func:`progress`. ``total`` may be set later, when it becomes known."""

    def __init__(self, label: str, total: float | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done: float = 0
        self.loss: float | None = None
        self.rate: float | None = None
        self._task: Any = None
        self._started = self._printed = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and amount of the first update
        self._visible = self._finished = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        # A timer and not a check in update(): a job that is stuck in one long call should show itself too.
        self._timer = threading.Timer(DELAY, self._appear)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with _lock:
            self._finished = True
            if not self._visible:
                return
            if self._task is not None:
                self._leave_display()
            if not _quiet:
                seconds = time.monotonic() - self._started
                outcome = f"done in {duration(seconds)}" if kind is None else f"stopped after {duration(seconds)}"
                parts = [amount(self.done, self.total, self.unit) if self.done else "", self._loss_text(), outcome]
                _plain(f"{self.label}: " + ", ".join(p for p in parts if p))

    def update(self, done: float, *, loss: float | None = None, rate: float | None = None) -> None:
        """Report where the job is.

        Args:
            done: amount done since the very beginning (not since the last call).
            loss: latest loss, if there is one.
            rate: units per second; default: the mean since the first update, so that a resumed job does not count
                what an earlier process did, and a slow first step does not distort the time left.
        """
        self.done = done
        if self._first is None:
            self._first = (time.monotonic(), done)
        self.loss = self.loss if loss is None else loss
        self.rate = self.rate if rate is None else rate
        if not self._visible:
            return
        with _lock:
            if self._task is not None and _display is not None:
                _display.update(self._task, total=self.total, completed=done, text=self._text())
            elif time.monotonic() - self._printed >= INTERVAL:
                self._print()

    def _appear(self) -> None:
        global _display, _shown
        with _lock:
            if self._finished or _quiet:
                return
            self._visible = True
            if not _is_terminal():
                self._print()
                return
            if _display is None:
                _display = _make_display()
                _display.start()
            self._task = _display.add_task(self.label, total=self.total, completed=int(self.done), text=self._text())
            _shown += 1

    def _leave_display(self) -> None:
        global _display, _shown
        if _display is None:
            return
        _display.remove_task(self._task)
        self._task = None
        _shown -= 1
        if _shown == 0:
            _display.stop()
            _display = None

    def _print(self) -> None:
        self._printed = time.monotonic()
        if _quiet:
            return
        if self.total:
            counted = f"{amount(self.done, self.total, self.unit)} ({100 * self.done / self.total:.0f} %)"
        else:
            counted = amount(self.done, None, self.unit) if self.done else "started"
        _plain(f"{self.label}: " + ", ".join(p for p in (counted, self._text()) if p))

    def _speed(self) -> float | None:
        """Units per second."""
        if self.rate is not None or self._first is None:
            return self.rate
        seconds, done = time.monotonic() - self._first[0], self.done - self._first[1]
        return done / seconds if done > 0 and seconds > 0 else None

    def _loss_text(self) -> str:
        return "" if self.loss is None else f"loss {self.loss:.3f}"

    def _text(self) -> str:
        """Loss, speed and time left, as far as they are known."""
        speed = self._speed()
        parts = [self._loss_text()]
        if speed:
            parts.append(f"{count(speed)} {self.unit or 'steps'}/s")
            if self.total:
                parts.append(f"{duration(max(0.0, self.total - self.done) / speed)} left")
        return ", ".join(p for p in parts if p)


def count(value: float) -> str:
    """1234567 -> ``1.23M``; small whole numbers as they are."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def amount(done: float, total: float | None, unit: str) -> str:
    """``1.2M of 200M tokens``."""
    text = count(done) if total is None else f"{count(done)} of {count(total)}"
    return f"{text} {unit}".rstrip()


def duration(seconds: float) -> str:
    """``45 s``, ``4 min 20 s``, ``3 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _plain(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _make_display() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    global _console
    if _console is None:
        _console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(markup=False),
        TextColumn("{task.fields[text]}", markup=False, style="dim"),
    )
    # transient: the bar goes away and one plain line stays, so that a scrolled-back terminal reads like a log
    return RichProgress(*columns, console=_console, transient=True, redirect_stdout=False)
