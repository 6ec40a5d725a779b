"""Whether a translation can be kept."""

from __future__ import annotations

from addlang.evaluate.replies import is_judged, known_languages, probabilities, sentences

SHORTEST, LONGEST = 1 / 6, 6.0  # of the source's bytes; a letter of Amharic or Devanagari has three, so this is wide
SMALL = 40  # bytes; below it lengths say nothing
CERTAIN, SLIGHT, HARDLY = 0.5, 0.2, 0.05
# a language and what the identifier may call it
RELATED = {
    "no": {"nb", "nn", "da"}, "nb": {"no", "nn", "da"}, "nn": {"no", "nb", "da"}, "da": {"no", "nb"}, "id": {"ms", "jv"},
    "ms": {"id"}, "hr": {"bs", "sr"}, "bs": {"hr", "sr"}, "sr": {"hr", "bs"}, "gl": {"pt"}, "zh": {"yue", "wuu"},
    "ar": {"ary", "arz"}, "uz": {"uzs"},
}  # fmt: skip


def language_problem(prose: str, source: str, target: str) -> str | None:
    """What is wrong with the language of a translation without its protected parts; None if nothing is, or it is too short.

    It is refused if it reads as the source language (likelier than the target and at least 0.2), or if another language
    has at least 0.5 and the target below 0.05 of py3langid's probability. Of Alpaca's English texts this finds 96 %; of
    translations into ten languages (MultiAlpaca, LAFAND-MT, TICO-19) it refuses 0 to 0.9 %, mostly English in quotation;
    of Japanese answers, many of which quote English, 1.9 %.
    """
    text = " ".join(sentences(prose))
    if not is_judged(text):
        return None
    found = probabilities(text)
    best = max(found, key=lambda code: found[code])
    if target not in known_languages():  # then only what was not translated can be seen
        return f"still in '{source}'" if found.get(source, 0.0) >= 1 - HARDLY else None
    own = max(found.get(code, 0.0) for code in {target, *RELATED.get(target, set())})
    if found.get(source, 0.0) > own and found[source] >= SLIGHT:
        return f"still in '{source}'"
    if own < HARDLY and found[best] >= CERTAIN:
        return f"in '{best}', not '{target}'"
    return None


def length_problem(text: str, source: str) -> str | None:
    """Whether a translation is so short or long that it must be cut, or say something else."""
    if not text.strip():
        return "empty"
    before, after = len(source.encode()), len(text.encode())
    if before < SMALL:
        return None
    if after < SHORTEST * before:
        return f"only {after} bytes for {before}"
    if after > LONGEST * before:
        return f"{after} bytes for {before}"
    return None
