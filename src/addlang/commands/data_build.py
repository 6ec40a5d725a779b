"""``addlang data translation-tasks``, ``translate-then-answer``, ``bilingual-answers`` and ``codeswitch``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addlang.commands.common import Json, emit, one_of, quiet
from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.builders.parallel import Cleaning, Pair

Files = Annotated[
    list[str],
    typer.Argument(help="One file with two columns (jsonl, tsv, csv, parquet), or two text files, line by line."),
]
Source = Annotated[str, typer.Option(help="Language of the source side, ISO 639 code.")]
Target = Annotated[str, typer.Option(help="Language of the target side, ISO 639 code.")]
Output = Annotated[Path, typer.Option(help="File to write (jsonl).")]
Columns = Annotated[
    str, typer.Option(help="Columns of source and target; 'translation.en' is a column within a column.")
]
MaxRatio = Annotated[
    float,
    typer.Option(
        "--max_ratio",
        "--max-ratio",
        min=0,
        help="Leave out pairs whose lengths differ so many times more than usual; 0: none.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Limit = Annotated[int | None, typer.Option(min=1, help="First pairs only.")]
Pivot = Annotated[str, typer.Option(help="Language of the first file, ISO 639 code.")]
Join = Annotated[
    str | None, typer.Option(help="Column that joins the files. Default: id; the row number if neither has it.")
]
Request = Annotated[
    bool, typer.Option("--request/--no-request", help="Say in the prompt in which languages to answer.")
]
Labels = Annotated[bool, typer.Option("--labels/--no-labels", help="Write the language's name before each part.")]


def translation_tasks(
    files: Files,
    source: Source,
    target: Target,
    output: Output,
    columns: Columns = "source,target",
    direction: Annotated[
        str, typer.Option(help="both, forward, backward, or each: every pair in one of the two.")
    ] = "both",
    templates: Annotated[
        Path | None,
        typer.Option(help="Own templates, one per line, with {source}, {target} and {text}; \\n is a line end."),
    ] = None,
    max_ratio: MaxRatio = 4.0,
    limit: Limit = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make translation-following demonstrations (x-LLM, CrossAlpaca) from parallel text, in both directions."""
    from addlang.builders.demonstrations import demonstrations
    from addlang.builders.templates import TRANSLATE, read_templates
    from addlang.report.numbers import language_name

    quiet(as_json)
    one_of("--direction", direction, ("both", "forward", "backward", "each"))
    pairs, cleaning = cleaned(files, columns, max_ratio, limit)
    own = read_templates(templates, ("source", "target", "text"), "text") if templates else TRANSLATE
    rows = demonstrations(
        pairs, languages=(source, target), names=(language_name(source), language_name(target)),
        direction=direction, templates=own, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    directions: Counter[str] = Counter()
    written = write(output, rows, lambda row: directions.update([row["direction"]]))
    done(
        {
            "output": str(output),
            "rows": written,
            "directions": dict(directions),
            "templates": len(own),
            "pairs": cleaning.counts(),
        },
        as_json,
    )


def translate_then_answer(
    first: Annotated[str, typer.Argument(help="Instructions in the pivot language.")],
    second: Annotated[str, typer.Argument(help="The same instructions in the target language.")],
    target: Target,
    output: Output,
    pivot: Pivot = "en",
    join: Join = None,
    request: Request = True,
    labels: Labels = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make demonstrations that translate the request into the pivot, then answer in the target language."""
    parallel_rows(first, second, "then-answer", pivot, target, output, join, "target", request, labels, seed, as_json)


def bilingual_answers(
    first: Annotated[str, typer.Argument(help="Instructions in the pivot language.")],
    second: Annotated[str, typer.Argument(help="The same instructions in the target language.")],
    target: Target,
    output: Output,
    pivot: Pivot = "en",
    join: Join = None,
    turns: Annotated[
        int, typer.Option(min=1, max=2, help="1: both answers in one turn; 2: after a further question.")
    ] = 1,
    ask: Annotated[
        str, typer.Option(help="Language of the request: target, pivot, or each (half and half).")
    ] = "target",
    request: Request = True,
    labels: Labels = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make X-CIT's chat data: the answer in the pivot language first, then in the target language."""
    one_of("--ask", ask, ("target", "pivot", "each"))
    style = "both" if turns == 1 else "two-turns"
    parallel_rows(first, second, style, pivot, target, output, join, ask, request, labels, seed, as_json)


def parallel_rows(
    first: str, second: str, style: str, pivot: str, target: str, output: Path, join: str | None, ask: str, request: bool,
    labels: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Conversations from two files of instructions."""
    from addlang.builders.bilingual import bilingual, read_parallel
    from addlang.report.numbers import language_name

    quiet(as_json)
    counts: Counter[str] = Counter()
    names = (language_name(pivot), language_name(target))
    told = "user" if style == "then-answer" else "assistant"
    rows = bilingual(
        read_parallel(first, second, join, counts, told), style=style, codes=(pivot, target), names=names, ask=ask,  # type: ignore[arg-type]
        request=request, labels=labels, seed=seed,
    )  # fmt: skip
    written = write(output, rows)
    done({"output": str(output), "rows": written, "pairs": dict(counts)}, as_json)


def cleaned(files: list[str], columns: str, max_ratio: float, limit: int | None) -> tuple[list[Pair], Cleaning]:
    """Pairs of parallel text without what cannot be used, and why it is left out."""
    from itertools import islice

    from addlang.builders.parallel import Cleaning, clean_pairs, read_pairs

    names = tuple(name.strip() for name in columns.split(","))
    if len(names) != 2 or not all(names):
        raise AddlangError(f"--columns {columns}: there must be two", "such as --columns source,target")
    cleaning = Cleaning()
    pairs = list(clean_pairs(islice(read_pairs(files, (names[0], names[1])), limit), cleaning, max_ratio))
    return pairs, cleaning


def write(output: Path, rows: Any, look: Any = None) -> int:
    """Write rows atomically; ``look`` sees each of them."""
    from addlang.builders.rows import write_rows

    def seen() -> Any:
        for row in rows:
            if look is not None:
                look(row)
            yield row

    return write_rows(output, seen())


def done(about: dict[str, Any], as_json: bool) -> None:
    """What was written, and what was left out."""
    if as_json:
        emit(about)
        return
    print(f"{about['output']}: {about['rows']:,} rows")
    for key, value in about.items():
        if isinstance(value, dict):
            print(f"{key}: " + ", ".join(f"{name} {n:,}" for name, n in value.items() if n))
        elif key not in ("output", "rows"):
            print(f"{key}: {value}")


def codeswitch(
    files: Files,
    source: Source,
    target: Target,
    output: Output,
    unit: Annotated[str, typer.Option(help="What is replaced at once: word, phrase or clause.")] = "word",
    ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a sentence's words that is replaced, about.")
    ] = 0.3,
    matrix: Annotated[
        str, typer.Option(help="Side whose sentence is kept: source, target, or each (half and half).")
    ] = "source",
    dictionary: Annotated[
        Path | None, typer.Option(help="Align by this word list (tsv: word, translation) in place of learning.")
    ] = None,
    alignments: Annotated[
        Path | None, typer.Option(help="Use these alignments ('0-0 1-2', a line per pair; words between spaces).")
    ] = None,
    columns: Columns = "source,target",
    max_ratio: MaxRatio = 4.0,
    limit: Limit = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make code-switched sentences from parallel text, with a language tag per word; reports how mixed they are (CMI)."""
    from addlang.analyze.code_mixing import summary
    from addlang.builders.aligned import aligned
    from addlang.builders.codeswitch import codeswitch as carry_out
    from addlang.progress import progress

    quiet(as_json)
    one_of("--unit", unit, ("word", "phrase", "clause"))
    one_of("--matrix", matrix, ("source", "target", "each"))
    pairs, cleaning = cleaned(files, columns, max_ratio, limit)
    with progress("aligning words"):
        found = aligned(pairs, unit=unit, dictionary=dictionary, alignments=alignments)  # type: ignore[arg-type]
    rows = list(
        carry_out(found, languages=(source, target), unit=unit, ratio=ratio, matrix=matrix, seed=seed)  # type: ignore[arg-type]
    )
    mixed = [row for row in rows if row is not None]
    if not mixed:
        raise AddlangError("no sentence could be mixed", "raise --ratio, or use --unit word")
    about = summary([row["tags"] for row in mixed])
    written = write(output, mixed)
    done(
        {
            "output": str(output), "rows": written, "unmixed": len(rows) - written, "pairs": cleaning.counts(),
            **{key: round(about[key], 4) for key in ("CMI", "M-index", "I-index") if about[key] is not None},
        },
        as_json,
    )  # fmt: skip
