"""Progress: silent when short or quiet, plain lines off a terminal, one shared display on one."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import pytest

from addlang import progress as module
from addlang.progress import count, duration, note, progress, set_quiet


def _sleep_and_fail() -> None:
    time.sleep(0.15)
    raise ZeroDivisionError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "_quiet", False)


def test_a_short_job_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("loading", total=3, unit="files") as p:
        p.update(3)
    assert capsys.readouterr() == ("", "")


def test_plain_lines_have_loss_speed_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    with progress("training", total=2000, unit="tokens") as p:
        time.sleep(0.15)
        p.update(500, loss=3.21, rate=100)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[1] == "training: 500 of 2k tokens (25 %), loss 3.210, 100 tokens/s, 15 s left"
    assert lines[-1].startswith("training: 500 of 2k tokens, loss 3.210, done in 0.")


def test_plain_lines_come_at_most_once_per_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", total=100) as p:
        time.sleep(0.15)
        for i in range(50):
            p.update(i)
    assert len(capsys.readouterr().err.splitlines()) == 2  # when it appears, and at the end


def test_a_failed_job_says_that_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("training", total=10):
        _sleep_and_fail()
    assert "stopped after" in capsys.readouterr().err


def test_speed_of_a_resumed_job_counts_only_what_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    p = progress("training", total=100)
    p.update(50)
    p.update(60)
    assert p._speed() == pytest.approx(1.0)


def test_quiet_silences_progress_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(True)
    note("hello")
    with progress("training", total=10) as p:
        time.sleep(0.1)
        p.update(5)
    assert capsys.readouterr() == ("", "")


def test_nested_and_parallel_jobs_share_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    def job(name: str) -> None:
        with progress(f"{name} [brackets]", total=10, unit="items") as p:
            time.sleep(0.1)
            p.update(5, loss=1.0)
            with progress("inner", total=2) as q:
                time.sleep(0.1)
                q.update(1)
                note("a [note]")

    threads = [threading.Thread(target=job, args=(f"job {i}",)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert module._display is None
    assert module._shown == 0
    assert "job 1 [brackets]: 5 of 10 items, loss 1.000, done in" in terminal.getvalue()
    assert "a [note]" in terminal.getvalue()


def test_importing_it_loads_neither_torch_nor_rich() -> None:
    code = "import sys, addlang.progress; sys.exit(any(m in sys.modules for m in ('torch', 'rich', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (0.25, "0.25"), (999, "999"), (999.9, "1k"), (1200, "1.2k"), (200_000_000, "200M")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.1 s"), (45, "45 s"), (59.9, "1 min 00 s"), (260, "4 min 20 s"), (11_100, "3 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
