"""Selective translation of training data, as for mOpenOrca (two-phase paper, appendix A.2): prose is translated, the rest kept.

Every text of a row is protected (:mod:`addlang.builders.protect`), translated by a back-end, and checked: every mark once,
not empty or cut, in the target language. What is refused is asked for again, and after ``attempts`` the row goes into the
file of rejects with the reason.

Every reply is appended to a journal as soon as it comes, and judged only when it is read, so a job that is killed goes on
where it stopped, nothing is paid for twice, and another check costs nothing. Rows come out in the order of the input,
however the replies came in.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.builders.backend import Backend, OutOfBudgetError, Reply, Request
from addlang.builders.budget import Budget
from addlang.builders.checks import language_problem, length_problem
from addlang.builders.protect import Protected, Protector, has_prose
from addlang.builders.rows import Parts, Place, located, places, read_file, text_at, with_texts, write_rows
from addlang.builders.segments import Unit, join, split
from addlang.data.cache import fingerprint
from addlang.data.journal import Journal, locked
from addlang.errors import AddlangError
from addlang.export import write_json

VERSION = 1


@dataclass(frozen=True)
class Translation:
    """What is translated and how it is checked.

    Attributes:
        files: local files of rows.
        output: where the translated rows go; ``<output>.rejects.jsonl``, ``<output>.about.json`` and, while it is made and
            for later, ``<output>.journal.jsonl`` stand beside it.
        source, target: ISO 639 codes.
        parts: which texts of a conversation.
        columns: translate just these columns, whatever the format.
        unit: what is one request.
        attempts: how often a text is asked for.
        limit: first rows of all files together.
    """

    files: tuple[str, ...]
    output: Path
    source: str
    target: str
    protector: Protector
    parts: Parts = "all"
    columns: tuple[str, ...] = ()
    format: str = "auto"
    text_column: str = "text"
    unit: Unit = "text"
    attempts: int = 3
    check_language: bool = True
    limit: int | None = None

    def beside(self, suffix: str) -> Path:
        """A file next to the output."""
        return self.output.with_name(self.output.name + suffix)


@dataclass(frozen=True)
class _Piece:
    """A piece of a text, ready to be asked for: without ``key`` it is kept as it is."""

    protected: Protected
    behind: str
    key: str | None


def translate(
    job: Translation, backend: Backend, budget: Budget, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Carry out a job, or go on with it; returns what is also written to ``<output>.about.json``.

    Args:
        budget: that of the back-end; every reply is counted, those of earlier sittings first.
        progress: called with the number of texts done and an estimate of all.

    Raises:
        AddlangError: bad rows (with file and row), or a back-end that does not answer; what came before is kept.
    """
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with locked(job.output.with_name(f".{job.output.name}.lock")):
        work = _Work(job, backend, budget)
        complete = work.carry_out(progress)
        return work.write(complete)


