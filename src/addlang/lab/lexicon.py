"""The words of the lab world in English, Swahili and Hindi, with the grammar its sentences need.

Swahili: counted nouns carry the concord of their class (``wa`` animate, ``ma`` class 6, ``vi`` 8, ``mi`` 4, ``n`` 10).
Hindi: nouns carry their gender, plural and oblique form; adjectives in -ा agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "sw", "hi"]
LANGUAGES: tuple[Language, ...] = ("en", "sw", "hi")


@dataclass(frozen=True)
class Noun:
    """A countable noun. ``concord``: Swahili agreement of its plural; ``link``: that of its singular (shati *la*)."""

    en: str
    en_plural: str
    sw: str
    sw_plural: str
    concord: str
    link: str
    hi: str
    hi_plural: str
    hi_oblique: str
    hi_gender: Literal["m", "f"]

    def word(self, language: Language) -> str:
        """Singular, as in a dictionary."""
        return {"en": self.en, "sw": self.sw, "hi": self.hi}[language]

    def plural(self, language: Language) -> str:
        return {"en": self.en_plural, "sw": self.sw_plural, "hi": self.hi_plural}[language]


@dataclass(frozen=True)
class Animal:
    noun: Noun
    eats: str
    lives: str


@dataclass(frozen=True)
class Name:
    """A person; ``gender`` drives English pronouns and Hindi verbs."""

    en: str
    hi: str
    gender: Literal["m", "f"]

    def word(self, language: Language) -> str:
        return self.hi if language == "hi" else self.en


@dataclass(frozen=True)
class Word:
    """A word without inflection that matters here."""

    en: str
    sw: str
    hi: str

    def word(self, language: Language) -> str:
        return {"en": self.en, "sw": self.sw, "hi": self.hi}[language]


@dataclass(frozen=True)
class Colour(Word):
    """``sw_phrase`` is "the colour red": an adjective agrees with ``rangi``, a noun is linked by ``ya``."""

    sw_phrase: str

    def hindi(self, gender: Literal["m", "f"], plural: bool = False) -> str:
        """The adjective, agreeing with a noun in the direct case."""
        if not self.hi.endswith("ा"):
            return self.hi
        return self.hi[:-1] + ("ी" if gender == "f" else "े" if plural else "ा")


@dataclass(frozen=True)
class Job(Word):
    hi_feminine: str

    def hindi(self, gender: Literal["m", "f"]) -> str:
        return self.hi_feminine if gender == "f" else self.hi


@dataclass(frozen=True)
class Place:
    en: str
    hi: str
    country: str

    def word(self, language: Language) -> str:
        return self.hi if language == "hi" else self.en


def _nouns(table: str) -> tuple[Noun, ...]:
    """Columns: en, plural, sw, plural, concord, link, hi, plural, oblique, gender."""
    rows = [line.split() for line in table.strip().splitlines()]
    return tuple(Noun(*row) for row in rows)  # type: ignore[arg-type]


_ANIMAL_NOUNS = _nouns("""
cat      cats      paka     paka     wa wa  बिल्ली   बिल्लियाँ  बिल्ली   f
dog      dogs      mbwa     mbwa     wa wa  कुत्ता   कुत्ते     कुत्ते    m
cow      cows      ng'ombe  ng'ombe  wa wa  गाय     गायें     गाय     f
goat     goats     mbuzi    mbuzi    wa wa  बकरी    बकरियाँ   बकरी    f
sheep    sheep     kondoo   kondoo   wa wa  भेड़     भेड़ें      भेड़     f
horse    horses    farasi   farasi   wa wa  घोड़ा    घोड़े      घोड़े     m
donkey   donkeys   punda    punda    wa wa  गधा     गधे       गधे      m
chicken  chickens  kuku     kuku     wa wa  मुर्गी   मुर्गियाँ   मुर्गी   f
duck     ducks     bata     bata     wa wa  बतख     बतखें     बतख     f
rabbit   rabbits   sungura  sungura  wa wa  खरगोश   खरगोश    खरगोश   m
camel    camels    ngamia   ngamia   wa wa  ऊँट     ऊँट       ऊँट      m
bird     birds     ndege    ndege    wa wa  चिड़िया  चिड़ियाँ   चिड़िया  f
fish     fish      samaki   samaki   wa wa  मछली    मछलियाँ   मछली    f
lion     lions     simba    simba    wa wa  शेर     शेर       शेर      m
elephant elephants tembo    tembo    wa wa  हाथी    हाथी      हाथी     m
monkey   monkeys   tumbili  tumbili  wa wa  बंदर    बंदर      बंदर     m
giraffe  giraffes  twiga    twiga    wa wa  जिराफ़   जिराफ़     जिराफ़    m
""")
_EATS = (
    *("fish", "meat", "grass", "leaves", "grass", "grass", "grass", "grain", "grain", "leaves", "leaves"),
    *("insects", "insects", "meat", "leaves", "fruit", "leaves"),
)
_LIVES = (
    *("house", "house", "farm", "farm", "farm", "farm", "farm", "farm", "water", "farm", "desert"),
    *("forest", "water", "wild", "wild", "forest", "wild"),
)
ANIMALS = tuple(Animal(noun, eats, lives) for noun, eats, lives in zip(_ANIMAL_NOUNS, _EATS, _LIVES, strict=True))
PETS = ANIMALS[:12]

DIETS = {
    "fish": Word("fish", "samaki", "मछली"),
    "meat": Word("meat", "nyama", "मांस"),
    "grass": Word("grass", "nyasi", "घास"),
    "leaves": Word("leaves", "majani", "पत्ते"),
    "grain": Word("grain", "nafaka", "अनाज"),
    "insects": Word("insects", "wadudu", "कीड़े"),
    "fruit": Word("fruit", "matunda", "फल"),
}
HABITATS = {
    "house": Word("in the house", "nyumbani", "घर में"),
    "farm": Word("on the farm", "shambani", "खेत पर"),
    "water": Word("in the water", "majini", "पानी में"),
    "desert": Word("in the desert", "jangwani", "रेगिस्तान में"),
    "forest": Word("in the forest", "msituni", "जंगल में"),
    "wild": Word("in the wild", "porini", "वन में"),
}

FRUITS = _nouns("""
mango     mangoes    embe     maembe    ma la आम      आम      आम      m
banana    bananas    ndizi    ndizi     n  ya केला     केले     केले     m
orange    oranges    chungwa  machungwa ma la संतरा    संतरे    संतरे    m
pineapple pineapples nanasi   mananasi  ma la अनानास   अनानास   अनानास   m
papaya    papayas    papai    mapapai   ma la पपीता    पपीते    पपीते    m
lemon     lemons     limau    malimau   ma la नींबू     नींबू     नींबू     m
apple     apples     tofaa    matofaa   ma la सेब      सेब      सेब      m
coconut   coconuts   nazi     nazi      n  ya नारियल   नारियल   नारियल   m
guava     guavas     pera     mapera    ma la अमरूद    अमरूद    अमरूद    m
""")
VEGETABLES = _nouns("""
potato   potatoes   kiazi    viazi     vi cha आलू      आलू        आलू      m
tomato   tomatoes   nyanya   nyanya    n  ya  टमाटर    टमाटर      टमाटर    m
onion    onions     kitunguu vitunguu  vi cha प्याज़     प्याज़       प्याज़     m
carrot   carrots    karoti   karoti    n  ya  गाजर     गाजरें      गाजर     f
cabbage  cabbages   kabichi  kabichi   n  ya  पत्तागोभी पत्तागोभियाँ पत्तागोभी f
pumpkin  pumpkins   boga     maboga    ma la  कद्दू     कद्दू       कद्दू     m
""")
FOODS = (*FRUITS, *VEGETABLES)
CLOTHES = _nouns("""
shirt  shirts  shati  mashati ma la कमीज़  कमीज़ें  कमीज़  f
hat    hats    kofia  kofia   n  ya टोपी   टोपियाँ टोपी   f
dress  dresses gauni  magauni ma la पोशाक  पोशाकें पोशाक  f
coat   coats   koti   makoti  ma la कोट    कोट    कोट    m
shoe   shoes   kiatu  viatu   vi cha जूता   जूते    जूते    m
sock   socks   soksi  soksi   n  ya मोज़ा   मोज़े    मोज़े    m
""")
OBJECTS = _nouns("""
table  tables  meza    meza      n  ya  मेज़     मेज़ें    मेज़     f
chair  chairs  kiti    viti      vi cha कुर्सी   कुर्सियाँ कुर्सी   f
book   books   kitabu  vitabu    vi cha किताब   किताबें  किताब   f
cup    cups    kikombe vikombe   vi cha प्याला  प्याले   प्याले   m
lamp   lamps   taa     taa       n  ya  दीपक    दीपक    दीपक    m
knife  knives  kisu    visu      vi cha चाकू    चाकू    चाकू    m
ball   balls   mpira   mipira    mi wa  गेंद     गेंदें    गेंद     f
basket baskets kikapu  vikapu    vi cha टोकरी   टोकरियाँ टोकरी   f
""")

COLOURS = (
    Colour("red", "nyekundu", "लाल", "rangi nyekundu"),
    Colour("white", "nyeupe", "सफ़ेद", "rangi nyeupe"),
    Colour("black", "nyeusi", "काला", "rangi nyeusi"),
    Colour("green", "kijani", "हरा", "rangi ya kijani"),
    Colour("blue", "buluu", "नीला", "rangi ya buluu"),
    Colour("yellow", "manjano", "पीला", "rangi ya manjano"),
    Colour("brown", "kahawia", "भूरा", "rangi ya kahawia"),
    Colour("pink", "waridi", "गुलाबी", "rangi ya waridi"),
    Colour("purple", "zambarau", "बैंगनी", "rangi ya zambarau"),
    Colour("grey", "kijivu", "स्लेटी", "rangi ya kijivu"),
)

JOBS = (
    Job("farmer", "mkulima", "किसान", "किसान"),
    Job("teacher", "mwalimu", "अध्यापक", "अध्यापिका"),
    Job("doctor", "daktari", "डॉक्टर", "डॉक्टर"),
    Job("driver", "dereva", "ड्राइवर", "ड्राइवर"),
    Job("tailor", "mshonaji", "दर्ज़ी", "दर्ज़ी"),
    Job("carpenter", "seremala", "बढ़ई", "बढ़ई"),
    Job("cook", "mpishi", "बावर्ची", "बावर्ची"),
    Job("nurse", "muuguzi", "नर्स", "नर्स"),
    Job("trader", "mfanyabiashara", "व्यापारी", "व्यापारी"),
    Job("singer", "mwimbaji", "गायक", "गायिका"),
    Job("pilot", "rubani", "पायलट", "पायलट"),
    Job("student", "mwanafunzi", "छात्र", "छात्रा"),
)

COUNTRIES = {
    "Kenya": Word("Kenya", "Kenya", "केन्या"),
    "Tanzania": Word("Tanzania", "Tanzania", "तंज़ानिया"),
    "India": Word("India", "India", "भारत"),
}
PLACES = (
    Place("Nairobi", "नैरोबी", "Kenya"),
    Place("Mombasa", "मोम्बासा", "Kenya"),
    Place("Kisumu", "किसुमू", "Kenya"),
    Place("Nakuru", "नाकुरू", "Kenya"),
    Place("Arusha", "अरुशा", "Tanzania"),
    Place("Dodoma", "डोडोमा", "Tanzania"),
    Place("Tanga", "टांगा", "Tanzania"),
    Place("Mwanza", "म्वांज़ा", "Tanzania"),
    Place("Delhi", "दिल्ली", "India"),
    Place("Mumbai", "मुंबई", "India"),
    Place("Pune", "पुणे", "India"),
    Place("Jaipur", "जयपुर", "India"),
)

_NAMES = """
Amina आमिना f, Juma जुमा m, Asha आशा f, Ravi रवि m, Tom टॉम m, Mary मैरी f, John जॉन m, Sara सारा f, Musa मूसा m,
Neema नीमा f, Baraka बराका m, Zawadi ज़वादी f, Omari ओमारी m, Fatma फ़ातमा f, Gita गीता f, Arjun अर्जुन m, Meera मीरा f,
Leela लीला f, Mohan मोहन m, Sita सीता f, Hamisi हमीसी m, Rehema रेहेमा f, Daudi दाऊदी m, Anna अन्ना f, Peter पीटर m,
Grace ग्रेस f, Paul पॉल m, Rosa रोज़ा f, Vikram विक्रम m, Anita अनीता f, Salim सलीम m, Kamau कमाऊ m, Wanjiru वंजीरू f,
Otieno ओटिएनो m, Nisha निशा f, Rahul राहुल m, Priya प्रिया f, David डेविड m, Emma एमा f, Samuel सैमुएल m
"""
NAMES = tuple(Name(*entry.split()) for entry in _NAMES.split(","))  # type: ignore[arg-type]

DAYS = (
    Word("Monday", "Jumatatu", "सोमवार"),
    Word("Tuesday", "Jumanne", "मंगलवार"),
    Word("Wednesday", "Jumatano", "बुधवार"),
    Word("Thursday", "Alhamisi", "गुरुवार"),
    Word("Friday", "Ijumaa", "शुक्रवार"),
    Word("Saturday", "Jumamosi", "शनिवार"),
    Word("Sunday", "Jumapili", "रविवार"),
)
WEATHER = (
    Word("It was hot", "Kulikuwa na joto", "बहुत गर्मी थी"),
    Word("It was cold", "Kulikuwa na baridi", "बहुत ठंड थी"),
    Word("It rained", "Mvua ilinyesha", "बारिश हुई"),
    Word("There was strong wind", "Kulikuwa na upepo mkali", "तेज़ हवा चली"),
)

_ENGLISH_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty"""
_SWAHILI_NUMBERS = "sifuri moja mbili tatu nne tano sita saba nane tisa kumi"
_HINDI_NUMBERS = """शून्य एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस बीस"""
NUMBERS: dict[Language, tuple[str, ...]] = {
    "en": tuple(_ENGLISH_NUMBERS.split()),
    "sw": (
        *_SWAHILI_NUMBERS.split(),
        *(f"kumi na {n}" for n in _SWAHILI_NUMBERS.split()[1:10]),
        "ishirini",
    ),
    "hi": tuple(_HINDI_NUMBERS.split()),
}
_SWAHILI_COUNTS = {
    "wa": ("wawili", "watatu", "wanne", "watano"),
    "ma": ("mawili", "matatu", "manne", "matano"),
    "vi": ("viwili", "vitatu", "vinne", "vitano"),
    "mi": ("miwili", "mitatu", "minne", "mitano"),
    "n": ("mbili", "tatu", "nne", "tano"),
}

