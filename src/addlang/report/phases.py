"""What happened between the phases of a run, in words: decisions, what was checked, replay, mixtures, pacing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addlang.phases import condition_text
from addlang.report import numbers
from addlang.report.files import RunData


def phase_notes(run: RunData, name: str) -> list[str]:
    """Sentences about one phase."""
    notes = []
    decision = (run.state.get("decisions") or {}).get(name)
    if decision:
        checks = "; ".join(condition_text(c) for c in decision.get("conditions") or [])
        notes.append(f"{'Carried out' if decision.get('run') else 'Not carried out'}: {checks}.")
    elif name in ((run.state.get("stopped") or {}).get("not_run") or []):
        notes.append("Not carried out: the run ended before it.")
    promises = (run.state.get("promises") or {}).get(name) or {}
    if data := promises.get("data"):
        notes.append(_about_data(data))
    if weights := promises.get("weights"):
        guards = f" and guards {', '.join(weights['guards'])}" if weights.get("guards") else ""
        notes.append(
            "No previous weights: nothing held training to the weights or outputs it started from "
            f"(strategy {weights['strategy']}{guards})."
        )
    card = (run.state.get("data") or {}).get(name) or {}
    notes += [_sentence(n) for n in card.get("notes") or [] if n.startswith("as many steps")]
    notes += [replay_text(s) for s in card.get("sources") or [] if s.get("replay")]
    notes += [guard_text(g) for g in (run.state.get("guards") or {}).get(name) or []]
    rows = [r for r in run.metrics.get(name, []) if "sampler_rate" in r]
    if rows:
        last = rows[-1]
        notes.append(
            f"Self-paced: the easiest {numbers.percent(rows[0]['sampler_rate'])} of each data set's units at first, "
            f"{numbers.percent(last['sampler_rate'])} in the end; measuring read {numbers.integer(last['sampler_scored_tokens'])} "
            "labels, which do not count towards the budget."
        )
    return notes


def stopped_sentence(run: RunData) -> str | None:
    """That the run ended before a phase, and with which model."""
    stopped = run.state.get("stopped")
    if not stopped:
        return None
    result = "the source model" if stopped["result"] == "source" else f"that of phase '{stopped['result']}'"
    return f"phase '{stopped['phase']}' was not carried out, so the model is {result}"


def _about_data(data: Mapping[str, Any]) -> str:
    if not data.get("earlier_phases"):
        return "No previous data: there is no earlier phase in this run."
    earlier = ", ".join(data["earlier_phases"])
    return (
        f"No previous data: none of the phase's {numbers.integer(data['rows'])} rows is among the "
        f"{numbers.integer(data['earlier_rows'])} of {earlier}."
    )


def replay_text(source: Mapping[str, Any]) -> str:
    """How a replayed source came about."""
    replay = source["replay"]
    how = "on top of" if replay["mode"] == "append" else "in place of"
    text = (
        f"Replay ({replay['kind']}): {numbers.percent(replay['share'])} {how} the phase's tokens, "
        f"{numbers.integer(source['rows'])} conversations from {source['path']}"
    )
    if replay["kind"] != "generative":
        return text + "."
    dropped = ", ".join(f"{numbers.integer(n)} {reason}" for reason, n in replay["dropped"].items()) or "none"
    settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in replay["decoding"].items())
    return (
        f"{text}; the model that the phase starts from answered {numbers.integer(replay['prompts'])} prompts ({settings}), "
        f"{numbers.integer(replay['kept'])} answers were kept, dropped: {dropped}."
    )


def guard_text(guard: Mapping[str, Any]) -> str:
    """What a guard held the model to, and how strongly; of sampled conversations what they cover."""
    facts = {k.removeprefix("sampled_"): v for k, v in guard.items()}
    given = [f"{k.replace('_', ' ')} {facts[k]:g}" for k in ("weight", "share", "temperature", "top_k") if k in facts]
    text = (
        f"Guard {guard['guard']} ({', '.join([*given, *(str(facts[k]) for k in ('mode', 'schedule') if k in facts)])})"
    )
    if "source" in facts:
        text += f", on {numbers.integer(facts.get('sequences', facts.get('conversations')))} conversations: {facts['source']}"
    if facts.get("cut"):
        text += f"; {numbers.integer(facts['cut'])} were cut to sequence_length"
    if "drawn" not in facts:
        return text + "."
    dropped = ", ".join(f"{numbers.integer(n)} {reason}" for reason, n in facts["dropped"].items()) or "none"
    text += (
        f". The source model sampled {numbers.integer(facts['drawn'])} conversations, {numbers.integer(facts['conversations'])} "
        f"were kept, dropped: {dropped}. They open in {numbers.integer(facts['openings'])} ways (first three words); the "
        f"commonest is {numbers.percent(facts['largest_opening'])} of them."
    )
    said = [f"“{_short(e['instruction'])}”, answered “{_short(e['answer'])}”" for e in facts.get("examples") or []]
    return f"{text} For example: {'; '.join(said)}." if said else text


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 160 else words[:159] + "…"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
