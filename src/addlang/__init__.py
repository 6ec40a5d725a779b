"""addlang: teach an instruction-tuned LLM a new language without losing the ones it has.

Importing this package loads neither torch nor transformers; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addlang.freeze.plan import FreezePlan as FreezePlan
    from addlang.recipe import Recipe as Recipe
    from addlang.run import execute as execute
    from addlang.shielding import shield as shield
    from addlang.shielding import unshield as unshield

_LAZY = {
    "FreezePlan": "addlang.freeze.plan",
    "Recipe": "addlang.recipe",
    "execute": "addlang.run",
    "shield": "addlang.shielding",
    "unshield": "addlang.shielding",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("addlang")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'addlang' has no attribute '{name}'")
