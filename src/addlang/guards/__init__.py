"""Guards: terms that are added to the loss and hold the model near its source. One file each; combine with strategies."""

from addlang.guards.base import ActiveGuard, Guard, GuardContext, available, load_guard, make_guard

__all__ = ["ActiveGuard", "Guard", "GuardContext", "available", "load_guard", "make_guard"]
