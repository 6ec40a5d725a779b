"""What errors say."""

from __future__ import annotations

import pytest

from addlang.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("bad\nand a long story"), "bad"), (OSError("\n  late "), "late"), (KeyError(), "KeyError")],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line
