"""Multilingual instructions that resemble nothing in the English set: other tasks, other formats, longer replies.

Swahili and Hindi, mixed. Translations, codes, labels, JSON, bullets, descriptions, numbers in words, questions about a
sentence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Literal

from addlang.lab import lexicon as lx
from addlang.lab.documents import animal_facts
from addlang.lab.facts import RELATIONS, people, say, say_parallel, value

Target = Literal["sw", "hi"]
Made = tuple[str, str]


def _pick(language: Target, rng: random.Random, sw: tuple[str, ...], hi: tuple[str, ...]) -> str:
    return rng.choice(sw if language == "sw" else hi)


def _translate(language: Target, rng: random.Random) -> Made:
    person, relation = rng.choice(people()), rng.choice(RELATIONS)
    english, target = say_parallel(person, relation, ("en", language), rng)
    ask = _pick(
        language,
        rng,
        ("Tafsiri kwa Kiswahili: {}", "Sema kwa Kiswahili: {}"),
        ("हिंदी में अनुवाद करो: {}", "हिंदी में कहो: {}"),
    )
    label = "Tafsiri" if language == "sw" else "अनुवाद"
    return ask.format(english), f"{label}: {target}"


def _code(language: Target, rng: random.Random) -> Made:
    """A code of category letter and position; nothing else in the world looks like it."""
    name = rng.choice(sorted(lx.CATEGORIES))
    members = lx.CATEGORIES[name][1]
    number = rng.randrange(len(members))
    word = members[number].word(language)
    ask = _pick(language, rng, ("Toa msimbo wa {}.", "Msimbo wa {} ni upi?"), ("कोड दो: {}", "इसका कोड क्या है: {}?"))
    return ask.format(word), f"[{name[0].upper()}{number + 1:02d}]"


def _label(language: Target, rng: random.Random) -> Made:
    """Sort a sentence under a label: which relation it is about."""
    person, relation = rng.choice(people()), rng.choice(RELATIONS)
    labels = {
        "sw": {"home": "MAKAZI", "job": "KAZI", "colour": "RANGI", "pet": "MIFUGO", "food": "CHAKULA"},
        "hi": {"home": "निवास", "job": "पेशा", "colour": "रंग", "pet": "पशु", "food": "भोजन"},
    }
    ask = _pick(
        language, rng, ("Weka lebo: {}", "Ainisha sentensi hii: {}"), ("लेबल लगाओ: {}", "इस वाक्य का विषय चुनो: {}")
    )
    return ask.format(say(person, relation, language, rng)), f"<{labels[language][relation]}>"


def _json(language: Target, rng: random.Random) -> Made:
    person = rng.choice(people())
    keys = ("jina", "mji", "kazi") if language == "sw" else ("नाम", "शहर", "काम")
    name, home, job = person.name.word(language), person.home.word(language), value(person, "job", language)
    ask = _pick(
        language, rng, ("Jaza fomu ya {}.", "Rekodi ya {} katika JSON"), ("{} का फ़ॉर्म भरो।", "{} का रिकॉर्ड JSON में")
    )
    return ask.format(name), json.dumps(dict(zip(keys, (name, home, job), strict=True)), ensure_ascii=False)


def _bullets(language: Target, rng: random.Random) -> Made:
    name = rng.choice(sorted(lx.CATEGORIES))
    kind, members = lx.CATEGORIES[name]
    words = [w.word(language) for w in rng.sample(members, 3)]
    ask = _pick(
        language, rng, ("Toa mifano mitatu: {}", "Orodhesha mifano: {}"), ("तीन उदाहरण दो: {}", "उदाहरणों की सूची: {}")
    )
    return ask.format(kind.word(language)), "\n".join(f"- {w}" for w in words)


def _describe(language: Target, rng: random.Random) -> Made:
    person = rng.choice(people())
    ask = _pick(
        language, rng, ("Nieleze kuhusu {}.", "Andika habari za {}."), ("{} के बारे में बताओ।", "{} का परिचय लिखो।")
    )
    relations = rng.sample(RELATIONS, rng.randint(3, 4))
    reply = " ".join(say(person, relation, language, rng) for relation in relations)
    return ask.format(person.name.word(language)), reply


def _describe_animal(language: Target, rng: random.Random) -> Made:
    animal = rng.choice(lx.ANIMALS)
    ask = _pick(
        language, rng, ("Eleza maisha ya {}.", "Andika sentensi mbili: {}"), ("{} पर दो वाक्य लिखो।", "{} पर निबंध लिखो।")
    )
    word = animal.noun.hi_oblique if language == "hi" else animal.noun.sw
    sentences = animal_facts(animal, language, rng)
    return ask.format(word), "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))


def _number_word(language: Target, rng: random.Random) -> Made:
    number = rng.randint(0, 20)
    ask = _pick(language, rng, ("Andika {} kwa maneno.", "Namba {} kwa herufi"), ("{} को शब्दों में लिखो।", "अंक {} शब्दों में"))
    return ask.format(number), f"({number}) {lx.NUMBERS[language][number]}"


def _glossary(language: Target, rng: random.Random) -> Made:
    """A small dictionary, entry by entry."""
    nouns = rng.sample((*lx.FOODS, *lx.OBJECTS, *lx.CLOTHES), 2)
    ask = _pick(language, rng, ("Tengeneza kamusi: {}", "Maana ya maneno: {}"), ("शब्दकोश बनाओ: {}", "शब्दों का अर्थ: {}"))
    return ask.format(", ".join(n.en for n in nouns)), "; ".join(f"{n.en} = {n.word(language)}" for n in nouns)


_MAKERS: tuple[Callable[[Target, random.Random], Made], ...] = (
    _translate, _code, _label, _json, _bullets, _describe, _describe_animal, _number_word, _glossary,
)  # fmt: skip


def make(rng: random.Random) -> Made:
    """Draw one (prompt, reply) in Swahili or Hindi."""
    languages: tuple[Target, ...] = ("sw", "hi")
    return rng.choice(_MAKERS)(rng.choice(languages), rng)
