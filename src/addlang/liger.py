"""liger-kernel's fused norms, rotary embeddings and SwiGLU for one model, and for no other."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

from addlang.errors import AddlangError, AddlangWarning, first_line


def apply_liger(model: Any) -> None:
    """Replace norms, rotary embeddings and SwiGLU of a model by liger-kernel's, in place. The loss stays addlang's own.

    liger-kernel also replaces classes and functions in transformers' module of the architecture, for every model that is
    made there afterwards: the evaluation after training would run on other kernels than the one before, and an MLP with biases
    would lose them. They are put back, and this model's attention alone keeps the function that it looks up there.

    Raises:
        AddlangError: liger-kernel is not installed, or does not know the architecture.
    """
    liger = import_liger()
    kind = model.config.model_type
    check_liger(kind)
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    try:
        liger._apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    finally:
        fused = {name: getattr(module, name) for name, was in before.items() if getattr(module, name) is not was}
        for name in fused:
            setattr(module, name, before[name])
    unused = {name for name, value in fused.items() if not isinstance(value, type)}
    for part in model.modules():
        forward = type(part).forward
        here = getattr(forward, "__globals__", None) is vars(module) and "forward" not in vars(part)
        if here and (names := fused.keys() & set(forward.__code__.co_names)):
            part.forward = types.MethodType(_with_globals(forward, fused), part)
            unused -= names
    if unused:
        warnings.warn(
            f"use_liger_kernel: {type(model).__name__} does not use liger-kernel's {', '.join(sorted(unused))} in a way that is known; left out",
            AddlangWarning,
            stacklevel=2,
        )
    if kind in ("olmo2", "olmo3"):  # liger-kernel forgets their norms of queries and keys
        for layer in model.base_model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                liger.monkey_patch._patch_rms_norm_module(norm, in_place=False)


def _with_globals(function: Any, changes: dict[str, Any]) -> Any:
    """The same function with other values for some of the globals that it names."""
    names = {**function.__globals__, **changes}
    del names["__name__"]  # torch.compile would look the globals up in the module of that name, which has others
    own = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def check_liger(kind: str) -> None:
    """Whether liger-kernel knows an architecture, as far as that can be asked here: a plan is also made for other machines.

    Raises:
        AddlangError: it does not.
    """
    try:
        known = import_liger().monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    except AddlangError:
        return
    if kind not in known:
        raise AddlangError(
            f"use_liger_kernel: liger-kernel does not know '{kind}' models", "leave use_liger_kernel out"
        )


def import_liger() -> Any:
    """liger-kernel's module for transformers.

    Raises:
        AddlangError: it is not installed, or cannot be used on this machine.
    """
    try:
        import liger_kernel.transformers  # type: ignore[import-not-found]
        import liger_kernel.transformers.monkey_patch  # type: ignore[import-not-found]
    except ImportError as error:
        raise AddlangError(
            f"use_liger_kernel: liger-kernel cannot be used ({first_line(error)})",
            "pip install 'addlang[liger]' on a machine with a GPU, or leave use_liger_kernel out",
        ) from error
    return liger_kernel.transformers
