"""Strategies: one file per method; the file name is the registry name."""

from addlang.strategies.base import Attached, PlanInputs, Strategy, available, load_strategy, make_strategy

__all__ = ["Attached", "PlanInputs", "Strategy", "available", "load_strategy", "make_strategy"]
