"""Replay: source-language conversations that a phase trains on beside its own data (two-phase paper, section 5.1).

English replay (ER) takes a sample of conversations with their own responses. Generative replay (GR) takes their prompts and
lets the model that the phase starts from answer them, so that the phase sees what the model already does.

The buffer has ``share`` of the tokens that one pass over the phase's data has, and is passed over as often as they are.
Rows are taken in the order of a hash of their content and the seed, so a smaller share is the beginning of a larger one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.data.cache import fingerprint, tokenizer_fingerprint
from addlang.data.chat import encode_conversation, render, require_chat_template
from addlang.data.holdout import split_holdout
from addlang.data.inspect import Screen
from addlang.data.journal import Journal, locked
from addlang.data.packing import Packed, pack_conversations, pack_texts
from addlang.data.similar import content_hash, normalise
from addlang.data.sources import Row, read_rows
from addlang.data.tokens import document_frame
from addlang.errors import AddlangError, AddlangWarning

if TYPE_CHECKING:
    from addlang.schema import Phase, Replay

VERSION = 1
FIRST = 256  # rows that are fetched at first, and then four times as many each time
CERTAIN = 0.4  # probability of py3langid, over 140 languages
ENOUGH = 0.9  # of the buffer; with less there is a warning


class Pool:
    """The rows that replay is drawn from, without copies and without evaluation text.

    Args:
        exclude: texts that must not be trained on.
        screen: finds the rows that contain evaluation items.
    """

    def __init__(self, replay: Replay, exclude: Sequence[str], base_dir: Path | None, screen: Screen) -> None:
        self.replay = replay
        self.name = ", ".join(spec.path for spec in replay.datasets)
        reads = [read_rows(spec, base_dir=base_dir) for spec in replay.datasets]
        splits = [split_holdout(rows, share=0.0, maximum=1, seed=replay.seed, exclude=exclude) for rows in reads]
        identities = [[r.identity(), s.fingerprint] for r, s in zip(reads, splits, strict=True)]
        inspected = screen([s.train for s in splits], identities)
        self.identity = [[*i, left_out] for i, left_out in zip(identities, inspected.fingerprints, strict=True)]
        self.overlap = inspected.overlap
        self.chat = next(iter(reads[0])).messages is not None
        self._rows = inspected.rows
        self._order: list[tuple[int, int, int]] | None = None

    def ordered(self) -> Iterator[Row]:
        """Every row once, in the order of the hashes; the sources are read again whenever more are wanted."""
        if self._order is None:
            self._order = sorted(
                (content_hash(normalise(row.content), self.replay.seed), source, number)
                for source, rows in enumerate(self._rows)
                for number, row in enumerate(rows)
            )
        seen: set[int] = set()
        done, number = 0, FIRST
        while done < len(self._order):
            block = self._order[done : done + number]
            wanted = {(source, number) for _, source, number in block}
            found = {
                (source, number): row
                for source, rows in enumerate(self._rows)
                for number, row in enumerate(rows)
                if (source, number) in wanted
            }
            for identity, source, place in block:
                if identity not in seen:  # a row of another data set
                    seen.add(identity)
                    yield found[source, place]
            done += len(block)
            number *= 4


class Buffer:
    """The first rows of an order whose tokens reach ``wanted``; can be iterated more than once."""

    def __init__(self, rows: Callable[[], Iterable[Row]], wanted: int, size: Callable[[Row], int]) -> None:
        self._rows, self.wanted, self._size = rows, wanted, size

    def __iter__(self) -> Iterator[Row]:
        tokens = 0
        for row in self._rows():
            size = self._size(row)
            if not size:
                continue
            yield row
            tokens += size
            if tokens >= self.wanted:
                return


def english_replay(pool: Pool, wanted: int, tokenizer: Any, *, phase: Phase, cache_dir: Path) -> Packed:
    """A packed sample of about ``wanted`` tokens with its own responses.

    Raises:
        AddlangError: see :mod:`addlang.data.sources`; no row fits.
    """
    parts = ["english", pool.identity, pool.replay.seed]
    return _packed(pool.ordered, wanted, tokenizer, phase, parts, cache_dir, chat=pool.chat)


def generative_replay(
    pool: Pool,
    wanted: int,
    tokenizer: Any,
    *,
    phase: Phase,
    language: str,
    model_hash: str,
    behaviour: str,
    load: Callable[[], Any],
    cache_dir: Path,
    progress: Callable[[int, int], None],
) -> tuple[Packed, dict[str, Any], list[Row]]:
    """The model's answers to the pool's prompts, packed: about ``wanted`` tokens; what to tell about them; the rows.

    Answers are appended to a journal block by block, so that a process that is killed goes on where it stopped, and a
    larger share goes on where a smaller one ended. What they depend on names the journal: the model's weights and
    configuration, prompts, tokenizer and decoding.

    Args:
        behaviour: see :func:`addlang.models.behaviour`.
        load: loads the model; not called if all answers are there.

    Raises:
        AddlangError: no usable answer.
    """
    replay = pool.replay
    require_chat_template(tokenizer)
    decoding = decoding_of(replay)
    key = fingerprint(
        "replay", VERSION, model_hash, behaviour, tokenizer_fingerprint(tokenizer, chat=True), pool.identity, replay.seed, decoding,
        phase.sequence_length, language if replay.language_filter else None,
    )  # fmt: skip
    file = cache_dir / "replay" / f"{key}.jsonl"
    with locked(file.with_suffix(".lock")):
        journal = Journal(file)
        answer_prompts(journal, pool, wanted, tokenizer, phase, language, load, progress)
    rows, used = kept_rows(journal, wanted)
    dropped = Counter(r["dropped"] for r in used if r["dropped"])
    if not rows:
        raise AddlangError(
            f"generative replay of phase '{phase.name}': none of {len(used)} answers can be used (dropped: {dict(dropped)})",
            "raise replay.max_new_tokens, give other prompts, or use kind: english",
        )
    about = {
        "prompts": len(used), "kept": len(rows), "dropped": dict(sorted(dropped.items())), "decoding": decoding,
        "answered_by": model_hash,
    }  # fmt: skip
    parts = ["generated", key, wanted]
    return _packed(lambda: rows, wanted, tokenizer, phase, parts, cache_dir, chat=True), about, rows


def wanted_tokens(replay: Replay, trained: int, available: int) -> int:
    """Size of the buffer: the share of one pass over the phase's data, or of the budget where that is less."""
    return max(1, round(replay.share * min(trained, available)))