class _Work:
    def __init__(self, job: Translation, backend: Backend, budget: Budget) -> None:
        self.job, self.backend, self.budget = job, backend, budget
        self.identity = ["translate", VERSION, backend.identity, job.source, job.target]
        self.journal = Journal(job.beside(".journal.jsonl"))
        self.replies: dict[str, list[Reply]] = {}
        self.verdicts: dict[str, tuple[int, Reply | None, str | None]] = {}
        for row in self.journal.rows:
            self._remember(Reply(**row))
        self._appending = threading.Lock()

    def _remember(self, reply: Reply) -> None:
        self.replies.setdefault(reply.key, []).append(reply)
        self.budget.spend(reply.tokens_in, reply.tokens_out)

    def _keep(self, reply: Reply) -> None:
        with self._appending:
            self.journal.append([reply.plain()])
            self._remember(reply)

    # ---- what is asked

    def rows(self) -> Iterator[tuple[str, int, dict[str, Any], str, list[Place]]]:
        """``(file, row, columns, format, places)`` of the rows to be translated."""
        job, number = self.job, 0
        for file in job.files:
            for row, record, format in read_file(file, "columns" if job.columns else job.format, job.text_column):
                if number == job.limit:
                    return
                try:
                    found = places(record, format, job.parts, job.columns or (job.text_column,))
                except AddlangError as error:
                    raise located(error, file, row) from None
                number += 1
                yield file, row, record, format, found

    def pieces(self, text: str) -> list[_Piece]:
        """A text protected, cut and named: in this order, since what is protected may have several lines."""
        found = []
        protector = self.job.protector
        whole = protector.protect(text, across_lines=self.job.unit == "text")
        for piece, behind in split(whole.text, self.job.unit):
            protected = protector.part(piece, whole)
            prose = has_prose(protector.prose(protected.text))
            key = fingerprint(*self.identity, protected.text) if prose else None
            found.append(_Piece(protected, behind, key))
        return found

    def judged(self, piece: _Piece) -> tuple[str | None, str | None, bool]:
        """``(translation, problem, settled)``: of the first reply that can be kept, or what is wrong with the last.

        Pieces of one key differ only in what is protected, so replies are judged once per key.
        """
        assert piece.key is not None
        replies = self.replies.get(piece.key, [])
        number, good, problem = self.verdicts.get(piece.key, (0, None, None))
        for reply in replies[number:] if good is None else ():
            problem = self._problem(piece, reply)
            if problem is None:
                good = reply
                break
        self.verdicts[piece.key] = (len(replies), good, problem)
        if good is not None:
            return self.job.protector.restore((good.text or "").strip(), piece.protected)[0], None, True
        return None, problem, len(replies) >= self.job.attempts or any(reply.final for reply in replies)

    def _problem(self, piece: _Piece, reply: Reply) -> str | None:
        said = (reply.text or "").strip()
        problem = reply.problem or self.job.protector.restore(said, piece.protected)[1]
        problem = problem or length_problem(said, piece.protected.text)
        if problem is None and self.job.check_language:
            problem = language_problem(self.job.protector.prose(said), self.job.source, self.job.target)
        return problem

    def carry_out(self, progress: Callable[[int, int], None] | None) -> bool:
        """Ask for everything that is not there yet; False if the cap ended it."""
        known: dict[str, _Piece] = {}
        done = read = 0
        again: deque[Request] = deque()
        number = sum(1 for _ in self.rows())  # bad rows are found before anything is paid for

        def unasked() -> Iterator[Request]:
            nonlocal done, read
            for _, _, record, _, found in self.rows():
                read += 1
                for place in found:
                    for piece in self.pieces(text_at(record, place)):
                        if piece.key is None or piece.key in known:
                            continue
                        known[piece.key] = piece
                        _, problem, settled = self.judged(piece)
                        if settled:
                            done += 1
                        else:
                            yield Request(
                                piece.key, piece.protected.text, len(self.replies.get(piece.key, ())), problem
                            )

        fresh = unasked()
        try:
            for request, _ in self.backend.run(lambda: again.popleft() if again else next(fresh, None), self._keep):
                _, problem, settled = self.judged(known[request.key])
                if settled:
                    done += 1
                else:
                    again.append(Request(request.key, request.text, len(self.replies[request.key]), problem))
                if progress is not None:
                    progress(done, round(len(known) * number / read))
        except OutOfBudgetError:
            return False
        return True

    # ---- what comes out

    def write(self, complete: bool) -> dict[str, Any]:
        """The output, the rejects and what there is to say about them."""
        rejects: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        left = read = 0

        def translated() -> Iterator[dict[str, Any]]:
            nonlocal left, read
            for file, row, record, format, found in self.rows():
                read += 1
                texts, problem, waiting = self._texts(record, found)
                if waiting:
                    left += 1
                elif problem is not None:
                    where, reason, said = problem
                    reasons[_kind(reason)] += 1
                    rejects.append(
                        {
                            "file": file,
                            "row": row,
                            "place": list(where),
                            "reason": reason,
                            "reply": said,
                            "record": record,
                        }
                    )
                else:
                    new = with_texts(record, texts, format)
                    name = row if len(self.job.files) == 1 else f"{Path(file).name}:{row}"
                    yield {"id": name, **new, "language": self.job.target, "translated_from": self.job.source}

        written = write_rows(self.job.output, translated())
        if rejects:
            write_rows(self.job.beside(".rejects.jsonl"), rejects)
        else:
            self.job.beside(".rejects.jsonl").unlink(missing_ok=True)
        kept = [reply for replies in self.replies.values() for reply in replies]
        about = {
            "output": str(self.job.output),
            "files": list(self.job.files),
            "source": self.job.source,
            "target": self.job.target,
            "backend": self.backend.identity,
            "complete": complete and left == 0,
            "rows": read,
            "translated": written,
            "rejected": len(rejects),
            "reasons": dict(reasons.most_common()),
            "left": left,
            "texts": len(self.replies),
            "replies": len(kept),
            "tokens_in": self.budget.tokens_in,
            "tokens_out": self.budget.tokens_out,
            "tokens_estimated": any(reply.estimated for reply in kept),
            "cost": self.budget.cost,
        }
        write_json(self.job.beside(".about.json"), about)
        return about

    def _texts(
        self, record: dict[str, Any], found: Sequence[Place]
    ) -> tuple[dict[Place, str], tuple[Place, str, str | None] | None, bool]:
        """The translated texts of a row; the first problem, if there is one; whether some are still to be asked for."""
        texts: dict[Place, str] = {}
        for place in found:
            parts = []
            for piece in self.pieces(text_at(record, place)):
                if piece.key is None:
                    parts.append((self.job.protector.restore(piece.protected.text, piece.protected)[0], piece.behind))
                    continue
                text, problem, settled = self.judged(piece)
                if not settled:
                    return texts, None, True
                if text is None:
                    return texts, (place, problem or "no reply", self.replies[piece.key][-1].text), False
                parts.append((text, piece.behind))
            texts[place] = join(parts)
        return texts, None, False


def _kind(reason: str) -> str:
    """A reason without its particulars, for counting."""
    signs = (
        "lost", "repeated", "invented", "cut off", "refused by the server", "still in", "withheld", "empty", "too long",
    )  # fmt: skip
    for sign in signs:
        if reason.startswith(sign):
            return sign
    if reason.startswith("in '"):
        return "another language"
    return "formatting" if " of " in reason else "length" if "bytes" in reason else reason


def read_glossary(path: Path) -> dict[str, str]:
    """Names that are kept, one per line; after a tab, what they are always translated to.

    Raises:
        AddlangError: the file cannot be read, or a line has several tabs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AddlangError(f"glossary '{path}' cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, *rest = line.split("\t")
        if len(rest) > 1:
            raise AddlangError(f"{path}, row {number}: more than one tab", "write NAME, or NAME<tab>TRANSLATION")
        if name.strip():
            names[name.strip()] = rest[0].strip() if rest and rest[0].strip() else name.strip()
    return names


def parse_body(text: str | None) -> dict[str, Any]:
    """``--body`` as a JSON object.

    Raises:
        AddlangError: it is none.
    """
    try:
        data = json.loads(text or "{}")
    except ValueError as error:
        raise AddlangError(f"--body is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise AddlangError("--body must be an object", "such as '{\"top_p\": 0.9}'")
    return data
