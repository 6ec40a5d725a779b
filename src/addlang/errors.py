"""Errors for users: what is wrong, where, and how to mend it. Anything else that escapes is a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class AddlangError(ValueError):
    """Bad input, a violated constraint or an unusable environment. The CLI prints it without a traceback.

    Args:
        message: what is wrong, naming the file, row, key or tensor.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")
        self.message = message
        self.fix = fix


class BudgetError(AddlangError):
    """The English budget was not kept."""

    exit_code = 3


class ProofError(AddlangError):
    """A declared constraint does not hold: something that was frozen has changed."""

    exit_code = 4


class PreemptedError(AddlangError):
    """The run was told to stop (SIGTERM) and saved its state first."""

    exit_code = 75


class AddlangWarning(UserWarning):
    """Something a user must know but that does not stop the run; every one is shown in the report."""


def first_line(error: BaseException) -> str:
    """What an exception says, without the rest of a long message; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'? Available: ...`` for an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Available: {', '.join(names)}"


def options_at(model: Any, loc: Sequence[Any]) -> tuple[str, Iterable[str]]:
    """The unknown key at the end of ``loc`` and the options that there are at that place, for :func:`did_you_mean`."""
    for part in loc[:-1]:
        field = model.model_fields.get(part)
        if not hasattr(getattr(field, "annotation", None), "model_fields"):
            break
        model = field.annotation
    return str(loc[-1]), model.model_fields
