"""From a phase's data sets to training sequences, held-out text and a data card."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from addlang.data.cache import fingerprint
from addlang.data.card import source_card
from addlang.data.chat import LossOn, Message, has_answer
from addlang.data.contamination import ItemIndex
from addlang.data.holdout import split_holdout
from addlang.data.inspect import OnItems, Screen, inspect
from addlang.data.mixing import Mixed, add_replay, mix
from addlang.data.mixture import Mixture
from addlang.data.packing import Long, Packed, pack_conversations, pack_texts
from addlang.data.replay import Pool, english_replay, wanted_tokens
from addlang.data.shares import phase_weights
from addlang.data.sources import Row, read_rows
from addlang.errors import AddlangError
from addlang.schema import beside
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
        mixed: what is drawn, and the budget that it was drawn for.
        heldout: (id, text) of target documents that are not trained on.
        heldout_chats: (id, messages) of those of them that are conversations with an answer.
        card: plain data for the report: sources with rows, tokens, licences, duplicates; the held-out part. ``identity``
            is a hash of what was known before generative replay.
        pool: prompts of generative replay, to be answered by the model that the phase starts from; None: nothing is
            missing.
    """

    mixed: Mixed
    sequence_length: int
    isolate: bool
    tokenizer: Any
    paths: tuple[str, ...]
    heldout: tuple[tuple[str, str], ...]
    heldout_chats: tuple[tuple[str, list[Message]], ...]
    card: dict[str, Any]
    pool: Pool | None = None

    @property
    def mixture(self) -> Mixture:
        return self.mixed.mixture

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.mixed.batch

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
    chats: list[tuple[str, list[Message]]] = []
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
                rows,
                share=share,
                maximum=evaluation.holdout_max,
                seed=evaluation.holdout_seed,
                exclude=outside,
                keep_copies=phase.deduplicate == "none",
            )
        )
    for number, split in enumerate(splits):
        names = [f"{number}:{i}:{row.line}" for i, row in enumerate(split.heldout)]
        heldout += [(name, row.content) for name, row in zip(names, split.heldout, strict=True)]
        talks = [(name, row.messages or []) for name, row in zip(names, split.heldout, strict=True)]
        chats += [(name, messages) for name, messages in talks if has_answer(messages)]
    for number, split in enumerate(splits):
        elsewhere = [row.content for other, s in enumerate(splits) if other != number for row in s.heldout]
        splits[number] = split.excluding(elsewhere) if elsewhere else split
    screen = screening(recipe, phase, base_dir, progress)
    identities = [[r.identity(), s.fingerprint] for r, s in zip(reads, splits, strict=True)]
    inspected = screen([split.train for split in splits], identities)
    for number, spec in enumerate(phase.datasets):
        chat = next(iter(reads[number])).messages is not None
        left_out = inspected.fingerprints[number]
        settings = {"identity": reads[number].identity(), "split": splits[number].fingerprint, "left_out": left_out}
        pack = pack_rows(
            inspected.rows[number],
            tokenizer,
            settings,
            chat=chat,
            sequence_length=phase.sequence_length,
            loss_on=phase.loss_on,
            long=phase.long_conversations,
            progress=progress,
        )
        packed.append(pack)
        language = spec.language or (recipe.language if spec.role == "target" else recipe.source_language)
        sources.append(source_card(spec, pack, tokenizer, language=language))
    if hold and not heldout and phase is measured_phase(recipe):
        raise AddlangError(
            "no target text could be held out for evaluation", "give evaluation.target_datasets, or more text"
        )
    weights = phase_weights(phase, [p.tokens_total for p in packed], [s["language"] for s in sources])
    mixed = mix(phase, packed, weights, seed=recipe.seed, devices=launched()[1])
    data = PhaseData(
        mixed,
        phase.sequence_length,
        phase.isolate_documents,
        tokenizer,
        tuple(s.path for s in phase.datasets),
        tuple(heldout),
        tuple(chats),
        {
            "sources": sources,
            "heldout": {"documents": len(heldout), "bytes": sum(len(t.encode()) for _, t in heldout)},
            "overlap": inspected.overlap,
        },
    )
    data = completed(data, mixed, sources)
    if phase.replay is not None:
        pool = Pool(phase.replay, [*outside, *(text for _, text in heldout)], base_dir, screen)
        if phase.replay.kind == "generative":
            data = replace(data, pool=pool)
        else:
            wanted = wanted_tokens(phase.replay, mixed.tokens, sum(p.tokens_total for p in packed))
            replayed = english_replay(pool, wanted, tokenizer, phase=phase, cache_dir=cache_root())
            data = with_replay(data, recipe, phase, pool, replayed, {})
    return replace(data, card={**data.card, "identity": fingerprint(data.card)})


