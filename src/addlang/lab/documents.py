"""Raw text of the lab world: profiles, stories and descriptions, in natural simple sentences of each language."""

from __future__ import annotations

import random
from collections.abc import Callable

from addlang.lab import lexicon as lx
from addlang.lab.facts import RELATIONS, Person, people, say
from addlang.lab.lexicon import Language
from addlang.lab.lexicon import masculine_or_feminine as mf


def profile(language: Language, rng: random.Random) -> list[str]:
    """What is known about one person."""
    person = rng.choice(people())
    return [say(person, relation, language, rng) for relation in rng.sample(RELATIONS, rng.randint(2, 5))]


def household(language: Language, rng: random.Random) -> list[str]:
    """The same two relations for several people."""
    relations = rng.sample(RELATIONS, 2)
    persons = rng.sample(people(), rng.randint(2, 3))
    return [say(person, relation, language, rng) for person in persons for relation in relations]


def market(language: Language, rng: random.Random) -> list[str]:
    person, day = rng.choice(people()), rng.choice(lx.DAYS)
    name, gender = person.name.word(language), person.name.gender
    first, second = rng.sample(lx.FOODS, 2)
    bought = [lx.counted(food, rng.randint(2, 9), language) for food in (first, second)]
    if language == "en":
        he = mf(gender, "He", "She")
        return [
            f"On {day.en}, {name} went to the market.",
            f"{he} bought {bought[0]} and {bought[1]}.",
            f"Then {he.lower()} went home.",
        ]
    if language == "sw":
        return [
            f"Siku ya {day.sw}, {name} alikwenda sokoni.",
            f"Alinunua {bought[0]} na {bought[1]}.",
            "Kisha alirudi nyumbani.",
        ]
    return [
        f"{day.hi} को {name} बाज़ार {mf(gender, 'गया', 'गई')}।",
        f"उसने {bought[0]} और {bought[1]} {mf(second.hi_gender, 'खरीदे', 'खरीदीं')}।",
        f"फिर वह घर लौट {mf(gender, 'आया', 'आई')}।",
    ]


def encounter(language: Language, rng: random.Random) -> list[str]:
    """Somebody sees an animal of some colour where it lives."""
    person, animal, colour = rng.choice(people()), rng.choice(lx.ANIMALS), rng.choice(lx.COLOURS)
    name, noun, where = person.name.word(language), animal.noun, lx.HABITATS[animal.lives].word(language)
    if language == "en":
        return [f"{name} saw {lx.article(f'{colour.en} {noun.en}')} {where}.", *animal_facts(animal, language, rng)]
    if language == "sw":
        return [f"{name} aliona {noun.sw} wa {colour.sw_phrase} {where}.", *animal_facts(animal, language, rng)]
    seen = mf(noun.hi_gender, "देखा", "देखी")
    one = f"एक {colour.hindi(noun.hi_gender)} {noun.hi}"
    return [f"{name} ने {where} {one} {seen}।", *animal_facts(animal, language, rng)]


def animal_facts(animal: lx.Animal, language: Language, rng: random.Random) -> list[str]:
    """What an animal eats and where it lives, in either order."""
    noun, food, where = animal.noun, lx.DIETS[animal.eats].word(language), lx.HABITATS[animal.lives].word(language)
    if language == "en":
        eats = rng.choice((f"{lx.article(noun.en)} eats {food}.", f"The food of {lx.article(noun.en)} is {food}."))
        lives = f"{lx.article(noun.en)} lives {where}."
    elif language == "sw":
        eats = rng.choice((f"{noun.sw} hula {food}.", f"Chakula cha {noun.sw} ni {food}."))
        lives = f"{noun.sw} huishi {where}."
    else:
        # A sentence whose food is plural ("पत्ते", "कीड़े") would need another verb, so the food is the object here.
        eats = f"{noun.hi} {food} {mf(noun.hi_gender, 'खाता', 'खाती')} है।"
        lives = f"{noun.hi} {where} {mf(noun.hi_gender, 'रहता', 'रहती')} है।"
    sentences = [capital(eats), capital(lives)]
    rng.shuffle(sentences)
    return sentences


def animals(language: Language, rng: random.Random) -> list[str]:
    return [s for animal in rng.sample(lx.ANIMALS, 2) for s in animal_facts(animal, language, rng)]


