"""benchmarks/step.py: one run measures every setting, and the ratios of each are found under its name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarking import load


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, with a stand-in for what a mode's own process says and does."""
    module = load("step")

    class Process:
        def __init__(self, command: list[str], **kw: Any) -> None:
            given = {k: command[command.index(f"--{k}") + 1] for k in ("mode", "sequence_length")}
            self.factor = int(given["sequence_length"]) * (2 if given["mode"] == "full" else 1)
            self.stdout = self
            self.stderr = None

        def readline(self) -> str:
            return json.dumps({"flops": self.factor, "peak_memory": 100, "estimate": 100})

        def communicate(self, _: str) -> None:
            pass

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=Process, PIPE=None))
    monkeypatch.setattr(module, "ask", lambda process: [float(process.factor)] * 2)
    return module


def run(step: Any, tmp_path: Path, *arguments: str) -> Any:
    step.main([*arguments, "--json", str(tmp_path / "step.json"), "--steps", "1"])
    return json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))


def test_one_run_measures_both_lengths_and_keeps_the_ratios_of_every_setting(step: Any, tmp_path: Path) -> None:
    found = run(step, tmp_path, "--preset", "100m")
    assert set(found["ratios"]) == {
        f"{precision}, {length}, checkpointing {on}"
        for length in (512, 2048)
        for precision in ("fp32", "bf16")
        for on in ("off", "on")
    }
    assert all(r["split/full"]["time"] == 0.5 for r in found["ratios"].values())
    assert [(s["sequence_length"], s["batch"]) for s in found["settings"] if s["precision"] == "bf16"] == [
        (512, 4), (512, 4), (2048, 1), (2048, 1),
    ]  # fmt: skip


def test_one_length_may_be_given_by_either_name(step: Any, tmp_path: Path) -> None:
    for option in ("--sequence_length", "--sequence_lengths"):
        found = run(step, tmp_path, option, "256", "--precisions", "fp32", "--checkpointings", "off")
        assert list(found["ratios"]) == ["fp32, 256, checkpointing off"]


def test_a_large_preset_on_a_cpu_measures_the_short_length_only(step: Any, tmp_path: Path) -> None:
    found = run(step, tmp_path, "--preset", "7b", "--precisions", "bf16", "--checkpointings", "on")
    assert found["sequence_lengths"] == [512]
