"""Whether Triton kernels of ours work on a device: they are compiled where they run, and that can fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from addlang.errors import AddlangWarning, first_line


def works(check: Callable[[], bool], consequence: str) -> bool:
    """Carry a check out; where it fails or raises, a warning says what that costs and why.

    Args:
        check: runs the kernels on small data and compares.
        consequence: for the reader, such as "split layers run without Triton and take longer".
    """
    try:
        right, reason = check(), "its kernels give wrong values here"
    except Exception as error:
        right, reason = False, f"{type(error).__name__}: {first_line(error)}"
    if not right:
        warnings.warn(f"{consequence} ({reason})", AddlangWarning, stacklevel=3)
    return right
