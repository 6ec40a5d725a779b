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
    from addlang.freeze.masked import Masked

    if execution == "masked":
        return Masked(model, plan, masters=masters)
    from addlang.freeze.split import SplitAttached, why_not_split

    reason = why_not_split(model, plan)
    if reason is not None:
        if execution == "auto":
            return Masked(model, plan, masters=masters)
        raise AddlangError(f"split execution cannot run this plan: {reason}", "use execution: masked")
    forms: dict[str, Literal["auto", "assemble", "resident"]] = {
        "auto": "auto",
        "split": "auto",
        "split_assemble": "assemble",
        "split_resident": "resident",
    }
    return SplitAttached(model, plan, form=forms[execution], masters=masters)