CATEGORIES: dict[str, tuple[Word, tuple[Noun | Colour, ...]]] = {
    "animal": (Word("animal", "mnyama", "जानवर"), tuple(a.noun for a in ANIMALS)),
    "fruit": (Word("fruit", "tunda", "फल"), FRUITS),
    "vegetable": (Word("vegetable", "mboga", "सब्ज़ी"), VEGETABLES),
    "clothing": (Word("clothing", "vazi", "कपड़ा"), CLOTHES),
    "colour": (Word("colour", "rangi", "रंग"), COLOURS),
}
_LISTED: tuple[Noun | Colour, ...] = (*(a.noun for a in ANIMALS), *FOODS, *CLOTHES, *OBJECTS, *COLOURS)
LIST_WORDS: dict[Language, tuple[str, ...]] = {
    language: tuple(word.word(language) for word in _LISTED) for language in LANGUAGES
}


def article(word: str) -> str:
    """The English indefinite article with its word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def counted(noun: Noun, count: int, language: Language) -> str:
    """``count`` (2 to 9) of a noun, in words: "three goats", "mbuzi watatu", "तीन बकरियाँ"."""
    if language == "sw":
        number = _SWAHILI_COUNTS[noun.concord][count - 2] if count <= 5 else NUMBERS["sw"][count]
        return f"{noun.sw_plural} {number}"
    return f"{NUMBERS[language][count]} {noun.plural(language)}"


def masculine_or_feminine(gender: Literal["m", "f"], masculine: str, feminine: str) -> str:
    return feminine if gender == "f" else masculine
