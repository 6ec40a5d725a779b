"""Sixteen verifiable instruction tasks in English, and the same tasks in Swahili and Hindi.

A task is a list of phrasings per language and a function that draws its content: the values of the phrasing's slots and
the one right answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from addlang.lab import lexicon as lx
from addlang.lab.facts import Person, inflect, people, value
from addlang.lab.lexicon import Language

# {w} a list of words or numbers, {x} a word, {a} {b} numbers, {k} a count, {s} statements, {p} a person;
# {a|b} the Hindi form for a man or a woman.
PHRASINGS: dict[str, dict[Language, tuple[str, ...]]] = {
    "copy": {
        "en": (
            "Repeat these words: {w}",
            "Copy: {w}",
            "Say this again: {w}",
            "Write the same words: {w}",
            "Please repeat: {w}",
        ),
        "sw": ("Rudia maneno haya: {w}", "Nakili maneno haya: {w}", "Andika tena maneno haya: {w}"),
        "hi": ("इन शब्दों को दोहराओ: {w}", "ये शब्द फिर से लिखो: {w}", "यही शब्द लिखो: {w}"),
    },
    "reverse": {
        "en": (
            "Reverse this list: {w}",
            "Write these words backwards: {w}",
            "Turn the order around: {w}",
            "Last to first: {w}",
        ),
        "sw": ("Andika maneno haya kwa mpangilio wa kinyume: {w}", "Geuza mpangilio wa maneno haya: {w}"),
        "hi": ("इन शब्दों को उल्टे क्रम में लिखो: {w}", "इस सूची को उलट दो: {w}"),
    },
    "count": {
        "en": (
            "How many words are in this list? {w}",
            "Count the words: {w}",
            "Give the number of words: {w}",
            "How long is the list? {w}",
        ),
        "sw": ("Kuna maneno mangapi hapa? {w}", "Hesabu maneno haya: {w}", "Orodha hii ina maneno mangapi? {w}"),
        "hi": ("यहाँ कितने शब्द हैं? {w}", "इन शब्दों को गिनो: {w}", "इस सूची में कितने शब्द हैं? {w}"),
    },
    "sort": {
        "en": (
            "Sort these numbers: {w}",
            "Put in order, smallest first: {w}",
            "Order from small to large: {w}",
            "Arrange the numbers: {w}",
        ),
        "sw": ("Panga namba hizi kuanzia ndogo hadi kubwa: {w}", "Panga namba hizi kwa utaratibu: {w}"),
        "hi": ("इन संख्याओं को छोटी से बड़ी के क्रम में लिखो: {w}", "इन संख्याओं को क्रम से लगाओ: {w}"),
    },
    "arithmetic": {
        "en": (
            "What is {a} {o} {b}?",
            "Calculate: {a} {o} {b}",
            "{a} {o} {b} = ?",
            "How much is {a} {o} {b}?",
            "Work out {a} {o} {b}.",
        ),
        "sw": ("{a} {o} {b} ni ngapi?", "Hesabu: {a} {o} {b}", "Jibu la {a} {o} {b} ni nini?"),
        "hi": ("{a} {o} {b} कितना होता है?", "हिसाब करो: {a} {o} {b}", "{a} {o} {b} = ?"),
    },
    "lookup": {
        "en": (
            "{s} Who has the {x}?",
            "{s} Who is the owner of the {x}?",
            "Read: {s} Name who has the {x}.",
            "{s} The {x} belongs to whom?",
        ),
        "sw": ("{s} Nani ana {x}?", "Soma: {s} Ni nani mwenye {x}?", "{s} Taja mwenye {x}."),
        "hi": ("{s} {x} किसके पास है?", "पढ़ो: {s} किसके पास {x} है?", "{s} बताओ, {x} किसके पास है?"),
    },
    "facts": {
        "en": ("{q}", "Answer: {q}", "Please tell me: {q}", "Question: {q}"),
        "sw": ("{q}", "Jibu: {q}", "Tafadhali niambie: {q}"),
        "hi": ("{q}", "उत्तर दो: {q}", "कृपया बताओ: {q}"),
    },
    "first": {
        "en": (
            "What is the first word? {w}",
            "Give the first word of: {w}",
            "Which word comes first? {w}",
            "Say only the first word: {w}",
        ),
        "sw": ("Neno la kwanza ni lipi? {w}", "Andika neno la kwanza: {w}", "Taja neno la kwanza tu: {w}"),
        "hi": ("पहला शब्द कौन सा है? {w}", "पहला शब्द लिखो: {w}", "केवल पहला शब्द बताओ: {w}"),
    },
    "last": {
        "en": (
            "What is the last word? {w}",
            "Give the last word of: {w}",
            "Which word comes last? {w}",
            "Say only the last word: {w}",
        ),
        "sw": ("Neno la mwisho ni lipi? {w}", "Andika neno la mwisho: {w}", "Taja neno la mwisho tu: {w}"),
        "hi": ("आख़िरी शब्द कौन सा है? {w}", "आख़िरी शब्द लिखो: {w}", "केवल आख़िरी शब्द बताओ: {w}"),
    },
    "odd_one_out": {
        "en": (
            "Which word does not belong? {w}",
            "Find the odd one out: {w}",
            "Which one is different? {w}",
            "One does not fit: {w}",
        ),
        "sw": (
            "Neno gani ni tofauti na mengine? {w}",
            "Tafuta neno lisilofaa: {w}",
            "Neno lipi halifanani na mengine? {w}",
        ),
        "hi": ("कौन सा शब्द बाकी से अलग है? {w}", "अलग शब्द खोजो: {w}", "कौन सा शब्द मेल नहीं खाता? {w}"),
    },
    "category": {
        "en": (
            "What kind of thing is this: {x}?",
            "To which group does {x} belong?",
            "Name the category of {x}.",
            "{x} is a kind of what?",
            "What is the general word for {x}?",
            "What is {x}: animal, fruit, vegetable, clothing or colour?",
            "Classify: {x}",
            "Give the class of the word {x}.",
        ),
        "sw": (
            "Neno {x} ni la kundi gani?",
            "Taja aina ya: {x}",
            "Hiki ni kitu cha aina gani: {x}?",
            "Kundi la {x} ni lipi?",
            "Panga neno {x} katika kundi lake.",
        ),
        "hi": (
            "{x} किस तरह की चीज़ है?",
            "वर्ग बताओ: {x}",
            "{x} किस समूह का शब्द है?",
            "यह क्या है: {x}?",
            "{x} शब्द का समूह लिखो।",
        ),
    },
    "exact_words": {
        "en": (
            "Answer in exactly {k} words: {w}",
            "Give exactly {k} words from the start: {w}",
            "Write only the first {k} words: {w}",
            "Shorten to exactly {k} words: {w}",
        ),
        "sw": ("Andika maneno {k} ya kwanza tu: {w}", "Jibu kwa maneno {k} tu: {w}"),
        "hi": ("केवल पहले {k} शब्द लिखो: {w}", "ठीक {k} शब्दों में उत्तर दो: {w}"),
    },
    "uppercase": {
        "en": (
            "Write in capital letters: {w}",
            "Make this uppercase: {w}",
            "Shout these words: {w}",
            "Capitals only: {w}",
        ),
        "sw": ("Andika kwa herufi kubwa: {w}", "Geuza kuwa herufi kubwa: {w}"),
        "hi": (),  # Devanagari has no capital letters
    },
    "comma_list": {
        "en": (
            "Join with commas: {w}",
            "Put a comma between the words: {w}",
            "Make a comma list: {w}",
            "Separate by commas: {w}",
        ),
        "sw": ("Tenganisha maneno haya kwa koma: {w}", "Weka koma kati ya maneno haya: {w}"),
        "hi": ("इन शब्दों के बीच अल्पविराम लगाओ: {w}", "अल्पविराम से अलग करो: {w}"),
    },
    "larger": {
        "en": (
            "Which is larger, {a} or {b}?",
            "Name the bigger number: {a} or {b}",
            "Which number is greater, {a} or {b}?",
            "Largest of {a} and {b}?",
        ),
        "sw": ("Namba ipi ni kubwa zaidi, {a} au {b}?", "Taja namba kubwa: {a} au {b}"),
        "hi": ("कौन सी संख्या बड़ी है, {a} या {b}?", "बड़ी संख्या बताओ: {a} या {b}"),
    },
    "contains": {
        "en": (
            "Is the word {x} in this list? {w}",
            "Does the list have {x}? {w}",
            "Yes or no, is {x} here: {w}",
            "Can you find {x}? {w}",
        ),
        "sw": ("Je, neno {x} limo katika orodha hii? {w}", "Je, kuna neno {x} hapa? {w}"),
        "hi": ("क्या इस सूची में {x} है? {w}", "हाँ या नहीं, क्या यहाँ {x} है: {w}"),
    },
}
TASKS: tuple[str, ...] = tuple(PHRASINGS)

QUESTIONS: dict[str, dict[Language, str]] = {
    "home": {"en": "Where does {p} live?", "sw": "{p} anaishi wapi?", "hi": "{p} कहाँ {रहता|रहती} है?"},
    "job": {
        "en": "What is the job of {p}?",
        "sw": "{p} anafanya kazi gani?",
        "hi": "{p} क्या काम {करता|करती} है?",
    },
    "colour": {
        "en": "Which colour does {p} like?",
        "sw": "{p} anapenda rangi gani?",
        "hi": "{p} को कौन सा रंग पसंद है?",
    },
    "food": {
        "en": "What does {p} like to eat?",
        "sw": "{p} anapenda kula nini?",
        "hi": "{p} को क्या खाना पसंद है?",
    },
}
_OWNING: dict[Language, str] = {"en": "{p} has the {x}.", "sw": "{p} ana {x}.", "hi": "{p} के पास {x} है।"}
_OPERATORS: dict[Language, tuple[str, str]] = {
    "en": ("plus", "minus"),
    "sw": ("jumlisha", "toa"),
    "hi": ("जमा", "घटा"),
}
_YES_NO: dict[Language, tuple[str, str]] = {"en": ("yes", "no"), "sw": ("ndiyo", "hapana"), "hi": ("हाँ", "नहीं")}

Content = tuple[dict[str, str], str, Person | None]


def tasks_in(language: Language) -> tuple[str, ...]:
    """The tasks that exist in a language: all of them but ``uppercase`` in Hindi."""
    return tuple(task for task in TASKS if PHRASINGS[task][language])


def make(task: str, language: Language, rng: random.Random) -> tuple[str, str]:
    """Draw one (prompt, answer)."""
    slots, answer, person = _CONTENT[task](language, rng)
    phrasing = rng.choice(PHRASINGS[task][language])
    return fill(phrasing, slots, person), answer


def make_with(task: str, phrasing: str, language: Language, rng: random.Random) -> tuple[str, str]:
    """As :func:`make`, in a given phrasing."""
    slots, answer, person = _CONTENT[task](language, rng)
    return fill(phrasing, slots, person), answer


def fill(template: str, slots: dict[str, Any], person: Person | None) -> str:
    """Put the slots into a template, after agreeing it with the person it is about."""
    return (template if person is None else inflect(template, person)).format(**slots)


def _words(language: Language, rng: random.Random, low: int = 2, high: int = 4) -> list[str]:
    return rng.sample(lx.LIST_WORDS[language], rng.randint(low, high))


def _of_words(
    answer: Callable[[list[str]], str], low: int = 2, high: int = 4
) -> Callable[[Language, random.Random], Content]:
    """A task whose answer is a function of a list of words."""

    def content(language: Language, rng: random.Random) -> Content:
        words = _words(language, rng, low, high)
        return {"w": " ".join(words)}, answer(words), None

    return content


def _sort(language: Language, rng: random.Random) -> Content:
    numbers = rng.sample(range(21), rng.randint(2, 4))
    return {"w": " ".join(map(str, numbers))}, " ".join(map(str, sorted(numbers))), None


def _arithmetic(language: Language, rng: random.Random) -> Content:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    plus, minus = _OPERATORS[language]
    if rng.random() < 0.5:
        return {"a": str(a), "o": plus, "b": str(b)}, str(a + b), None
    a, b = max(a, b), min(a, b)
    return {"a": str(a), "o": minus, "b": str(b)}, str(a - b), None


def _lookup(language: Language, rng: random.Random) -> Content:
    count = rng.randint(2, 3)
    names = [p.name.word(language) for p in rng.sample(people(), count)]
    things = [n.word(language) for n in rng.sample((*(a.noun for a in lx.PETS), *lx.OBJECTS), count)]
    asked = rng.randrange(count)
    pairs = zip(names, things, strict=True)
    statements = " ".join(_OWNING[language].format(p=name, x=thing) for name, thing in pairs)
    return {"s": statements, "x": things[asked]}, names[asked], None


def _facts(language: Language, rng: random.Random) -> Content:
    person, relation = rng.choice(people()), rng.choice(sorted(QUESTIONS))
    question = fill(QUESTIONS[relation][language], {"p": person.name.word(language)}, person)
    return {"q": question}, value(person, relation, language), person


def _odd_one_out(language: Language, rng: random.Random) -> Content:
    common, other = rng.sample(sorted(lx.CATEGORIES), 2)
    words = [w.word(language) for w in rng.sample(lx.CATEGORIES[common][1], rng.randint(2, 3))]
    odd = rng.choice(lx.CATEGORIES[other][1]).word(language)
    words.insert(rng.randint(0, len(words)), odd)
    return {"w": " ".join(words)}, odd, None


def _category(language: Language, rng: random.Random) -> Content:
    kind, word = rng.choice([(kind, word) for kind, members in lx.CATEGORIES.values() for word in members])
    return {"x": word.word(language)}, kind.word(language), None


def _exact_words(language: Language, rng: random.Random) -> Content:
    words = _words(language, rng, low=3, high=5)
    k = rng.randint(2, len(words) - 1)
    return {"k": str(k), "w": " ".join(words)}, " ".join(words[:k]), None


def _larger(language: Language, rng: random.Random) -> Content:
    a, b = rng.sample(range(31), 2)
    return {"a": str(a), "b": str(b)}, str(max(a, b)), None


def _contains(language: Language, rng: random.Random) -> Content:
    words = _words(language, rng, low=3, high=5)
    word, listed = words[-1], words[:-1]
    yes, no = _YES_NO[language]
    if rng.random() < 0.5:
        return {"x": rng.choice(listed), "w": " ".join(listed)}, yes, None
    return {"x": word, "w": " ".join(listed)}, no, None


_CONTENT: dict[str, Callable[[Language, random.Random], Content]] = {
    "copy": _of_words(" ".join),
    "reverse": _of_words(lambda words: " ".join(reversed(words))),
    "count": _of_words(lambda words: str(len(words))),
    "sort": _sort,
    "arithmetic": _arithmetic,
    "lookup": _lookup,
    "facts": _facts,
    "first": _of_words(lambda words: words[0]),
    "last": _of_words(lambda words: words[-1]),
    "odd_one_out": _odd_one_out,
    "category": _category,
    "exact_words": _exact_words,
    "uppercase": _of_words(lambda words: " ".join(words).upper(), low=1, high=2),
    "comma_list": _of_words(", ".join),
    "larger": _larger,
    "contains": _contains,
}
