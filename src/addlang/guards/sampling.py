"""Conversations that a chat model writes by itself: data about what it can do, without any data.

Given nothing but the start of a user turn, an instruct model samples an instruction and then its answer (as Magpie does to
make training data, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from addlang.errors import AddlangError
from addlang.guards.base import GuardContext

VERSION = 1
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

    Raises:
        AddlangError: the model does not write usable conversations.
    """
    from addlang.export import write_json

    path = context.cache_dir / "conversations" / f"{sampled_by(sampling, context)}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["ids"], found["about"]
    ids, about = sample_conversations(sampling, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"ids": ids, "about": about})
    return ids, about


def sampled_by(sampling: Sampling, context: GuardContext) -> str:
    """Fingerprint of everything that determines the sampled conversations."""
    from addlang.data.cache import fingerprint, tokenizer_fingerprint

    options = {name: getattr(sampling, name) for name in Sampling.model_fields}
    return fingerprint(
        "conversations", VERSION, context.model_hash, tokenizer_fingerprint(context.tokenizer, chat=True),
        options, context.sequence_length, context.language,
    )  # fmt: skip


def sample_conversations(guard: Sampling, context: GuardContext) -> tuple[list[list[int]], dict[str, Any]]:
    """Conversations as token ids, and counts of what was sampled and why some of it was dropped.

    Raises:
        AddlangError: the model does not write usable conversations.
    """
    from addlang.data.chat import encode_conversation
    from addlang.evaluate.generation import sample
    from addlang.evaluate.generation import stop_ids as model_stops
    from addlang.evaluate.replies import identify, is_degenerate

    tokenizer = context.tokenizer
    start, end = turn_frame(tokenizer)
    end_ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    stops = {end_ids[0], *model_stops(context.model, tokenizer)}
    prefix = tokenizer(start, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    kept: list[list[int]] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    openings: Counter[str] = Counter()
    skipped = Counter(dict.fromkeys(guard.skip, 0))
    drawn, block = 0, 0
    settings: dict[str, Any] = {
        "temperature": guard.sampling_temperature,
        "top_p": guard.top_p,
        "top_k": 0,
        "repetition_penalty": 1.0,
    }
    while len(kept) < guard.conversations:
        if drawn >= guard.attempts * guard.conversations:
            raise AddlangError(
                f"self_anchor: only {len(kept)} of {guard.conversations} conversations after {drawn} samples (dropped: {dict(dropped)})",
                "the model does not write usable conversations of its own: lower conversations, raise attempts or "
                "max_answer_tokens, or give replay data instead",
            )
        size = min(128, guard.conversations)
        seed = guard.sampling_seed * 1_000_003 + block
        block += 1
        drawn += size
        asked = sample(
            context.model, tokenizer, [prefix] * size, max_new_tokens=guard.max_instruction_tokens, batch_size=size,
            stop_ids=stops, seed=2 * seed, **settings,
        )  # fmt: skip
        instructions = []
        for ids in asked:
            text = tokenizer.decode(ids, skip_special_tokens=False).strip()
            reason = _unusable(ids, text, guard.max_instruction_tokens, special)
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
        prompts = [
            tokenizer(_render(tokenizer, [{"role": "user", "content": t}], prompt=True), add_special_tokens=False)[
                "input_ids"
            ]
            for t in instructions
        ]
        answers = sample(
            context.model, tokenizer, prompts, max_new_tokens=guard.max_answer_tokens, batch_size=size,
            stop_ids=stops, seed=2 * seed + 1, **settings,
        )  # fmt: skip
        for text, ids in zip(instructions, answers, strict=True):
            answer = tokenizer.decode(ids, skip_special_tokens=False).strip()
            reason = _unusable(ids, answer, guard.max_answer_tokens, special)
            if reason is None and is_degenerate(answer):
                reason = "degenerate answer"
            if reason is None and guard.language_filter and identify(f"{text}\n{answer}")[0] != context.language:
                reason = "another language"
            if reason is not None:
                dropped[reason] += 1
                continue
            whole, _ = encode_conversation(
                [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], tokenizer, loss_on="all"
            )
            if len(whole) > context.sequence_length:
                dropped["longer than sequence_length"] += 1
                continue
            if openings[opening(text)] >= (guard.max_per_opening or guard.conversations):
                dropped["opening that others have"] += 1
                continue
            openings[opening(text)] += 1
            kept.append(whole)
        context.progress(min(len(kept), guard.conversations), guard.conversations, "sampling conversations")
    if idle := [pattern for pattern, count in skipped.items() if not count]:
        raise AddlangError(
            f"self_anchor: skip: '{idle[0]}' is found in none of {drawn} sampled instructions", "mend it"
        )
    return kept[: guard.conversations], {
        "conversations": guard.conversations,
        "drawn": drawn,
        "dropped": dict(dropped),
        "openings": len(openings),
        "largest_opening": max(openings.values()) / sum(openings.values()),
    }


def opening(text: str) -> str:
    """The first three words, by which samples are told to be alike."""
    return " ".join(re.findall(r"\w+", text.lower())[:3])


def _unusable(ids: list[int], text: str, limit: int, special: set[int]) -> str | None:
    """Why a sampled turn cannot be used, or None."""
    if not text:
        return "empty turn"
    if len(ids) >= limit:
        return "unfinished turn"
    if any(i in special for i in ids):
        return "control token inside a turn"
    return None


def turn_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before a first user turn's words, and after them up to the answer.

    Raises:
        AddlangError: the template changes the words.
    """
    text = _render(tokenizer, [{"role": "user", "content": _MARK}], prompt=True)
    if text.count(_MARK) != 1:
        raise AddlangError(
            "the chat template does not keep a user turn as it is, so conversations cannot be sampled from it"
        )
    before, after = text.split(_MARK)
    if not after.strip():
        raise AddlangError("the chat template has no end of a user turn, so sampled instructions would never end")
    return before, after


def _render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
