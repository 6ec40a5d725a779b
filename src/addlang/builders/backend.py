"""What a back-end of the builders does: answer requests one by one or in batches, and say what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from addlang.errors import AddlangError


@dataclass(frozen=True)
class Request:
    """A text to translate.

    Attributes:
        key: names the text and everything that its translation depends on.
        text: with marks in the place of what is protected.
        attempt: 0, and more after refused translations.
        complaint: what was wrong with the last one.
    """

    key: str
    text: str
    attempt: int = 0
    complaint: str | None = None


@dataclass(frozen=True)
class Reply:
    """What came back, as it is kept in the journal.

    Attributes:
        text: None if there is none that could be used.
        problem: why not, as far as the back-end knows: cut off, refused by the server.
        final: asking again would not help.
        tokens_in, tokens_out: what was paid for; ``estimated`` where the server did not say.
    """

    key: str
    attempt: int
    text: str | None
    problem: str | None = None
    final: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    estimated: bool = False

    def plain(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)


class Backend(Protocol):
    """Something that translates."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a reply depends on, as plain data, without secrets."""

    def run(
        self, next_request: Callable[[], Request | None], keep: Callable[[Reply], None]
    ) -> Iterator[tuple[Request, Reply]]:
        """Answer requests until there are none.

        Args:
            next_request: the next one, or None if there is none now; after a reply has been handed out there may be more.
            keep: called as soon as a reply is there, from any thread, before it is handed out.

        Raises:
            AddlangError: nothing more can be answered (the server is down, the key is wrong, the budget is used up);
                what came before has been kept.
        """


class OutOfBudgetError(AddlangError):
    """The next request does not fit under the cap any more."""