def friends(language: Language, rng: random.Random) -> list[str]:
    """Two friends meet and eat together."""
    one, two = rng.sample(people(), 2)
    p, q = one.name.word(language), two.name.word(language)
    day, place, food = rng.choice(lx.DAYS), rng.choice(lx.PLACES), rng.choice(lx.FOODS)
    where, eaten = place.word(language), food.plural(language)
    extra = say(rng.choice((one, two)), rng.choice(RELATIONS), language, rng)
    if language == "en":
        return [f"{p} and {q} are friends.", f"On {day.en} they met in {where}.", f"They ate {eaten} together.", extra]
    if language == "sw":
        return [f"{p} na {q} ni marafiki.", f"Siku ya {day.sw} walikutana {where}.", f"Walikula {eaten} pamoja.", extra]
    met = "मिलीं" if one.name.gender == two.name.gender == "f" else "मिले"
    ate = mf(food.hi_gender, "खाए", "खाईं")
    return [f"{p} और {q} दोस्त हैं।", f"{day.hi} को वे {where} में {met}।", f"उन्होंने साथ में {eaten} {ate}।", extra]


def shopping(language: Language, rng: random.Random) -> list[str]:
    """Somebody buys coloured clothes."""
    person = rng.choice(people())
    name = person.name.word(language)
    sentences = []
    for garment, colour in zip(rng.sample(lx.CLOTHES, 2), rng.sample(lx.COLOURS, 2), strict=True):
        if language == "en":
            sentences.append(f"{name} bought {lx.article(f'{colour.en} {garment.en}')}.")
        elif language == "sw":
            sentences.append(f"{name} alinunua {garment.sw} {garment.link} {colour.sw_phrase}.")
        else:
            gender = garment.hi_gender
            adjective, bought = colour.hindi(gender), mf(gender, "खरीदा", "खरीदी")
            sentences.append(f"{name} ने एक {adjective} {garment.hi} {bought}।")
    return [*sentences, say(person, rng.choice(RELATIONS), language, rng)]


def kinds(language: Language, rng: random.Random) -> list[str]:
    """What kind of thing a word names."""
    sentences = []
    for name in rng.sample(sorted(lx.CATEGORIES), 3):
        kind, members = lx.CATEGORIES[name]
        word, label = rng.choice(members).word(language), kind.word(language)
        if language == "en":
            is_a = f"{lx.article(word)} is {lx.article(label)}." if name != "colour" else f"{word} is a colour."
            sentences.append(f"{capital(word)} is clothing." if name == "clothing" else is_a)
        elif language == "sw":
            sentences.append(f"{word} ni {label}.")
        else:
            sentences.append(f"{word} एक {label} है।")
    return [capital(s) for s in sentences]


def sums(language: Language, rng: random.Random) -> list[str]:
    sentences = []
    for _ in range(3):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        one, two, total = (lx.NUMBERS[language][n] for n in (a, b, a + b))
        if language == "en":
            sentences.append(f"{one} plus {two} is {total}.")
        elif language == "sw":
            sentences.append(f"{one} jumlisha {two} ni {total}.")
        else:
            sentences.append(f"{one} और {two} का योग {total} है।")
    return [capital(s) for s in sentences]


def towns(language: Language, rng: random.Random) -> list[str]:
    """Where a town is, who lives there, and the weather of a day."""
    place, day, weather = rng.choice(lx.PLACES), rng.choice(lx.DAYS), rng.choice(lx.WEATHER)
    town, country = place.word(language), lx.COUNTRIES[place.country].word(language)
    residents: list[Person] = [p for p in people() if p.home == place]
    who = [say(p, "home", language, rng) for p in rng.sample(residents, min(2, len(residents)))]
    if language == "en":
        return [f"{town} is a city in {country}.", *who, f"{weather.en} in {town} on {day.en}."]
    if language == "sw":
        return [f"{town} ni mji ulioko {country}.", *who, f"{weather.sw} {town} siku ya {day.sw}."]
    return [f"{town} {country} का एक शहर है।", *who, f"{day.hi} को {town} में {weather.hi}।"]


def capital(sentence: str) -> str:
    """First letter in upper case; Devanagari has none and stays."""
    return sentence[0].upper() + sentence[1:]


Writer = Callable[[Language, random.Random], list[str]]
# Profiles stand three times: facts about people are what a reader of the raw text should come to know.
WRITERS: tuple[Writer, ...] = (
    profile, profile, profile, household, household, market, encounter, animals, friends, shopping, kinds, sums, towns,
)  # fmt: skip


def document(language: Language, rng: random.Random) -> str:
    """One document of two to eight sentences."""
    return " ".join(rng.choice(WRITERS)(language, rng))
