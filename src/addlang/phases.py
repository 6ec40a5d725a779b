"""What stands between the phases of a run: whether the next one is carried out, and what it may not use."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError, AddlangWarning, did_you_mean

if TYPE_CHECKING:
    import torch

    from addlang.data.prepare import PhaseData
    from addlang.data.sources import Row
    from addlang.rundir import RunDir
    from addlang.schema import Condition, Phase


def find_result(rows: Sequence[Mapping[str, Any]], key: str, model: str) -> Mapping[str, Any]:
    """The one row of ``results.jsonl`` that ``role/metric`` or ``role/metric/task`` names for a model.

    A task may be given by the word it begins with: ``lab`` finds ``lab tasks``.

    Raises:
        AddlangError: none or several.
    """
    role, metric, task = (*key.split("/", 2), "")[:3]
    own = [r for r in rows if r["model"] == model]
    found = [r for r in own if r["role"] == role and r["metric"] == metric]
    if task:
        exact = [r for r in found if r["task"] == task]
        found = exact or [r for r in found if r["task"].startswith(f"{task} ")]
    if len(found) == 1:
        return found[0]
    known = [f"{r['role']}/{r['metric']}/{r['task']}" for r in found or own]
    if found:
        raise AddlangError(f"'{key}' names several results", f"choose one of {', '.join(known)}")
    raise AddlangError(f"'{key}' is not measured in this run", did_you_mean(key, known))


def check_conditions(run: RunDir) -> None:
    """Every metric that a phase's ``continue_if`` asks for is among the first results; so that it does not fail later.

    Raises:
        AddlangError: one is not measured, or a bound is relative to a phase that is not earlier.
    """
    rows = _results(run)
    phases = run.recipe.phases
    for number, phase in enumerate(phases):
        for condition in phase.continue_if:
            try:
                find_result(rows, condition.metric, "before")
            except AddlangError as error:
                raise AddlangError(f"continue_if of phase '{phase.name}': {error.message}", error.fix) from None
            known = ["before", *(p.name for p in phases[:number])]
            if condition.relative_to is not None and condition.relative_to not in known:
                raise AddlangError(
                    f"continue_if of phase '{phase.name}': '{condition.relative_to}' is no earlier model",
                    did_you_mean(condition.relative_to, known),
                )


def decide(run: RunDir, phase: Phase) -> bool:
    """Whether a phase is carried out: its conditions hold of the model before it. Decided once, and kept in the state."""
    if not phase.continue_if:
        return True
    known = run.state.get("decisions", {})
    if phase.name not in known:
        names = [p.name for p in run.recipe.phases]
        at = names.index(phase.name)
        model = names[at - 1] if at else "before"
        checks = [judge(_results(run), condition, model) for condition in phase.continue_if]
        known = {**known, phase.name: {"run": all(c["holds"] for c in checks), "conditions": checks}}
        run.update(decisions=known)
    from addlang.progress import note

    decision = known[phase.name]
    for check in decision["conditions"]:
        note(f"phase '{phase.name}' {'is' if decision['run'] else 'is not'} carried out: {condition_text(check)}")
    return bool(decision["run"])


def judge(rows: Sequence[Mapping[str, Any]], condition: Condition, model: str) -> dict[str, Any]:
    """One condition with the numbers that it was judged by, as plain data."""
    value = float(find_result(rows, condition.metric, model)["value"])
    reference = None
    unit = 1.0
    if condition.relative_to is not None:
        unit = reference = float(find_result(rows, condition.metric, condition.relative_to)["value"])
    low = None if condition.at_least is None else condition.at_least * unit
    high = None if condition.at_most is None else condition.at_most * unit
    holds = all(
        math.isclose(value, bound) or (value > bound) == above
        for bound, above in ((low, True), (high, False))
        if bound is not None
    )
    about = condition.model_dump(mode="json", exclude_none=True)
    return {**about, "model": model, "value": value, "reference": reference, "low": low, "high": high, "holds": holds}


def condition_text(check: Mapping[str, Any]) -> str:
    """``source/exact_match/lab of 'read' is 0.52, at least 0.6 is asked for: does not hold``."""
    model = "the source model" if check["model"] == "before" else f"'{check['model']}'"
    bounds = [
        f"{word} {check[key]:.4g}" for word, key in (("at least", "low"), ("at most", "high")) if check[key] is not None
    ]
    relative = ""
    if check["reference"] is not None:
        relative = f" (relative to {check['reference']:.4g} of '{check['relative_to']}')"
    verdict = "holds" if check["holds"] else "does not hold"
    return f"{check['metric']} of {model} is {check['value']:.4g}, {' and '.join(bounds)}{relative} is asked for: {verdict}"


def end_early(run: RunDir, phase: Phase, result: Path) -> None:
    """Make the model in ``result`` the run's, because ``phase`` is not carried out; can be repeated."""
    from addlang.export import copy_small_files
    from addlang.models import Checkpoint

    if not run.done("result"):
        for file in [*Checkpoint(result).files, "model.safetensors.index.json"]:
            if (result / file).is_file():
                tmp = run.path / f"{file}.tmp"
                shutil.copyfile(result / file, tmp)
                os.replace(tmp, run.path / file)
        copy_small_files(result, run.path)
        names = [p.name for p in run.recipe.phases]
        at = names.index(phase.name)
        if not (run.path / "proof.json").is_file():
            run.write_json("proof.json", {"ok": True, "phases": []})
        defaults = {key: run.state.get(key, {}) for key in ("plan", "train")}
        stopped = {"phase": phase.name, "not_run": names[at:], "result": names[at - 1] if at else "source"}
        run.finish("result", stopped=stopped, **defaults)


