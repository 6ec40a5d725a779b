"""From a freeze plan to a model that obeys it: ``masked`` defines the semantics, ``split`` is the fast engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan
    from addlang.strategies.base import Attached

EXECUTIONS = ("auto", "masked", "split", "split_assemble", "split_resident")


def attach_plan(model: nn.Module, plan: FreezePlan, execution: str = "auto", *, masters: bool = True) -> Attached:
    """Make ``plan`` true on ``model``, in place.

    Args:
        execution: ``masked``; ``split`` (form chosen), ``split_assemble``, ``split_resident``; ``auto``: split where
            it is possible and there is something to split, masked otherwise.
        masters: keep what is trained in fp32 where the model is stored in 16 bits.

    Raises:
        AddlangError: the plan is not of this model, or ``split`` cannot execute it (the reason is named).
    """
    if execution not in EXECUTIONS:
        raise AddlangError(f"unknown execution '{execution}'", did_you_mean(execution, EXECUTIONS))
    plan.validate(model)
    check_execution(model, plan, execution)
    from addlang.freeze.masked import Masked
    from addlang.freeze.split import SplitAttached, why_not_split

    if execution == "masked" or why_not_split(model, plan) is not None:
        return Masked(model, plan, masters=masters)
    forms: dict[str, Literal["auto", "assemble", "resident"]] = {
        "auto": "auto",
        "split": "auto",
        "split_assemble": "assemble",
        "split_resident": "resident",
    }
    return SplitAttached(model, plan, form=forms[execution], masters=masters)


def check_execution(model: nn.Module, plan: FreezePlan, execution: str) -> None:
    """Shapes are enough, so the model may be on the meta device and the plan an outline.

    Raises:
        AddlangError: split execution is asked for and cannot run the plan; the reason is named.
    """
    from addlang.freeze.split import why_not_split

    if execution.startswith("split") and (reason := why_not_split(model, plan)) is not None:
        raise AddlangError(f"split execution cannot run this plan: {reason}", "use execution: masked")