def decoding_of(replay: Replay) -> dict[str, Any]:
    """How answers are made; greedy decoding has no seed, and no batch it depends on beyond rounding."""
    if replay.temperature == 0:
        return {"decoding": "greedy", "max_new_tokens": replay.max_new_tokens, "batch_size": replay.batch_size}
    return {
        "decoding": "sampling",
        "temperature": replay.temperature,
        "top_p": replay.top_p,
        "max_new_tokens": replay.max_new_tokens,
        "batch_size": replay.batch_size,
    }


def answer_prompts(
    journal: Journal,
    pool: Pool,
    wanted: int,
    tokenizer: Any,
    phase: Phase,
    language: str,
    load: Callable[[], Any],
    progress: Callable[[int, int], None],
) -> None:
    """Append answers, a block of prompts at a time, until those that are kept have ``wanted`` tokens."""
    from addlang.evaluate.generation import greedy, sample, stop_ids

    replay = pool.replay
    tokens = sum(r["tokens"] for r in journal.rows if not r["dropped"])
    if tokens >= wanted:
        return
    model: Any = None
    asked = len(journal.rows)
    for number, block in enumerate(_blocks(pool.ordered(), replay.batch_size)):
        if number * replay.batch_size < asked:
            continue
        if model is None:
            model = load()
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or phase.sequence_length
        prompts = [prompt_of(row) for row in block]
        ids = [_prompt_ids(p, tokenizer) for p in prompts]
        fits = [
            i for i, x in enumerate(ids) if len(x) + replay.max_new_tokens <= limit and len(x) < phase.sequence_length
        ]
        settings: dict[str, Any] = {
            "max_new_tokens": replay.max_new_tokens,
            "batch_size": replay.batch_size,
            "stop_ids": stop_ids(model, tokenizer),
        }
        asking = [ids[i] for i in fits]
        if replay.temperature == 0:
            answers = greedy(model, tokenizer, asking, **settings)
        else:
            answers = sample(
                model, tokenizer, asking, **settings, seed=replay.seed * 1_000_003 + number,
                temperature=replay.temperature, top_p=replay.top_p, top_k=0, repetition_penalty=1.0,
            )  # fmt: skip
        by_prompt = dict(zip(fits, answers, strict=True))
        journal.append(
            [
                judged(row, prompt, by_prompt.get(i), tokenizer, phase, language)
                for i, (row, prompt) in enumerate(zip(block, prompts, strict=True))
            ]
        )
        tokens = sum(r["tokens"] for r in journal.rows if not r["dropped"])
        progress(min(tokens, wanted), wanted)
        if tokens >= wanted:
            return


