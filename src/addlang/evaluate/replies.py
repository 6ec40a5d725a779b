"""In which language does a model answer an English prompt? Judged sentence by sentence.

Why by sentence: a whole reply with a fifth of Hausa still reads as English to a language identifier, so code-mixing,
the first sign that a model loses its source language, would not be seen.

How good the identifier is: of the sentences of AlpacaEval's reference replies it calls 97.2 % (text-davinci-003) and
98.1 % (GPT-4 Turbo) English; the rest are mostly ingredients and headings. Of Hausa, Igbo and Amharic web text it calls
99.6, 99.8 and 100 % by their names. So a share is to be read against the same model before, not against 1.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from addlang.data.similar import UNSPACED
from addlang.evaluate.exact_match import chat_prompt
from addlang.evaluate.generation import greedy, sample, stop_ids
from addlang.evaluate.measurement import Item, Measurement, NotMeasuredError, NotRun, Outcome

VERSION = "1"
MIN_CHARS = 15
MIN_WORDS = 3

# A full stop ends a sentence before white space only (3.5 is no border); the marks of other scripts end one anywhere.
_BORDER = re.compile(r"(?<=[.!?؟۔])[\"'”’)\]]*\s+|(?<=[।॥።፧。！？])[\"'”’)\]]*\s*|\n+")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)  # a programming language is none of those we ask for
_MARKUP = re.compile(r"^[\s>#*+\-–•|]*(?:\d+[.)]\s+)?|[*_|#]+", re.MULTILINE)
_UNSPACED = re.compile(f"[{UNSPACED}]")  # a letter says as much as about three Latin ones


def sentences(text: str) -> list[str]:
    """Split a reply into sentences, without code, list markers and emphasis."""
    text = _MARKUP.sub("", _CODE.sub("\n", text))
    return [part.strip() for part in _BORDER.split(text) if part.strip()]


def is_judged(sentence: str, min_chars: int = MIN_CHARS) -> bool:
    """Whether a sentence is long enough to be identified: three words and ``min_chars`` letters (marks count).

    In scripts without spaces between words a third of the letters is enough.
    """
    letters = sum(unicodedata.category(c)[0] in "LM" for c in sentence)
    unspaced = len(_UNSPACED.findall(sentence))
    if 2 * unspaced > letters:
        return 3 * letters >= min_chars
    return letters >= min_chars and len(sentence.split()) >= MIN_WORDS


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(sentence: str) -> tuple[str, float]:
    """Most likely language (ISO 639 code) and its probability, by py3langid over all the languages that it knows."""
    language, probability = _identifier().classify(sentence)
    return str(language), float(probability)


def probabilities(sentence: str) -> dict[str, float]:
    """Probability of every language that py3langid knows."""
    return {str(code): float(p) for code, p in _identifier().rank(sentence)}


def known_languages() -> frozenset[str]:
    """Codes that :func:`identify` can return."""
    return frozenset(_identifier().labels)


def identifier_name() -> str:
    """Name and version of the language identifier, for the settings of a measurement."""
    from importlib.metadata import version

    return f"py3langid {version('py3langid')}"


def is_degenerate(reply: str) -> bool:
    """Whether a reply says nothing: no letter or digit in it, or more than half of it repeats itself.

    Repetition: of all runs of four words (of eight characters where the script has no spaces) fewer than half are
    distinct, in a reply of at least twelve such runs.
    """
    if not any(unicodedata.category(c)[0] in "LN" for c in reply):
        return True
    words: Sequence[str] = reply.split()
    size = 4
    if 2 * len(_UNSPACED.findall(reply)) > len(reply):
        words, size = "".join(words), 8
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(runs) >= 12 and 2 * len(set(runs)) < len(runs)


def reply_language(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[str, str]],
    *,
    expected: str = "en",
    max_new_tokens: int,
    batch_size: int,
    min_chars: int = MIN_CHARS,
    sampling: Mapping[str, Any] | None = None,
    task: str = "replies",
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Measure free replies to prompts, asked through the chat template.

    Args:
        prompts: (id, text).
        expected: language in which the model should answer, ISO 639 code.
        max_new_tokens: tokens per reply.
        batch_size: prompts per batch.
        min_chars: see :func:`is_judged`; shorter sentences are counted in the detail and not judged.
        sampling: None for greedy decoding, or the arguments of :func:`addlang.evaluate.generation.sample`.
        progress: called with the number of prompts done and of all prompts.

    Returns:
        Two measurements. ``sentences_in_language``: sentences in the expected language over sentences judged, an item
        per reply, so its interval resamples replies. ``degenerate_replies``: share of empty or repetitive replies. The
        first is "not run" where no reply had a sentence long enough.

    Raises:
        NotMeasuredError: no chat template, no prompts, or the identifier does not know the expected language.
    """
    if expected not in known_languages():
        raise NotMeasuredError(
            f"{task}: {identifier_name()} does not know the language '{expected}'",
            "use its ISO 639 code, or switch this measurement off with evaluation.replies: null",
        )
    encoded = [chat_prompt(tokenizer, text) for _, text in prompts]
    decode: Callable[..., list[list[int]]] = greedy if sampling is None else functools.partial(sample, **sampling)
    replies = decode(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_ids=stop_ids(model, tokenizer),
        progress=progress,
    )
    language_items, degenerate_items = [], []
    for (name, prompt), ids in zip(prompts, replies, strict=True):
        reply = tokenizer.decode(ids, skip_special_tokens=True)
        parts = sentences(reply)
        judged = [part for part in parts if is_judged(part, min_chars)]
        languages = [(part, *identify(part)) for part in judged]
        detail = {
            "prompt": prompt,
            "reply": reply,
            "sentences": [[part, language, round(p, 4)] for part, language, p in languages],
            "not_judged": len(parts) - len(judged),
            "cut": len(ids) == max_new_tokens,
        }
        matches = sum(language == expected for _, language, _ in languages)
        language_items.append(Item(name, matches, len(judged), detail=detail))
        degenerate_items.append(Item(name, float(is_degenerate(reply)), detail={"reply": reply}))
    settings = {
        "chat_template": True,
        "decoding": "greedy" if sampling is None else dict(sampling),
        "max_new_tokens": max_new_tokens,
    }
    measurements, not_run = [], []
    try:
        measurements.append(
            Measurement(
                task=task,
                version=VERSION,
                role="source",
                language=expected,
                metric="sentences_in_language",
                higher_is_better=True,
                items=tuple(language_items),
                settings={**settings, "identifier": identifier_name(), "min_chars": min_chars, "min_words": MIN_WORDS},
                unit="share",
            )
        )
    except NotMeasuredError as error:
        not_run.append(NotRun(f"{task} (sentences_in_language)", error.message))
    measurements.append(
        Measurement(
            task=task,
            version=VERSION,
            role="source",
            language=expected,
            metric="degenerate_replies",
            higher_is_better=False,
            items=tuple(degenerate_items),
            settings={**settings, "rule": "no letter or digit, or less than half of the runs of 4 words distinct"},
            unit="share",
        )
    )
    return Outcome(measurements, not_run)
