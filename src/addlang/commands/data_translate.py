"""``addlang data translate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addlang.commands.common import Json, emit, one_of, quiet
from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.builders.backend import Backend
    from addlang.builders.budget import Budget


def translate(
    files: Annotated[list[str], typer.Argument(help="Local files: instructions of any known format, or raw text.")],
    source: Annotated[str, typer.Option(help="Language of the files, ISO 639 code.")],
    target: Annotated[str, typer.Option(help="Language to translate into, ISO 639 code.")],
    output: Annotated[Path, typer.Option(help="File of translated rows (jsonl).")],
    base_url: Annotated[
        str | None,
        typer.Option("--base_url", "--base-url", help="OpenAI-compatible endpoint: http://localhost:8000/v1."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None,
    local: Annotated[
        str | None, typer.Option(help="In place of an endpoint: hub id or directory of a seq2seq or chat model.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api_key_env", "--api-key-env", help="Environment variable that holds the key.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds until an answer must have come.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Further tries of a request that failed on the way.")] = 6,
    attempts: Annotated[int, typer.Option(min=1, help="How often a text is asked for until its row is rejected.")] = 3,
    max_tokens: Annotated[
        str | None, typer.Option("--max_tokens", "--max-tokens", help="Cap on tokens in and out together, such as 5M.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max_cost", "--max-cost", min=0, help="Cap on money, in the prices' currency.")
    ] = None,
    price_in: Annotated[
        float | None, typer.Option("--price_in", "--price-in", min=0, help="Price of a million input tokens.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price_out", "--price-out", min=0, help="Price of a million output tokens.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="Per reply. Default: by length.")
    ] = None,
    body: Annotated[str | None, typer.Option(help="Further fields of the request as JSON; null removes one.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="File with a system prompt of your own: {source}, {target}, {mark}.")
    ] = None,
    glossary: Annotated[
        Path | None, typer.Option(help="Names to keep, one per line; after a tab, their one translation.")
    ] = None,
    parts: Annotated[str, typer.Option(help="all, prompts or responses: which texts of a conversation.")] = "all",
    columns: Annotated[
        str | None, typer.Option(help="Translate these columns (comma-separated) of rows of any other format.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="text or sentence: what is one request. Default: sentence for seq2seq models.")
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the rows, as in a recipe.")] = "auto",
    text_column: Annotated[
        str, typer.Option("--text_column", "--text-column", help="Column that holds raw text.")
    ] = "text",
    source_code: Annotated[
        str | None, typer.Option("--source_code", "--source-code", help="The local model's own code: eng_Latn.")
    ] = None,
    target_code: Annotated[
        str | None, typer.Option("--target_code", "--target-code", help="The local model's own code: hau_Latn.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before every text, such as '<2ha> ' for MADLAD-400.")] = "",
    beams: Annotated[int, typer.Option(min=1, help="Of a local seq2seq model.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch_size", "--batch-size", min=1, help="Texts per batch of a local model.")
    ] = 16,
    language_check: Annotated[
        bool, typer.Option("--language_check/--no-language_check", help="Refuse replies in another language.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="First rows only.")] = None,
    as_json: Json = False,
) -> None:
    """Translate the prose of FILES and keep the rest: code, addresses, numbers with units, placeholders, formatting, names.

    Continues if interrupted; no reply is paid for twice. Rows that stay wrong go to OUTPUT.rejects.jsonl.
    """
    from addlang.builders.prompt import SYSTEM
    from addlang.builders.protect import Protector
    from addlang.builders.translate import Translation, parse_body, read_glossary
    from addlang.builders.translate import translate as carry_out
    from addlang.progress import progress
    from addlang.report.numbers import language_name
    from addlang.schema import parse_list

    quiet(as_json)
    one_of("--parts", parts, ("all", "prompts", "responses"))
    one_of("--unit", unit or "text", ("text", "sentence"))
    if (base_url is None) == (local is None):
        raise AddlangError("nothing to translate with", "give either --base_url (with --model) or --local")
    budget = budget_of(max_tokens, max_cost, price_in, price_out)
    protector = Protector(read_glossary(glossary) if glossary else {}, MARKS["endpoint" if base_url else "local"])
    asked: dict[str, Any] = {
        "prompt": SYSTEM if prompt is None else own_prompt(prompt),
        "source": language_name(source),
        "target": language_name(target),
        "mark": protector.mark.format(1),
        "max_new_tokens": max_new_tokens,
    }
    backend: Backend
    if base_url is not None:
        from addlang.builders.endpoint import Endpoint

        if model is None:
            raise AddlangError("which model of the endpoint?", "give --model NAME, as the server names it")
        backend = Endpoint(
            base_url, model, **asked, api_key=api_key(api_key_env), concurrency=concurrency, timeout=timeout,
            retries=retries, body=parse_body(body), budget=budget,
        )  # fmt: skip
    else:
        from addlang.builders.local import LocalModel
        from addlang.models import resolve

        if max_tokens is not None or max_cost is not None:
            raise AddlangError("a local model costs nothing to ask", "caps are for endpoints; use --limit")
        backend = LocalModel(
            resolve(str(local)), **asked, source_code=source_code, target_code=target_code, prefix=prefix, beams=beams,
            batch_size=batch_size,
        )  # fmt: skip
        unit = unit or ("sentence" if backend.seq2seq else "text")
    job = Translation(
        tuple(files),
        output,
        source,
        target,
        protector,
        parts=parts,  # type: ignore[arg-type]
        columns=tuple(parse_list(columns or "")),
        format=format,
        text_column=text_column,
        unit=unit or "text",  # type: ignore[arg-type]
        attempts=attempts,
        check_language=language_check,
        limit=limit,
    )
    with progress("translating", unit="texts") as bar:

        def advance(done: int, known: int) -> None:
            bar.total = known
            bar.update(done)

        about = carry_out(job, backend, budget, progress=advance)
    if as_json:
        emit(about)
    else:
        show(about, job.beside(".rejects.jsonl"))


MARKS = {"endpoint": "⟦{}⟧", "local": "[{}]"}  # translation models know brackets; rarer signs become unknown tokens


def budget_of(
    max_tokens: str | None, max_cost: float | None, price_in: float | None, price_out: float | None
) -> Budget:
    """The caps, from the command's options."""
    from addlang.builders.budget import Budget, Prices
    from addlang.schema import parse_count

    if (price_in is None) != (price_out is None) or (max_cost is not None and price_in is None):
        raise AddlangError("a cap on money needs both prices", "give --price_in and --price_out, per million tokens")
    prices = Prices(price_in, price_out) if price_in is not None and price_out is not None else None
    try:
        most = None if max_tokens is None else int(parse_count(max_tokens))
    except ValueError as error:
        raise AddlangError(f"--max_tokens: {error}") from None
    return Budget(most, max_cost, prices)


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is named."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise AddlangError(f"the environment variable {variable} is not set", f"export {variable}=...")
    return key


def own_prompt(path: Path) -> str:
    """A system prompt from a file."""
    from addlang.builders.templates import check_fields

    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AddlangError(f"{path} cannot be read: {error}") from error
    check_fields(text, ("source", "target", "mark"), None, str(path))
    return text


def show(about: dict[str, Any], rejects: Path) -> None:
    """What came out, in a few lines."""
    from addlang.progress import note

    print(f"{about['output']}: {about['translated']:,} of {about['rows']:,} rows translated")
    if about["rejected"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in about["reasons"].items())
        print(f"{rejects}: {about['rejected']:,} rows rejected ({reasons})")
    spent = f"{about['tokens_in']:,} tokens in, {about['tokens_out']:,} out"
    spent += " (partly estimated)" if about["tokens_estimated"] else ""
    print(spent + (f", cost {about['cost']:.4f}" if about["cost"] is not None else ""))
    if not about["complete"]:
        note(f"warning: the cap is reached, {about['left']:,} rows are left; run again with a higher one to go on")
