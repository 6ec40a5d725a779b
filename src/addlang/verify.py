"""``addlang verify``: the proof, computed again from the checkpoints as they lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from addlang.errors import AddlangError, ProofError
from addlang.recipe import Recipe
from addlang.rundir import RunDir, read_state


def verify_run(path: Path, source: str | None = None) -> dict[str, Any]:
    """The proof of every phase of a run: ``{"ok", "phases": [...]}``, as in ``proof.json``.

    Args:
        source: the source model, if it moved since.

    Raises:
        ProofError: the run ended before a phase, and its model is not that of the phase before.
        AddlangError: no run, files are missing or torn, or the source is another model than the run's.

    Phases after one whose proof fails are not looked at: what they started from is not what was trained.
    """
    from addlang.freeze.plan import FreezePlan
    from addlang.freeze.proof import prove
    from addlang.models import Checkpoint, resolve

    stopped = read_state(path).get("stopped")
    try:
        data = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise AddlangError(f"{path / 'recipe.yaml'} cannot be read: {error}", "the run is incomplete") from error
    recipe = Recipe.parse(data, where=str(path / "recipe.yaml"))
    run = RunDir(path, recipe)
    first = start = resolve(source or recipe.model_name_or_path, None if source else recipe.revision)
    proofs = []
    for phase in recipe.phases:
        if stopped and phase.name == stopped["phase"]:
            # a condition did not hold, so the run's model is that of the phase before
            if Checkpoint(start).hash != Checkpoint(path).hash:
                raise ProofError(f"the model in {path} is not that of '{stopped['result']}', which the run ended with")
            break
        begin = first if phase.start == "source" else start
        plan = FreezePlan.load(run.plan_path(phase))
        proofs.append({"phase": phase.name, **prove(Checkpoint(begin), Checkpoint(run.phase_dir(phase)), plan)})
        start = run.phase_dir(phase)
        if not proofs[-1]["ok"]:
            break
    return {"ok": all(p["ok"] for p in proofs), "phases": proofs}
