"""Conversations that a chat model writes by itself: data about what it can do, without any data.

Given nothing but the start of a user turn, an instruct model samples an instruction and then its answer (as Magpie does to
make training data, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from addlang.data.chat import encode_conversation, render
from addlang.errors import AddlangError
from addlang.guards.base import GuardContext

if TYPE_CHECKING:
    from addlang.data.journal import Journal

VERSION = 2
EXAMPLES = 3  # conversations that are shown in the report
_MARK = "\u2983user\u2984"


class Sampling(BaseModel):
    """How conversations are sampled and which are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    conversations: int = Field(2000, gt=0, description="conversations to keep after filtering")
    sampling_temperature: float = Field(1.0, gt=0, description="of instructions and answers")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    max_instruction_tokens: int = Field(128, gt=0)
    max_answer_tokens: int = Field(256, gt=0)
    sampling_seed: int = Field(
        0, ge=0, description="of the conversations; not the run's seed, so that seeds share them"
    )
    attempts: float = Field(4.0, ge=1, description="give up after this many samples per conversation wanted")
    language_filter: bool = Field(
        False, description="drop conversations that py3langid does not call the source language"
    )
    skip: tuple[str, ...] = Field(
        (),
        description="regular expressions: an instruction in which one is found is left out (to test abilities uncovered)",
    )
    sampling_batch_size: int = Field(
        128,
        gt=0,
        description="conversations sampled at a time; lower it where memory runs out, which changes what is drawn",
    )
    max_per_opening: int | None = Field(
        None, gt=0, description="keep at most this many conversations that open with the same three words; None: any"
    )

    @field_validator("skip")
    @classmethod
    def _expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        return value


def stored_conversations(sampling: Sampling, context: GuardContext) -> tuple[list[list[int]], dict[str, Any]]:
    """Conversations as token ids, and what to tell about them: from the cache or sampled now.

    Turns are kept as they are drawn, so that a run that is killed goes on with the next ones; a run beside it waits.

    Raises:
        AddlangError: the model does not write usable conversations.
    """
    from addlang.data.journal import Journal, locked
    from addlang.export import write_json

    path = context.cache_dir / "conversations" / f"{sampled_by(sampling, context)}.json"
    with locked(path.with_suffix(".lock")):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["ids"], found["about"]
        journal = Journal(path.with_suffix(".jsonl"))
        ids, about = sample_conversations(sampling, context, journal)
        write_json(path, {"ids": ids, "about": about})
        journal.path.unlink(missing_ok=True)
        return ids, about


def sampled_by(sampling: Sampling, context: GuardContext) -> str:
    """Fingerprint of everything that determines the sampled conversations."""
    from addlang.data.cache import fingerprint, tokenizer_fingerprint

    options = {name: getattr(sampling, name) for name in Sampling.model_fields}
    return fingerprint(
        "conversations", VERSION, context.model_hash, context.behaviour, tokenizer_fingerprint(context.tokenizer, chat=True),
        options, context.sequence_length, context.language,
    )  # fmt: skip