def judged(
    row: Row, prompt: list[dict[str, str]], ids: list[int] | None, tokenizer: Any, phase: Phase, language: str
) -> dict[str, Any]:
    """One answer as a row of the journal, and why it is dropped, if it is."""
    assert phase.replay is not None
    text = "" if ids is None else tokenizer.decode(ids, skip_special_tokens=False).strip()
    messages = [*prompt, {"role": "assistant", "content": text}]
    reason, tokens = None, 0
    if ids is None:
        reason = "prompt too long"
    elif not text:
        reason = "empty"
    elif len(ids) >= phase.replay.max_new_tokens:
        reason = "truncated"
    elif set(ids) & set(tokenizer.all_special_ids):
        reason = "control token"
    elif phase.replay.language_filter and off_language(text, language):
        reason = "another language"
    else:
        tokens = len(encode_conversation(messages, tokenizer, loss_on="all")[0])
        reason = "too long" if tokens > phase.sequence_length else None
    return {"file": row.file, "line": row.line, "messages": messages, "tokens": tokens, "dropped": reason}


def off_language(text: str, language: str) -> bool:
    """Whether an answer is in another language: at least half of its sentences, and one of them certainly.

    Names and word lists are often taken for a rare language, but never with certainty. Of Alpaca's responses this drops 0 of
    350; of those of MultiAlpaca in Spanish, Portuguese and Japanese and of Alpaca-zh it drops 95 to 97 %.
    """
    from addlang.evaluate.replies import identify, is_judged, known_languages, sentences

    judged = [identify(s) for s in sentences(text) if is_judged(s)]
    other = [p for name, p in judged if name != language]
    return language in known_languages() and 2 * len(other) >= len(judged) and max(other, default=0.0) >= CERTAIN


def kept_rows(journal: Journal, wanted: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Usable rows of ``wanted`` tokens from the beginning, and every row of the journal up to there."""
    rows: list[Row] = []
    tokens = 0
    for number, row in enumerate(journal.rows, 1):
        if not row["dropped"]:
            rows.append(Row(None, row["messages"], row["file"], row["line"]))
            tokens += row["tokens"]
        if tokens >= wanted:
            return rows, journal.rows[:number]
    return rows, journal.rows


def prompt_of(row: Row) -> list[dict[str, str]]:
    """What the model is asked: a conversation up to its first answer, or a raw text as one user turn."""
    if row.messages is None:
        return [{"role": "user", "content": str(row.text).strip()}]
    until = next((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), len(row.messages))
    return list(row.messages[:until])


def _prompt_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(render(messages, tokenizer, prompt=True), add_special_tokens=False)["input_ids"]
    return ids


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _packed(
    rows: Callable[[], Iterable[Row]],
    wanted: int,
    tokenizer: Any,
    phase: Phase,
    parts: Sequence[Any],
    cache_dir: Path,
    *,
    chat: bool,
) -> Packed:
    frame = sum(map(len, document_frame(tokenizer))) if not chat else 0

    def size(row: Row) -> int:
        """Tokens of a row; 0 if packing would drop it."""
        if row.messages is None:
            return len(tokenizer(row.text, add_special_tokens=False)["input_ids"]) + frame
        if any(token in m["content"] for m in row.messages for token in tokenizer.all_special_tokens):
            return 0
        length = len(encode_conversation(row.messages, tokenizer, loss_on=phase.loss_on)[0])
        return length if length <= phase.sequence_length else 0

    buffer = Buffer(rows, wanted, size)
    settings: dict[str, Any] = {
        "sequence_length": phase.sequence_length,
        "cache_dir": cache_dir / "packed",
        "fingerprint_parts": ["replay buffer", VERSION, wanted, *parts],
    }
    if chat:
        pack = pack_conversations(buffer, tokenizer, loss_on=phase.loss_on, **settings)
    else:
        pack = pack_texts(buffer, tokenizer, **settings)
    if pack.tokens_total < ENOUGH * wanted:
        warnings.warn(
            f"replay of phase '{phase.name}' has {pack.tokens_total:,} tokens instead of {wanted:,}: it is passed over "
            "more often than the phase's own data",
            AddlangWarning,
            stacklevel=2,
        )
    return pack
