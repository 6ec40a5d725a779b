"""What is true in the lab world: the same facts about forty people, whatever the language, and sentences that say them.

Every fact about a person can be said by several templates. One of them, chosen by a hash of the fact, never occurs in
training or held-out documents: it is the cloze sentence of that fact, so that a right choice means knowing the fact
(and the language), not having seen the string.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from addlang.lab import lexicon as lx
from addlang.lab.lexicon import Language

WORLD_SEED = 20
RELATIONS = ("home", "job", "colour", "pet", "food")


def stable_hash(text: str) -> int:
    """A hash that is the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Person:
    name: lx.Name
    home: lx.Place
    job: lx.Job
    colour: lx.Colour
    pet: lx.Noun
    pets: int  # 2 to 5: Swahili numbers up to five show the noun class
    food: lx.Noun


@cache
def people() -> tuple[Person, ...]:
    """The forty people, each with one home, job, favourite colour, kind and number of animals, and food."""
    rng = random.Random(WORLD_SEED)
    return tuple(
        Person(
            name,
            rng.choice(lx.PLACES),
            rng.choice(lx.JOBS),
            rng.choice(lx.COLOURS),
            rng.choice(lx.PETS).noun,
            rng.randint(2, 5),
            rng.choice(lx.FOODS),
        )
        for name in lx.NAMES
    )


# {p} the person, {v} the value; {a|b} the Hindi form for a man or a woman. {v} follows {p}: what stands before {v} is
# the context of a cloze item. The templates of the three languages translate each other, line by line.
SENTENCES: dict[str, dict[Language, tuple[str, ...]]] = {
    "home": {
        "en": (
            "{p} lives in {v}.",
            "The home of {p} is in {v}.",
            "{p} has a house in {v}.",
            "The family of {p} lives in {v}.",
        ),
        "sw": ("{p} anaishi {v}.", "Nyumba ya {p} iko {v}.", "{p} ana nyumba huko {v}.", "Familia ya {p} inaishi {v}."),
        "hi": (
            "{p} {v} में {रहता|रहती} है।",
            "{p} का घर {v} में है।",
            "{p} का मकान {v} में है।",
            "{p} का परिवार {v} में रहता है।",
        ),
    },
    "job": {
        "en": ("{p} is a {v}.", "{p} works as a {v}.", "Everyone knows that {p} is a {v}.", "By trade, {p} is a {v}."),
        "sw": (
            "{p} ni {v}.",
            "{p} anafanya kazi kama {v}.",
            "Watu wote wanajua kwamba {p} ni {v}.",
            "Kwa kazi yake, {p} ni {v}.",
        ),
        "hi": (
            "{p} {v} है।",
            "{p} {v} का काम {करता|करती} है।",
            "सब जानते हैं कि {p} {v} है।",
            "पेशे से {p} {v} है।",
        ),
    },
    "colour": {
        "en": (
            "{p} likes the colour {v}.",
            "{p} likes the colour {v} most.",
            "For {p}, the best colour is {v}.",
            "The house of {p} is {v}.",
        ),
        "sw": (
            "{p} anapenda {v}.",
            "{p} anapenda {v} zaidi.",
            "Kwa {p}, rangi bora ni {v}.",
            "Nyumba ya {p} ina {v}.",
        ),
        "hi": (
            "{p} को {v} रंग पसंद है।",
            "{p} को {v} रंग सबसे ज़्यादा पसंद है।",
            "{p} के लिए सबसे अच्छा रंग {v} है।",
            "{p} का मकान {v} है।",
        ),
    },
    "pet": {
        "en": (
            "{p} has {v}.",
            "{p} keeps {v}.",
            "At the house of {p} there are {v}.",
            "In the yard of {p} there are {v}.",
        ),
        "sw": ("{p} ana {v}.", "{p} anafuga {v}.", "Nyumbani kwa {p} kuna {v}.", "Uani kwa {p} kuna {v}."),
        "hi": (
            "{p} के पास {v} हैं।",
            "{p} {v} {पालता|पालती} है।",
            "{p} के घर में {v} हैं।",
            "{p} के आँगन में {v} हैं।",
        ),
    },
    "food": {
        "en": ("{p} likes {v}.", "{p} likes to eat {v}.", "{p} eats {v} every day.", "{p} often buys {v}."),
        "sw": (
            "{p} anapenda {v}.",
            "{p} anapenda kula {v}.",
            "{p} hula {v} kila siku.",
            "Mara nyingi {p} hununua {v}.",
        ),
        "hi": (
            "{p} को {v} पसंद हैं।",
            "{p} को {v} खाना पसंद है।",
            "{p} हर रोज़ {v} {खाता|खाती} है।",
            "{p} अक्सर {v} {खरीदता|खरीदती} है।",
        ),
    },
}