def sample_conversations(
    guard: Sampling, context: GuardContext, journal: Journal
) -> tuple[list[list[int]], dict[str, Any]]:
    """Conversations as token ids, and counts of what was sampled and why some of it was dropped.

    Args:
        journal: turns that were drawn before, in order; new ones are added.

    Raises:
        AddlangError: the model does not write usable conversations.
    """
    from addlang.evaluate.generation import sample
    from addlang.evaluate.generation import stop_ids as model_stops
    from addlang.evaluate.replies import identify, is_degenerate

    tokenizer = context.tokenizer
    frame = turn_frame(tokenizer)
    stops = {*frame.stop_ids, *model_stops(context.model, tokenizer)}
    prefix = tokenizer(frame.prompt, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    kept: list[list[int]] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    openings: Counter[str] = Counter()
    opened: list[str] = []
    skipped = Counter(dict.fromkeys(guard.skip, 0))
    examples: list[dict[str, str]] = []
    drawn, block, known = 0, 0, iter([row["turns"] for row in journal.rows])

    def turns(prompts: list[list[int]], limit: int, seed: int, stop_text: str | None = None) -> list[list[int]]:
        new: list[list[int]] | None = next(known, None)
        if new is None:
            new = sample(
                context.model, tokenizer, prompts, max_new_tokens=limit, batch_size=size, stop_ids=stops, seed=seed,
                stop_text=stop_text, temperature=guard.sampling_temperature, top_p=guard.top_p, top_k=0,
                repetition_penalty=1.0,
            )  # fmt: skip
            journal.append([{"turns": new}])
        return new

    while len(kept) < guard.conversations:
        if drawn >= guard.attempts * guard.conversations:
            raise AddlangError(
                f"self_anchor: only {len(kept)} of {guard.conversations} conversations after {drawn} samples (dropped: {dict(dropped)})",
                "the model does not write usable conversations of its own: lower conversations, raise attempts or "
                "max_answer_tokens, or give replay data instead",
            )
        size = min(guard.sampling_batch_size, guard.conversations)
        seed = guard.sampling_seed * 1_000_003 + block
        block += 1
        drawn += size
        instructions = []
        for ids in turns([prefix] * size, guard.max_instruction_tokens, 2 * seed, frame.stop_text):
            text, whole = frame.words(tokenizer.decode(ids, skip_special_tokens=False))
            reason = _unusable(ids, text, guard.max_instruction_tokens, special, frame, whole)
            if reason is None and text in seen:
                reason = "repeated instruction"
            if reason is None and (found := [pattern for pattern in guard.skip if re.search(pattern, text)]):
                reason = "skipped"
                skipped.update(found)
            if reason is None and openings[opening(text)] >= (guard.max_per_opening or guard.conversations):
                reason = "opening that others have"
            if reason is not None:
                dropped[reason] += 1
                continue
            seen.add(text)
            instructions.append(text)
        if not instructions:
            continue
        asked = [render([{"role": "user", "content": t}], tokenizer, prompt=True) for t in instructions]
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
        answers = turns(prompts, guard.max_answer_tokens, 2 * seed + 1)
        for text, ids in zip(instructions, answers, strict=True):
            answer = tokenizer.decode(ids, skip_special_tokens=False).strip()
            reason = _unusable(ids, answer, guard.max_answer_tokens, special, frame)
            if reason is None and is_degenerate(answer):
                reason = "degenerate answer"
            if reason is None and guard.language_filter and identify(f"{text}\n{answer}")[0] != context.language:
                reason = "another language"
            if reason is not None:
                dropped[reason] += 1
                continue
            conversation, _ = encode_conversation(
                [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], tokenizer, loss_on="all"
            )
            if len(conversation) > context.sequence_length:
                dropped["longer than sequence_length"] += 1
                continue
            if openings[opening(text)] >= (guard.max_per_opening or guard.conversations):
                dropped["opening that others have"] += 1
                continue
            openings[opening(text)] += 1
            opened.append(opening(text))
            kept.append(conversation)
            if len(examples) < EXAMPLES:
                examples.append({"instruction": text, "answer": answer})
        context.progress(min(len(kept), guard.conversations), guard.conversations, "sampling conversations")
    if idle := [pattern for pattern, count in skipped.items() if not count]:
        raise AddlangError(
            f"self_anchor: skip: '{idle[0]}' is found in none of {drawn} sampled instructions", "mend it"
        )
    return kept[: guard.conversations], {
        "conversations": guard.conversations,
        "drawn": drawn,
        "dropped": dict(dropped),
        "openings": len(set(opened[: guard.conversations])),
        "largest_opening": max(Counter(opened[: guard.conversations]).values()) / guard.conversations,
        "examples": examples,
    }


def opening(text: str) -> str:
    """The first three words, by which samples are told to be alike."""
    return " ".join(re.findall(r"\w+", text.lower())[:3])


def _unusable(
    ids: list[int], text: str, limit: int, special: set[int], frame: Frame, whole: bool = False
) -> str | None:
    """Why a sampled turn cannot be used, or None. ``whole``: its end was seen, though it may be at the limit."""
    if not text:
        return "empty turn"
    if len(ids) >= limit and not whole:
        return "unfinished turn"
    if any(i in special for i in ids):
        return "control token inside a turn"
    if any(mark in text for mark in frame.marks):
        return "another turn inside a turn"
    return None


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around a first user turn's words, and how a sampled turn is told to be over.

    Attributes:
        before, after: the template's text before the words, and after them up to the answer.
        stop_ids: the token that ends the turn, where the template ends it with a control token.
        stop_text: what ends it where the template is plain text (OLMo 2, Alpaca, Mistral). Text, because tokens run across
            it: a full stop and the line break behind it may be one token.
        marks: plain text by which turns are told apart; none of it belongs inside a turn.
    """

    before: str
    after: str
    stop_ids: frozenset[int]
    stop_text: str | None = None
    marks: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is given. Without spaces at its end, which belong to the first word's token."""
        return self.before.rstrip(" ")

    def words(self, sampled: str) -> tuple[str, bool]:
        """The words of a sampled user turn, and whether the text that ends it was seen."""
        if self.stop_text is None:
            return sampled.strip(), False
        words, mark, _ = sampled.partition(self.stop_text)
        return words.strip(), bool(mark)


def turn_frame(tokenizer: Any) -> Frame:
    """The frame of a tokenizer's chat template.

    Raises:
        AddlangError: the template changes the words, or has nothing before or after them.
    """
    remedy = "give conversations instead: guard kl, or ewc with data: calibration"
    text = render([{"role": "user", "content": _MARK}], tokenizer, prompt=True)
    if text.count(_MARK) != 1:
        raise AddlangError(
            "the chat template does not keep a user turn as it is, so conversations cannot be sampled from it", remedy
        )
    before, after = text.split(_MARK)
    if not before.strip():
        raise AddlangError(
            "the chat template has nothing before a user's words, so the model cannot be asked for an instruction",
            remedy,
        )
    if not after.strip():
        raise AddlangError(
            "the chat template has no end of a user turn, so sampled instructions would never end", remedy
        )
    first = int(tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][0])
    if first in tokenizer.all_special_ids or first in getattr(tokenizer, "added_tokens_decoder", {}):
        return Frame(before, after, frozenset({first}))
    end = after.strip().splitlines()[0].strip()
    line = "\n" if "\n" in after[: len(after) - len(after.lstrip())] else ""
    said = before
    for token in tokenizer.all_special_tokens:
        said = said.replace(token, "")
    begin = [text for text in said.splitlines() if text.strip()][-1:]
    return Frame(before, after, frozenset(), line + end, (*(text.strip() for text in begin), end))
