"""From a phase's data sets to training sequences, held-out text and a data card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from addlang.data.holdout import split_holdout
from addlang.data.mixture import Mixture
from addlang.data.packing import Packed, pack_conversations, pack_texts
from addlang.data.sources import read_rows
from addlang.errors import AddlangError
from addlang.train.schedule import budget, global_batch
from addlang.train.shard import launched

if TYPE_CHECKING:
    from addlang.recipe import DatasetSpec, Phase, Recipe


def cache_root() -> Path:
    """Where packed data and evaluations are kept: ``$ADDLANG_CACHE``, or ``~/.cache/addlang``."""
    return Path(os.environ.get("ADDLANG_CACHE") or Path.home() / ".cache" / "addlang")


@dataclass(frozen=True)
class PhaseData:
    """Training sequences of one phase; see :class:`addlang.train.loop.TrainingData`.

    Attributes:
        heldout: (id, text) of target documents that are not trained on.
        card: plain data for the report: sources with rows, tokens, licences, duplicates; the held-out part.
    """

    mixture: Mixture
    sequence_length: int
    isolate: bool
    batch_size: int
    tokenizer: Any
    paths: tuple[str, ...]
    heldout: tuple[tuple[str, str], ...]
    card: dict[str, Any]

    @property
    def sequences(self) -> int:
        return len(self.mixture)

    def batch(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Arrays [count, L] of the sequences first .. first + count - 1 of the run."""
        return self.mixture.batch(  # type: ignore[return-value]
            first, count, sequence_length=self.sequence_length, pad_id=self.tokenizer.pad_token_id, isolate=self.isolate
        )

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Source, place and text of those sequences."""
        sources, indices, epochs = self.mixture.locate_many(first, count)
        rows = []
        for s, i, e in zip(sources.tolist(), indices.tolist(), epochs.tolist(), strict=True):
            packed = self.mixture.sources[s]
            ids = np.asarray(packed.tokens[packed.sequences[i] : packed.sequences[i + 1]])
            rows.append(
                {"source": self.paths[s], "sequence": i, "epoch": e, "text": self.tokenizer.decode(ids.tolist())}
            )
        return rows


def prepare(
    recipe: Recipe,
    phase: Phase,
    tokenizer: Any,
    *,
    base_dir: Path | None = None,
    progress: Any = None,
    exclude: Sequence[str] = (),
) -> PhaseData:
    """Read, split off, pack and mix a phase's data.

    Target documents are deduplicated and some are held out before anything is packed; replayed source text is
    deduplicated too, and neither may contain a held-out document.

    Args:
        exclude: texts that must not be trained on: what another phase holds out.

    The run is a whole number of optimizer steps: the budget is rounded up, as in the SSU paper (Table 8).

    Raises:
        AddlangError: see :mod:`addlang.data.sources`; or raw text and conversations in one data set.
    """
    packed: list[Packed] = []
    sources: list[dict[str, Any]] = []
    heldout: list[tuple[str, str]] = []
    evaluation = recipe.evaluation
    hold = not evaluation.target_datasets
    outside = [
        text for spec in (*evaluation.target_datasets, *evaluation.source_datasets) for text in _texts(spec, base_dir)
    ]
    outside += exclude
    reads = [read_rows(spec, base_dir=base_dir) for spec in phase.datasets]
    splits = []
    for spec, rows in zip(phase.datasets, reads, strict=True):
        # replay and source data hold nothing out, but are deduplicated and cleaned of evaluation text all the same
        share = evaluation.holdout if hold and spec.role == "target" else 0.0
        splits.append(
            split_holdout(
                rows, share=share, maximum=evaluation.holdout_max, seed=evaluation.holdout_seed, exclude=outside
            )
        )
    for number, split in enumerate(splits):
        heldout += [(f"{number}:{i}:{row.line}", row.content) for i, row in enumerate(split.heldout)]
    for number, (spec, rows) in enumerate(zip(phase.datasets, reads, strict=True)):
        elsewhere = [row.content for other, s in enumerate(splits) if other != number for row in s.heldout]
        split = splits[number].excluding(elsewhere) if elsewhere else splits[number]
        train = split.train
        settings = {"identity": rows.identity(), "split": split.fingerprint}
        chat = next(iter(rows)).messages is not None
        if chat:
            pack = pack_conversations(
                train,
                tokenizer,
                sequence_length=phase.sequence_length,
                loss_on=phase.loss_on,
                cache_dir=cache_root() / "packed",
                fingerprint_parts=[settings],
                progress=progress,
            )
        else:
            pack = pack_texts(
                train,
                tokenizer,
                sequence_length=phase.sequence_length,
                cache_dir=cache_root() / "packed",
                fingerprint_parts=[settings],
                progress=progress,
            )
        packed.append(pack)
        licences = dict(pack.meta.get("licences", {}))
        if spec.license:
            licences = {spec.license: pack.meta["documents"]}
        sources.append(
            {
                "path": spec.path,
                "role": spec.role,
                "language": spec.language or (recipe.language if spec.role == "target" else recipe.source_language),
                "kind": "conversations" if chat else "text",
                "rows": pack.meta["rows"],
                "documents": pack.meta["documents"],
                "tokens": pack.meta["tokens"],
                "bytes": pack.meta["bytes"],
                "licenses": licences,
                **split.stats,
            }
        )
    if hold and not heldout:
        raise AddlangError(
            "no target text could be held out for evaluation", "give evaluation.target_datasets, or more text"
        )
    target = sum(p.tokens_total for p, spec in zip(packed, phase.datasets, strict=True) if spec.role == "target")
    tokens = budget(phase, target or sum(p.tokens_total for p in packed))
    # what guards read counts: arms of one budget then cost the same
    tokens = round(tokens * (1 - sum(guard.token_share for guard in phase.all_guards)))
    batch, scaled = global_batch(phase, tokens, launched()[1])
    mixture = Mixture(
        packed, [spec.weight for spec in phase.datasets], seed=recipe.seed, tokens=tokens, multiple_of=batch
    )
    for row, drawn in zip(sources, mixture.summary(), strict=True):
        row.update(share=drawn["share"], trained_tokens=drawn["tokens"], epochs=drawn["epochs"])
    card = {
        "sources": sources,
        "heldout": {"documents": len(heldout), "bytes": sum(len(t.encode()) for _, t in heldout)},
        "sequences": len(mixture),
        "tokens": mixture.tokens_total,
        "batch_size": batch,
        "notes": [scaled] if scaled else [],
    }
    return PhaseData(
        mixture,
        phase.sequence_length,
        phase.isolate_documents,
        batch,
        tokenizer,
        tuple(s.path for s in phase.datasets),
        tuple(heldout),
        card,
    )


def _texts(spec: DatasetSpec, base_dir: Path | None) -> list[str]:
    return [row.content for row in read_rows(spec, base_dir=base_dir)]


def labelled_texts(specs: tuple[DatasetSpec, ...], base_dir: Path | None = None) -> list[tuple[str, str]]:
    """(id, text) of evaluation text."""
    return [
        (f"{n}:{row.line}", row.content) for n, spec in enumerate(specs) for row in read_rows(spec, base_dir=base_dir)
    ]
