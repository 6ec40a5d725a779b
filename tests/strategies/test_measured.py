"""Measured costs: every strategy runs, or says why not."""

from __future__ import annotations

import pytest

from addlang.strategies import available, load_strategy, measured


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    }
    monkeypatch.setattr(measured, "SIZES", {**measured.SIZES, **small, "num_hidden_layers": 2})
    monkeypatch.setattr(measured, "SHAPE", (2, 16))
    monkeypatch.setattr(measured, "STEPS", 2)


@pytest.mark.parametrize("name", available())
def test_every_strategy_is_measured_or_says_why_not(name: str) -> None:
    found = measured.one(name, dict(load_strategy(name).example))
    if name == "lf_h2":  # its example names no model
        assert "why" in found
    else:
        assert found["time"] > 0
        assert found["memory"] > 0


def test_ratios_are_to_full(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def apply(self, _: object, given: tuple[str, object]) -> dict[str, float | str]:
            return {"full": {"time": 2.0, "memory": 8.0}, "ssu": {"time": 1.0, "memory": 4.0}}.get(
                given[0], {"why": "no model"}
            )  # type: ignore[return-value]

    class Context:
        @staticmethod
        def Pool(_: int) -> Pool:  # noqa: N802
            return Pool()

    monkeypatch.setattr(measured.multiprocessing, "get_context", lambda _: Context)
    found = measured.measured({"ssu": {}, "lf_h2": {}})
    assert found["ssu"] == {"time_ratio": 0.5, "memory_ratio": 0.5}
    assert measured.cells("ssu", found) == ["0.50", "0.50"]
    assert measured.cells("lf_h2", found) == ["not measured", "-"]
