"""The split layers for other people's training loops: transformers.Trainer, TRL, accelerate, or a plain loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar
from weakref import WeakKeyDictionary

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan
    from addlang.freeze.split import SplitAttached

    Model = TypeVar("Model", bound=nn.Module)

_shielded: WeakKeyDictionary[nn.Module, SplitAttached] = WeakKeyDictionary()


def shield(
    model: Model,
    plan: FreezePlan,
    *,
    execution: Literal["auto", "split", "split_assemble"] = "auto",
    masters: bool = True,
) -> Model:
    """Make what ``plan`` freezes untrainable, in place, whatever trains the model afterwards.

    Afterwards ``model.parameters()`` with ``requires_grad`` are what trains; frozen columns and rows of linear layers
    are no part of them, so no weight decay, momentum or clipping reaches them. Partly frozen vectors and token rows
    keep their parameter, but the frozen elements are laid over it whenever it is used or saved. There are no hooks.

    ``model.state_dict()`` and ``model.save_pretrained()`` give the ordinary dense checkpoint.

    Args:
        execution: all three are the assemble form; the resident one needs a call after every optimizer step, which only
            addlang's own loop can promise.
        masters: keep what trains in fp32 where the model is stored in 16 bits; then train under autocast (``bf16=True``
            in the Trainer).

    Raises:
        AddlangError: the plan is not of this model, or has parts that split layers cannot hold, by name.
    """
    from addlang.freeze.split import SplitAttached

    known = ("auto", "split", "split_assemble")
    if execution not in known:
        raise AddlangError(f"shield cannot use execution '{execution}'", did_you_mean(execution, known))
    if model in _shielded:
        raise AddlangError("this model is shielded already", "call addlang.unshield(model) first")
    plan.validate(model)
    _shielded[model] = SplitAttached(model, plan, form="assemble", masters=masters)
    return model


def unshield(model: Model) -> Model:
    """Plain modules with dense weights again, in place; what was trained is in them and everything is trainable.

    Raises:
        AddlangError: the model is not shielded, or is sharded.
    """
    attached = _shielded.get(model)
    if attached is None:
        raise AddlangError("this model is not shielded", "give the model that addlang.shield returned")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise AddlangError("a sharded model cannot be unshielded", "save it, and load the checkpoint")
    attached.detach()
    del _shielded[model]
    return model
