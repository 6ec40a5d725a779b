"""The data card of one source: what it holds, in which languages, how long its rows are, under which licence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from addlang.data.licences import forbids_commercial_use, licence_of
from addlang.errors import AddlangWarning

if TYPE_CHECKING:
    from addlang.data.packing import Packed
    from addlang.recipe import DatasetSpec

SAMPLE = 2000  # documents whose language is identified
TOKENS = 512  # of each
SHOWN = 5  # languages in a card
ENOUGH = 0.5  # share of the declared language without which a warning is due
FEW = 10  # documents that say nothing about the rest
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
# what the language identifier may call a language that goes by a wider name
_NARROWER = {"no": {"nn", "nb"}, "nb": {"no", "nn"}, "nn": {"no", "nb"}, "zh": {"yue", "wuu"}, "ar": {"ary", "arz"}}


def source_card(spec: DatasetSpec, pack: Packed, tokenizer: Any, *, language: str) -> dict[str, Any]:
    """Plain data about a packed source; warns of a licence or a language that is not what one would expect.

    Args:
        language: the declared one.
    """
    meta = pack.meta
    chat = pack.loss is not None
    licences = dict(meta["licences"])
    if not licences and (stated := licence_of(spec.path, spec.license)):
        licences = {stated: meta["documents"]}
    languages = detected_languages(pack, tokenizer)
    _warn_of_licences(spec.path, licences)
    _warn_of_language(spec.path, language, languages)
    return {
        "path": spec.path,
        "role": spec.role,
        "language": language,
        "kind": "conversations" if chat else "text",
        **{key: meta[key] for key in ("rows", "documents", "tokens", "bytes", "empty", "dropped", "truncated")},
        "licenses": licences,
        "languages": languages,
        "lengths": lengths(pack),
        **meta["split"],
    }


def lengths(pack: Packed) -> dict[str, float]:
    """Tokens per document: quantiles and the mean."""
    tokens = np.diff(np.append(pack.documents, pack.tokens_total))
    found = {f"p{100 * q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(tokens, QUANTILES), strict=True)}
    return {**found, "mean": round(float(tokens.mean()), 1)}


def detected_languages(pack: Packed, tokenizer: Any) -> dict[str, Any]:
    """Languages of a random sample of the documents, by py3langid; of conversations what carries loss is looked at.

    Returns:
        ``sampled`` documents, ``judged`` ones (long enough to be identified), and ``detected``: the most frequent
        languages with their shares of the judged.
    """
    from addlang.evaluate.replies import identify, is_judged, sentences

    ends = np.append(pack.documents, pack.tokens_total)
    number = len(pack.documents)
    chosen = np.sort(np.random.default_rng(0).permutation(number)[:SAMPLE])
    count: dict[str, int] = {}
    for document in chosen.tolist():
        begin, end = int(ends[document]), int(ends[document + 1])
        ids = np.asarray(pack.tokens[begin:end])
        if pack.loss is not None:
            ids = ids[np.asarray(pack.loss[begin:end]) != 0]
        text = " ".join(sentences(tokenizer.decode(ids[:TOKENS].tolist(), skip_special_tokens=True)))
        if is_judged(text):
            code, _ = identify(text)
            count[code] = count.get(code, 0) + 1
    judged = sum(count.values())
    most = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    return {
        "sampled": len(chosen),
        "judged": judged,
        "detected": {code: round(n / judged, 4) for code, n in most},
    }


def _warn_of_licences(path: str, licences: dict[str, int]) -> None:
    for licence, rows in licences.items():
        if forbids_commercial_use(licence):
            what = f"{path}: {rows} row(s) under '{licence}', which forbids commercial use of what is trained on them"
            warnings.warn(what, AddlangWarning, stacklevel=4)


def _warn_of_language(path: str, declared: str, languages: dict[str, Any]) -> None:
    from addlang.evaluate.replies import known_languages

    code = declared.split("-")[0].split("_")[0].lower()
    detected = languages["detected"]
    if languages["judged"] < FEW or code not in known_languages():
        return
    first = next(iter(detected))
    share = sum(detected.get(name, 0.0) for name in {code, *_NARROWER.get(code, set())})
    if share < ENOUGH and first != code:
        what = f"{path}: declared as '{declared}', but {detected[first]:.0%} of the documents read as '{first}'"
        warnings.warn(f"{what} and {share:.0%} as '{code}'", AddlangWarning, stacklevel=4)