def with_replay(
    data: PhaseData, recipe: Recipe, phase: Phase, pool: Pool, replayed: Packed, about: dict[str, Any]
) -> PhaseData:
    """The data with what is replayed mixed in."""
    replay = pool.replay
    mixed = add_replay(data.mixed, replayed, share=replay.share, append=replay.mode == "append", name=pool.name)
    licences = {spec.license for spec in replay.datasets}
    licence = licences.pop() if len(licences) == 1 else None
    spec = replay.datasets[0].model_copy(update={"path": pool.name, "role": "replay", "license": licence})
    row = {
        **source_card(spec, replayed, data.tokenizer, language=recipe.source_language),
        "replay": {"kind": replay.kind, "share": replay.share, "mode": replay.mode, "seed": replay.seed, **about},
    }
    return replace(completed(data, mixed, [*data.card["sources"], row]), pool=None)


def completed(data: PhaseData, mixed: Mixed, sources: Sequence[dict[str, Any]]) -> PhaseData:
    """The same data with this mixture, and a card that says what is drawn from each source."""
    rows = [
        {**row, "share": drawn["share"], "trained_tokens": drawn["tokens"], "epochs": drawn["epochs"]}
        for row, drawn in zip(sources, mixed.mixture.summary(), strict=True)
    ]
    card = {
        **data.card,
        "sources": rows,
        "sequences": len(mixed.mixture),
        "tokens": mixed.mixture.tokens_total,
        "batch_size": mixed.batch,
        "notes": list(mixed.notes),
    }
    return replace(data, mixed=mixed, paths=tuple(row["path"] for row in rows), card=card)


def measured_phase(recipe: Recipe) -> Phase:
    """The phase whose held-out text is measured: the last one with target data."""
    with_target = [p for p in recipe.phases if any(spec.role == "target" for spec in p.datasets)]
    return (with_target or list(recipe.phases))[-1]


def screening(recipe: Recipe, phase: Phase, base_dir: Path | None, progress: Any) -> Screen:
    """The search for copies and for evaluation items in a phase's rows; see :func:`addlang.data.inspect.inspect`."""
    on_items: OnItems = "allow" if recipe.allow_contamination else "drop" if recipe.drop_contaminated else "error"
    files = [beside(task, base_dir) for task in recipe.evaluation.tasks]
    stamps = tuple(file.stat().st_mtime_ns for file in files if file.is_file())
    items = item_index(recipe.evaluation.model_dump_json(), recipe.language, base_dir, stamps)
    return functools.partial(
        inspect,
        deduplicate=phase.deduplicate,
        near=phase.near_duplicate_threshold,
        items=items,
        on_items=on_items,
        cache_dir=cache_root() / "inspected",
        progress=progress,
    )


@functools.lru_cache(maxsize=2)
def item_index(evaluation: str, target_language: str, base_dir: Path | None, stamps: tuple[int, ...]) -> ItemIndex:
    """The texts that an evaluation (as JSON) asks for; all phases of a run search for the same ones.

    Args:
        stamps: when the task files were written, so that a changed one is read again.
    """
    from addlang.evaluate.items import evaluation_texts
    from addlang.recipe import Evaluation

    parsed = Evaluation.model_validate_json(evaluation)
    return ItemIndex(evaluation_texts(parsed, target_language=target_language, base_dir=base_dir))


def pack_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    settings: dict[str, Any],
    *,
    chat: bool,
    sequence_length: int,
    loss_on: LossOn = "responses",
    long: Long = "drop",
    progress: Any = None,
) -> Packed:
    """Pack the rows of one source, raw text or conversations; ``settings`` say what the rows are."""
    common: dict[str, Any] = {
        "sequence_length": sequence_length,
        "cache_dir": cache_root() / "packed",
        "fingerprint_parts": [settings],
        "progress": progress,
    }
    if chat:
        return pack_conversations(rows, tokenizer, loss_on=loss_on, long=long, **common)
    return pack_texts(rows, tokenizer, **common)


def _texts(spec: DatasetSpec, base_dir: Path | None) -> list[str]:
    return [row.content for row in read_rows(spec, base_dir=base_dir)]


def labelled_texts(specs: tuple[DatasetSpec, ...], base_dir: Path | None = None) -> list[tuple[str, str]]:
    """(id, text) of evaluation text."""
    return [(name, row.content) for n, spec in enumerate(specs) for name, row in labelled_rows(str(n), spec, base_dir)]


def labelled_chats(specs: Sequence[DatasetSpec], base_dir: Path | None = None) -> list[tuple[str, list[Message]]]:
    """(id, messages) of evaluation data that are conversations with an answer."""
    return [
        (name, row.messages)
        for n, spec in enumerate(specs)
        for name, row in labelled_rows(str(n), spec, base_dir)
        if row.messages is not None and has_answer(row.messages)
    ]


def labelled_rows(name: str, spec: DatasetSpec, base_dir: Path | None = None) -> Iterator[tuple[str, Row]]:
    """(id, row) of evaluation data: ``name:line``, and in a directory of several files ``name:file:line``."""
    rows = read_rows(spec, base_dir=base_dir)
    several = rows.files is not None and len(rows.files) > 1
    root = os.path.commonpath(rows.files) if rows.files else ""
    for row in rows:
        file = Path(os.path.relpath(row.file, root)).as_posix() + ":" if several else ""
        yield f"{name}:{file}{row.line}", row