def answer_replay(
    run: RunDir, phase: Phase, data: PhaseData, source: Path, model_hash: str, device: torch.device
) -> PhaseData:
    """Let the model that the phase starts from answer the prompts of its replay, and mix the answers in."""
    import torch

    from addlang.data.prepare import cache_root, with_replay
    from addlang.data.replay import generative_replay, wanted_tokens
    from addlang.models import load_model, stored_behaviour
    from addlang.progress import progress

    pool = data.pool
    assert pool is not None
    wanted = wanted_tokens(pool.replay, data.mixed.tokens, sum(p.tokens_total for p in data.mixture.sources))
    with progress(f"answering prompts for {phase.name}", unit="tokens") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        replayed, about, rows = generative_replay(
            pool,
            wanted,
            data.tokenizer,
            phase=phase,
            language=run.recipe.source_language,
            model_hash=model_hash,
            behaviour=stored_behaviour(source),
            load=lambda: load_model(source, dtype=torch.float32 if device.type == "cpu" else None, device=device),
            cache_dir=cache_root(),
            progress=show,
        )
    data = with_replay(data, run.recipe, phase, pool, replayed, about)
    folder = "" if phase is run.recipe.phases[-1] else f"phases/{phase.name}/"
    run.write_jsonl(
        f"{folder}replay.jsonl", [{"messages": row.messages, "prompt": f"{row.file}:{row.line}"} for row in rows]
    )
    run.update(data={**run.state.get("data", {}), phase.name: data.card})
    return data


def _results(run: RunDir) -> list[dict[str, Any]]:
    from addlang.report.files import read_jsonl

    return read_jsonl(run.path / "results.jsonl")


def check_promises(run: RunDir, base_dir: Path | None) -> None:
    """Verify ``no_previous_data`` and ``no_previous_weights`` of every phase and keep what was checked in the state.

    Raises:
        AddlangError: a row of an earlier phase stands in a phase that may not have it; names both places.
    """
    phases = run.recipe.phases
    kept: dict[str, dict[str, Any]] = dict(run.state.get("promises", {}))
    for number, phase in enumerate(phases):
        about = dict(kept.get(phase.name, {}))
        if phase.no_previous_weights:  # the recipe is not valid otherwise
            about["weights"] = {"strategy": phase.strategy.name, "guards": [g.name for g in phase.all_guards]}
        if phase.no_previous_data and "data" not in about:
            about["data"] = check_rows(phases[:number], phase, base_dir)
        if about:
            kept[phase.name] = about
    if kept:
        run.update(promises=kept)


def check_rows(earlier: Sequence[Phase], phase: Phase, base_dir: Path | None) -> dict[str, Any]:
    """Look for every row of a phase among those of earlier ones; returns what was compared.

    Rows are equal if their text is, after normalisation. All rows that a phase reads count, also those that it would hold
    out or leave out as copies, and what replay is drawn from.

    Raises:
        AddlangError: a row stands in both.
    """
    from addlang.data.similar import content_hash, normalise
    from addlang.progress import progress

    seen: dict[int, tuple[str, str, int]] = {}
    count = 0
    with progress(f"comparing rows of {phase.name} with earlier phases", unit="rows") as bar:
        for other in earlier:
            for row in _rows(other, base_dir):
                seen.setdefault(content_hash(normalise(row.content), 0), (other.name, row.file, row.line))
                bar.update(len(seen))
        for row in _rows(phase, base_dir):
            count += 1
            twin = seen.get(content_hash(normalise(row.content), 0))
            if twin is not None:
                name, file, line = twin
                raise AddlangError(
                    f"phase '{phase.name}' may use no previous data, but {row.file}, row {row.line}, is {file}, row {line}, "
                    f"of phase '{name}'",
                    "remove the row from one of them, or set no_previous_data: false",
                )
            bar.update(len(seen) + count)
    return {"rows": count, "earlier_rows": len(seen), "earlier_phases": [p.name for p in earlier], "shared": 0}


def _rows(phase: Phase, base_dir: Path | None) -> Iterator[Row]:
    from addlang.data.sources import read_rows

    specs = [*phase.datasets, *(phase.replay.datasets if phase.replay is not None else ())]
    for spec in specs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AddlangWarning)  # they came when the data were read for training
            yield from read_rows(spec, base_dir=base_dir)
