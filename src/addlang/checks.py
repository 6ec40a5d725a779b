"""What must hold before a run measures anything: libraries, the model's files, the calibration data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError, AddlangWarning
from addlang.recipe import Recipe
from addlang.rundir import RunDir


def check_requirements(recipe: Recipe) -> None:
    """What can be known to fail before any weight is loaded."""
    from addlang.liger import import_liger
    from addlang.models import Checkpoint, resolve
    from addlang.strategies.base import import_peft
    from addlang.train.optimizers import require_libraries

    for phase in recipe.phases:
        needs = phase.strategy.requires()
        if "reference_model" in needs:
            Checkpoint(resolve(phase.strategy.reference_model))
        if "peft" in needs:
            import_peft(phase.strategy.name)
        if phase.use_liger_kernel:
            import_liger()
        require_libraries(phase)


def check_model(recipe: Recipe, source: Path, tokenizer: Any, *, weights: bool = True) -> None:
    """What the model's directory must offer: whole files with every parameter and nothing else, a long enough context, a chat
    template to score conversations.

    Args:
        weights: False: they are not at hand, and not needed.

    Raises:
        AddlangError: naming what is missing, torn, too short or contradictory.
    """
    from addlang.data.chat import require_chat_template
    from addlang.evaluation import context_length
    from addlang.freeze.proof import tied_names
    from addlang.guards.sampling import turn_frame
    from addlang.liger import check_liger
    from addlang.models import Checkpoint, skeleton
    from addlang.train.optimizers import check_types

    checkpoint = Checkpoint(source) if weights else None  # complete and whole, as its headers say
    stored = None if checkpoint is None else checkpoint.dtype
    longest = context_length(source)
    window = recipe.evaluation.sequence_length
    if window is not None and window > longest:
        raise AddlangError(
            f"evaluation.sequence_length {window} is longer than the model's context of {longest} tokens",
            f"set it to {longest} or less",
        )
    for phase in recipe.phases:
        if phase.sequence_length > longest:
            raise AddlangError(
                f"phase '{phase.name}': sequence_length {phase.sequence_length} is longer than the model's context of {longest} tokens",
                f"set sequence_length to {longest} or less",
            )
        if stored is not None:
            check_types(phase, stored)
        if phase.use_liger_kernel:
            check_liger(skeleton(source).config.model_type)
        if phase.execution != "auto":
            model = skeleton(source)
            phase.strategy.check_execution(model, phase.strategy.outline(model), phase.execution)
    if checkpoint is not None:  # the export would refuse it
        tied_names(checkpoint, dict(skeleton(source).named_parameters()))
    needs = [what for p in recipe.phases for part in (p.strategy, *p.all_guards) for what in part.requires()]
    if "source_text" in needs or "chat_template" in needs:
        require_chat_template(tokenizer)
    if "chat_template" in needs:
        turn_frame(tokenizer)  # conversations can be sampled


def check_calibration(run: RunDir, tokenizer: Any, base_dir: Path | None) -> None:
    """Read the calibration data of what is still to be planned, so that an error does not come after the evaluation."""
    from addlang.data.calibration import calibration_batches

    for phase in run.recipe.phases:
        needs = {what for part in (phase.strategy, *phase.all_guards) for what in part.requires()}
        if "source_text" in needs and not run.done(f"plan:{phase.name}"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AddlangWarning)  # they come again, and to the report, when it is used
                calibration_batches(
                    phase.calibration, tokenizer, language=run.recipe.source_language, base_dir=base_dir
                )
