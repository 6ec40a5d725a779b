"""The data card of files, without a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from addlang.data.card import source_card
from addlang.data.contamination import ItemIndex
from addlang.data.holdout import split_holdout
from addlang.data.inspect import Deduplicate, inspect
from addlang.data.prepare import cache_root, pack_rows
from addlang.data.sources import read_rows
from addlang.recipe import DatasetSpec


def describe(
    specs: Sequence[DatasetSpec],
    tokenizer: Any,
    *,
    sequence_length: int,
    tasks: Sequence[str] = (),
    deduplicate: Deduplicate = "exact",
    near: float = 0.8,
    base_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What a phase on these data sets would write as its card, but for what the phase itself decides.

    Args:
        specs: data sets; each with its language.
        sequence_length: conversations longer than this many tokens are counted as dropped.
        tasks: evaluation items to search for; see :func:`addlang.evaluate.items.task_texts`.

    Raises:
        AddlangError: see :mod:`addlang.data.sources`; an unknown task.
    """
    from addlang.evaluate.items import task_texts

    languages = [spec.language or "und" for spec in specs]
    items = ItemIndex(
        text for code in sorted(set(languages)) for text in task_texts(tasks, target_language=code, base_dir=base_dir)
    )
    reads = [read_rows(spec, base_dir=base_dir) for spec in specs]
    splits = [split_holdout(rows, share=0, maximum=1, seed=0, keep_copies=deduplicate == "none") for rows in reads]
    identities = [[rows.identity(), split.fingerprint] for rows, split in zip(reads, splits, strict=True)]
    found = inspect(
        [split.train for split in splits],
        identities,
        deduplicate=deduplicate,
        near=near,
        items=items,
        on_items="allow",
        cache_dir=cache_root() / "inspected",
        progress=progress,
    )
    sources = []
    for spec, language, rows, left_out, read, identity in zip(
        specs, languages, found.rows, found.fingerprints, reads, identities, strict=True
    ):
        pack = pack_rows(
            rows,
            tokenizer,
            {"identity": identity, "left_out": left_out},
            chat=next(iter(read)).messages is not None,
            sequence_length=sequence_length,
            progress=progress,
        )
        sources.append(source_card(spec, pack, tokenizer, language=language))
    total = sum(source["tokens"] for source in sources)
    for source in sources:
        source["share"] = source["tokens"] / total
    return {"sources": sources, "overlap": found.overlap, "tokens": total}
