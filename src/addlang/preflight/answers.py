"""The questions that a preflight is asked, each with an answer and what it rests on. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from addlang.data.mixture import MANY_EPOCHS
from addlang.preflight.tokens import FRAGMENTS, UNKNOWN

DEAR = 2.0  # times as many tokens per word as the source: sequences, memory and time grow with it


@dataclass(frozen=True)
class Answer:
    """``answer``: yes, at a price, no, or cannot tell."""

    question: str
    answer: str
    why: str


def answers(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Can it be done? One row per question, from the parts of a preflight that were measured."""
    return [dict(vars(ask(result))) for ask in (_tokenizer, _amount, _learns, _kept, _memory)]


def _tokenizer(result: Mapping[str, Any]) -> Answer:
    question = "Can the tokenizer write the language?"
    if result.get("model") is None:
        return Answer(question, "cannot tell", "it was not tried")
    target, source = (result["model"]["tokenizer"][role] for role in ("target", "source"))
    why = f"{target['unknown']:.1%} of the tokens are unknown, {target['fragments']:.0%} of the bytes stand in pieces of characters"
    times = 1.0
    if target["tokens_per_word"] and source["tokens_per_word"]:
        times = target["tokens_per_word"] / source["tokens_per_word"]
        why += (
            f", {target['tokens_per_word']:.1f} tokens per word against {source['tokens_per_word']:.1f} in the source"
        )
    if target["unknown"] > UNKNOWN:
        return Answer(question, "no", why)
    return Answer(question, "at a price" if target["fragments"] > FRAGMENTS or times > DEAR else "yes", why)


def _amount(result: Mapping[str, Any]) -> Answer:
    question = "Are there enough data for the plan?"
    if result.get("data") is None:
        return Answer(question, "cannot tell", "they were not read")
    sources = [s for s in result["data"]["sources"] if s["role"] == "target"]
    if not sources:
        return Answer(question, "cannot tell", "there are no target data")
    most = max(sources, key=lambda s: float(s["epochs"]))
    tokens = sum(int(s["tokens"]) for s in sources)
    why = f"{tokens:,} tokens of the target language; the planned run reads {most['path']} {most['epochs']:.1f} times"
    if most["epochs"] > MANY_EPOCHS:
        return Answer(
            question, "no", f"{why}: beyond {MANY_EPOCHS} times little is gained (--tokens {MANY_EPOCHS * tokens})"
        )
    return Answer(question, "yes", why)


def _learns(result: Mapping[str, Any]) -> Answer:
    question = "Does the model learn from them?"
    planned = _planned(result)
    if isinstance(planned, str):
        return Answer(question, "cannot tell", planned)
    gained, steps = planned["gained"], result["settings"]["probe_steps"]
    why = f"in {steps} steps as planned the loss on held-out text {'falls' if gained > 0 else 'rises'} by {abs(gained):.3f} nats per token"
    return Answer(question, "yes" if gained > 0 else "no", why)


def _planned(result: Mapping[str, Any]) -> Mapping[str, Any] | str:
    """The probe of the planned setting, or why there is none: another one says nothing about it."""
    for probe in result.get("probes") or []:
        if probe["planned"]:
            return dict(probe)
    if "not_probed" in result:
        return f"the planned setting was not probed: {result['not_probed']}"
    return "no probe was run"


def _kept(result: Mapping[str, Any]) -> Answer:
    keep = result["settings"]["keep"]
    question = f"Is {keep:.0%} of the source kept, as planned?"
    planned = _planned(result)
    if isinstance(planned, str):
        return Answer(question, "cannot tell", planned)
    said = planned["forecast"]
    if said["lost"] is None:
        return Answer(question, "cannot tell", "there is no forecast" + (f": {said['why'][-1]}" if said["why"] else ""))
    why = f"forecast: {said['lost']:.1%} lost, [{said['low']:.1%}, {said['high']:.1%}] with 90 %"
    sure = "yes" if said["high"] <= 1 - keep else "no" if said["low"] > 1 - keep else "cannot tell"
    return Answer(question, sure, why if sure != "cannot tell" else f"{why}: the bound lies inside the interval")


def _memory(result: Mapping[str, Any]) -> Answer:
    question = "Does it fit into this device's memory?"
    plan = result.get("plan")
    if plan is None:
        return Answer(question, "cannot tell", "the memory could not be worked out")
    need, available = plan["memory"]["total"], plan["available"]
    why = f"{need / 2**30:.2f} GiB are needed, {available / 2**30:.0f} GiB can be used on {plan['device']}"
    return Answer(question, "yes" if need <= available else "no", why)
