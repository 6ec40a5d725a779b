"""Measured costs: every strategy and every guard runs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from tiny import make_model

from addlang import guards
from addlang.recipe import Phase
from addlang.strategies import available, load_strategy, measured
from addlang.strategies.costs import guard_rows


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
    monkeypatch.setattr(measured, "CONVERSATIONS", (16, 2))


REFUSED = {
    **{
        (a, g): f"the guard {g} pulls every trained weight"
        for a in ("lora", "dora", "adalora")
        for g in ("ewc", "l2sp")
    },
    ("self_anchor", "self_anchor"): "twice|brings",
}


def watch_guards(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The terms that guards add, one after the other."""
    worked: list[float] = []
    inner = measured.started

    def watched(*given: object) -> object:
        active = inner(*given)  # type: ignore[arg-type]
        for guard in active:
            backward = guard.backward
            monkeypatch.setattr(guard, "backward", lambda *a, b=backward: worked.append(b(*a)))
        return active

    monkeypatch.setattr(measured, "started", watched)
    return worked


@pytest.mark.parametrize("name", available())
def test_every_strategy_is_measured(name: str) -> None:
    """Also the one that needs the model before the last phase, which is made up, and the one that brings a guard along."""
    found = measured.one(name, dict(load_strategy(name).example))
    assert found["time"] > 0
    assert found["memory"] > 0
    assert found["read"] == pytest.approx(
        sum(g.token_share for g in load_strategy(name)(**load_strategy(name).example).guards()), abs=0.15
    )


@pytest.mark.parametrize("name", guards.available())
def test_every_guard_is_measured_at_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worked = watch_guards(monkeypatch)
    found = measured.one("full", {}, (name,))
    assert found["time"] > 0
    assert max(worked) > 0  # after the first step the model is no longer the source


@pytest.mark.parametrize("guard", guards.available())
@pytest.mark.parametrize("name", available())
def test_every_guard_works_with_every_strategy_or_is_refused_with_the_reason(
    name: str, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(load_strategy(name).example)
    given: dict[str, Any] = {"datasets": [{"path": "x"}], "strategy": {"name": name, **options}, "guards": [guard]}
    if reason := REFUSED.get((name, guard)):
        with pytest.raises(ValueError, match=reason):
            Phase(**given)
        return
    assert guard in [g.name for g in Phase(**given).all_guards]
    worked = watch_guards(monkeypatch)
    monkeypatch.setattr("addlang.train.peak.Peak", mock.MagicMock)  # nine tenths of the time, and not the question here
    assert measured.one(name, options, (guard,))["time"] > 0
    assert max(worked) > 0


def test_the_cost_table_has_a_row_for_every_guard() -> None:
    rows = {r["strategy"]: r["note"] for r in guard_rows(make_model("llama"))}
    assert {*rows, *(f"full + {n}" for n in available())} >= {f"full + {n}" for n in guards.available()}
    assert rows["full + ewc"] == "4 bytes per trained weight of a 16-bit checkpoint"
    assert rows["full + kl"] == "reads 10% of the tokens"


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
