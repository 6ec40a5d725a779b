"""Values that may differ over a model: one number, a gradient over its depth, or by part of a tensor's name.

The forms and their meaning are mergekit's, so that its files can be used.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from addlang.schema import Strict


class Conditional(Strict):
    """A value for the tensors whose name contains ``filter``."""

    value: float | tuple[float, ...]
    filter: str | None = Field(None, description="part of a tensor's name; None or '*': every tensor")

    def applies(self, name: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in name


def _no_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must not be empty")
    return value


Setting = Annotated[
    float | tuple[float, ...] | Conditional | tuple[Conditional, ...],
    BeforeValidator(_no_booleans),
]


def value_at(setting: Setting, name: str, position: float) -> float | None:
    """The value for one tensor; None if it has filters and none of them applies.

    Args:
        name: the tensor's.
        position: of its layer, from 0 (first) to 1 (last); 0 outside the layers, as in mergekit.
    """
    if isinstance(setting, int | float):
        return float(setting)
    if isinstance(setting, Conditional):
        setting = (setting,)
    if isinstance(setting[0], Conditional):
        for condition in setting:
            assert isinstance(condition, Conditional)
            if condition.applies(name):
                return value_at(condition.value, name, position)
        return None
    values = [float(v) for v in setting if not isinstance(v, Conditional)]
    scaled = position * (len(values) - 1)
    low = int(scaled)
    high = min(len(values) - 1, low + 1)
    return values[low] + (scaled - low) * (values[high] - values[low])


def values_of(setting: Setting) -> list[float]:
    """Every number in a setting, to be checked against a range."""
    if isinstance(setting, int | float):
        return [float(setting)]
    if isinstance(setting, Conditional):
        return values_of(setting.value)
    return [v for item in setting for v in values_of(item)]
