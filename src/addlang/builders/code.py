"""Program code that stands in a text without a fence around it, as in Alpaca's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CALL = r"(?:new\s+)?[A-Za-z_][\w.]*[(\[].*"
_VALUE = rf"(?:[-+]?[\d.]+|\"[^\"]*\"|'[^']*'|[\[({{].*[\])}}]|[\[({{]|{_CALL}|True|False|None|true|false|null)"
_ASSIGN = r"[ \t]*(?:[-+*/%|&]|\*\*|//|:)?=[ \t]*"
_END = r"[ \t]*[;,]?[ \t]*(?:(?:#|//).*)?"
_TYPE = "public|private|protected|static|final|abstract|const|let|var|int|float|double|char|void|bool|boolean"
# of one whole line each; prose that looks like this is rare
_KINDS = (
    r"[ \t]*(?:async\s+)?(?:def|class|function|func|fn)\s+\w+\s*[(:{<].*",
    rf"[ \t]*(?:{_TYPE})\s+[\w<>\[\]*]+(?:\s+\w+)*\s*[=(;{{].*",
    r"[ \t]*(?:import\s+[\w.*]+(?:\s+as\s+\w+)?;?|from\s+[\w.]+\s+import\s.+)[ \t]*",
    r"[ \t]*(?:#include\s*[<\"].*|using\s+[\w.\s]+;|package\s+[\w.]+;)[ \t]*",
    r"[ \t]*(?:if|elif|for|while|with|switch|catch|except|else if)\b.*[\w)\]\"'][ \t]*[=<>!]=?[ \t]*[\w(\[\"'-].*[:{][ \t]*",
    r"[ \t]*(?:\}\s*)?(?:else|try|finally|except|do)[ \t]*[:{][ \t]*",
    r"[ \t]*(?:for|while|if|elif|switch|catch)[ \t]*\(.*\)[ \t]*[{:]?[ \t]*",
    r"[ \t]*(?:for\s+\w+(?:\s*,\s*\w+)*\s+in\s+(?:\w+|[\w.]+[(\[].*)|while\s+(?:True|true|not\s+\w+)|elif\s.+):[ \t]*",
    rf"[ \t]*(?:[a-z_$]\w*|[A-Z])(?:\[[^\]]*\])*{_ASSIGN}{_VALUE}{_END}",
    rf"[ \t]*[A-Z]\w+{_ASSIGN}{_CALL}\){_END}",
    rf"[ \t]*[A-Za-z_$]\w*(?:\.\w+)+(?:\[[^\]]*\])*{_ASSIGN}\S.*",
    r"[ \t]*(?:await\s+|new\s+|return\s+|throw\s+|raise\s+)?(?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*\((?!(?:s|es|n|e|er)\)).*\)"
    rf"(?:\.\w+\(.*\))*[:{{]?{_END}",
    r"[ \t]+return\b.*|return\b.*;[ \t]*|[ \t]*(?:return|break|continue|pass)[ \t]*;?[ \t]*",
    r".*(?:\w\(.*\)|[\w\])]\s*[-+*/]?=\s*\S.*|\+\+|--)[ \t]*;[ \t]*",
    r"(?![ \t]*\").*\w.*\{[ \t]*|[ \t]*\}[^A-Za-z\n]*[A-Za-z]\w*[ \t]*[;,{(]?[ \t]*",
    r"[ \t]*(?:SELECT\s.+|INSERT\s+INTO\s.+|DELETE\s+FROM\s.+|(?:CREATE|ALTER|DROP)\s+(?:TABLE|VIEW|INDEX|DATABASE)\s.+)",
    r"[ \t]*(?:UPDATE\s+\w+\s+SET\b.+|(?:FROM|WHERE|HAVING)\s+\w+.*|(?:LEFT|RIGHT|INNER|FULL)?[ \t]*JOIN\s.+|(?:GROUP|ORDER)\s+BY\s.+)",
)
_LINE = re.compile("|".join(f"(?:{kind})" for kind in _KINDS))
_COMMENT = re.compile(r"(?:#(?!#)|//|/\*|\*/|--[ \t]|<!--|\"\"\").*")
# indented, but no item of a list; or brackets alone
_FURTHER = re.compile(r"[ \t]+(?!(?:[-*+•]|\d{1,3}[.)])\s)\S.*|[{}\[\])]+[ \t]*[;,)]*[ \t]*")
GAP = 3  # blank lines and comments in a row that may stand between two lines of code


def code_spans(text: str) -> Iterator[tuple[int, int]]:
    """``(begin, end)`` of stretches of whole lines that are program code, without the last line's end.

    What is indented below a line of code belongs to it, and so do blank lines and comments between two lines of code.
    """
    begin: int | None = None
    at = end = gap = 0
    for line in text.replace("\u00a0", " ").split("\n"):  # Alpaca indents some code with no-break spaces
        if begin is None:
            if _LINE.fullmatch(line):
                begin, end, gap = at, at + len(line), 0
        elif _LINE.fullmatch(line) or _FURTHER.fullmatch(line):
            end, gap = at + len(line), 0
        elif gap < GAP and (not line.strip() or _COMMENT.fullmatch(line)):
            gap += 1
        else:
            yield begin, end
            begin = None
        at += len(line) + 1
    if begin is not None:
        yield begin, end