def inflect(template: str, person: Person) -> str:
    """Resolve every ``{masculine|feminine}`` for a person."""
    parts = template.split("{")
    for i, part in enumerate(parts[1:], 1):
        inside, rest = part.split("}", 1)
        if "|" in inside:
            parts[i] = inside.split("|")[person.name.gender == "f"] + rest
        else:
            parts[i] = "{" + part
    return "".join(parts)


def value(person: Person, relation: str, language: Language) -> str:
    """What stands for {v} in the sentences of a relation."""
    return dict(_value_choices(person, relation, language))[true_key(person, relation)]


def true_key(person: Person, relation: str) -> str:
    """The language-independent name of the fact's value."""
    return {
        "home": person.home.en,
        "job": person.job.en,
        "colour": person.colour.en,
        "pet": person.pet.en,
        "food": person.food.en,
    }[relation]


def _value_choices(person: Person, relation: str, language: Language) -> list[tuple[str, str]]:
    """Every value that the relation can take, as (key, phrase agreeing with the person)."""
    if relation == "home":
        return [(place.en, place.word(language)) for place in lx.PLACES]
    if relation == "job":
        gender = person.name.gender
        return [(j.en, j.hindi(gender) if language == "hi" else j.word(language)) for j in lx.JOBS]
    if relation == "colour":
        return [(c.en, c.sw_phrase if language == "sw" else c.word(language)) for c in lx.COLOURS]
    if relation == "pet":
        return [(a.noun.en, lx.counted(a.noun, person.pets, language)) for a in lx.PETS]
    return [(f.en, f.plural(language)) for f in lx.FOODS]


def held_out_template(person: Person, relation: str, language: Language) -> int:
    """Index of the template that no document uses for this fact."""
    return stable_hash(f"{language}/{person.name.en}/{relation}") % len(SENTENCES[relation][language])


def say(person: Person, relation: str, language: Language, rng: random.Random) -> str:
    """A sentence that states the fact, never by its held-out template."""
    return say_parallel(person, relation, (language,), rng)[0]


def say_parallel(person: Person, relation: str, languages: tuple[Language, ...], rng: random.Random) -> list[str]:
    """The same sentence in several languages, held out in none of them."""
    held_out = {held_out_template(person, relation, language) for language in languages}
    index = rng.choice([i for i in range(len(SENTENCES[relation]["en"])) if i not in held_out])
    return [_sentence(person, relation, language, index) for language in languages]


def _sentence(person: Person, relation: str, language: Language, index: int) -> str:
    template = inflect(SENTENCES[relation][language][index], person)
    return template.format(p=person.name.word(language), v=value(person, relation, language))


@dataclass(frozen=True)
class Cloze:
    """Which choice continues the context? Choices begin with the space that separates them from it."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int  # index into choices


CLOZE_CHOICES = 8


def cloze(person: Person, relation: str, language: Language, rng: random.Random) -> Cloze:
    """The held-out sentence of a fact; the other choices put other values of the relation in its place."""
    template = inflect(SENTENCES[relation][language][held_out_template(person, relation, language)], person)
    before, after = template.replace("{p}", person.name.word(language)).split("{v}")
    right = true_key(person, relation)
    phrases = dict(_value_choices(person, relation, language))
    keys = [right, *rng.sample([k for k in phrases if k != right], CLOZE_CHOICES - 1)]
    rng.shuffle(keys)
    return Cloze(
        f"{language}-{relation}-{person.name.en}",
        before.rstrip(),
        tuple(f" {phrases[k]}{after}" for k in keys),
        keys.index(right),
    )
