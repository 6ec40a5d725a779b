"""Numbers as text: always with unit and, where there is one, interval. Plain ASCII; :func:`typeset` is for HTML."""

from __future__ import annotations

import math
import re

NO_INTERVAL = "(no interval)"

_METRICS = {
    "bits_per_byte": "bits per byte",
    "answer_bits_per_byte": "bits per byte of answers",
    "exact_match": "exact match",
    "acc": "accuracy",
    "acc_norm": "accuracy (length-normalised)",
    "chrf": "chrF",
}


def metric_name(metric: str) -> str:
    """``exact_match`` -> ``exact match``."""
    return _METRICS.get(metric, metric.replace("_", " "))


def percent(share: float, digits: int = 1) -> str:
    """0.9713 -> ``97.1 %``."""
    return f"{_zero(100 * share, digits)} %"


def value(x: float, unit: str) -> str:
    """A measured value with its unit; shares as per cent."""
    if unit == "share":
        return percent(x)
    return f"{_plain(x, unit)} {unit}".rstrip()


def interval(low: float | None, high: float | None, unit: str, signed: bool = False) -> str:
    """``[95.2, 99.0]`` in the unit's scale, or ``(no interval)``."""
    if low is None or high is None:
        return NO_INTERVAL
    return f"[{_plain(low, unit, signed)}, {_plain(high, unit, signed)}]"


def with_interval(x: float, low: float | None, high: float | None, unit: str) -> str:
    """``97.1 % [95.2, 99.0]``."""
    return f"{value(x, unit)} {interval(low, high, unit)}"


def difference(x: float, low: float | None, high: float | None, unit: str) -> str:
    """``+2.1 points [+0.4, +3.8]``; differences of shares are in percentage points."""
    name = "points" if unit == "share" else unit
    return f"{_plain(x, unit, True)} {name}".rstrip() + " " + interval(low, high, unit, True)


def change(x: float, low: float | None, high: float | None, unit: str) -> str:
    """As :func:`difference`, where the unit stands elsewhere (on an axis)."""
    shown = "" if low is None or high is None else " " + interval(low, high, unit, True)
    return _plain(x, unit, True) + shown


def relative(x: float | None, low: float | None, high: float | None) -> str:
    """``-31.0 % [-33.0, -29.0]``; a dash where the value before is 0."""
    if x is None:
        return "-"
    return f"{_plain(x, 'share', True)} % {interval(low, high, 'share', True)}"


def p_value(p: float | None) -> str:
    """``0.012``, ``< 0.001``; a dash where nothing was tested."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def integer(n: float | None) -> str:
    """``448,512``."""
    return "-" if n is None else f"{round(n):,}"


def scientific(x: float) -> str:
    """``5e-5``, ``1.2e-3``: as learning rates are written."""
    mantissa, _, exponent = f"{x:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def language_name(code: str) -> str:
    """English name of a language, or the code itself where addlang does not know it."""
    return _LANGUAGES.get(code.split("_")[0].split("-")[0].lower(), code)


def typeset(text: str) -> str:
    """True minus signs, and no line break between number and unit."""
    text = re.sub(r"(?<![\w.)])-(?=[\d.]*\d)", "\u2212", text)
    text = re.sub(r"(?<=\de)-(?=\d)", "\u2212", text)  # unlike a hyphen it is no place for a line break
    return re.sub(r"(?<=[\d)\]]) (?=%|points\b|bits/byte\b)", "\u00a0", text)


def _plain(x: float, unit: str, signed: bool = False) -> str:
    if unit == "share":
        text = _zero(100 * x, 1)
    elif unit in ("bits/byte", "nats/token"):
        text = _zero(x, 3)
    else:
        digits = 0 if x == 0 else max(0, 3 - math.floor(math.log10(abs(x))) - 1)
        text = _zero(x, min(digits, 6))
    return f"+{text}" if signed and not text.startswith("-") and float(text) != 0 else text


def _zero(x: float, digits: int) -> str:
    """Fixed digits, without ``-0.0``."""
    text = f"{x:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


_LANGUAGES = {
    "und": "target language",
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "az": "Azerbaijani", "be": "Belarusian",
    "bg": "Bulgarian", "bn": "Bengali", "bo": "Tibetan", "bs": "Bosnian", "ca": "Catalan", "ceb": "Cebuano",
    "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish",
    "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic",
    "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer",
    "kn": "Kannada", "ko": "Korean", "ku": "Kurdish", "ky": "Kyrgyz", "la": "Latin", "lo": "Lao",
    "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mk": "Macedonian", "ml": "Malayalam",
    "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali",
    "nl": "Dutch", "no": "Norwegian", "ny": "Chichewa", "om": "Oromo", "or": "Odia", "pa": "Punjabi", "pl": "Polish",
    "ps": "Pashto", "pt": "Portuguese", "qu": "Quechua", "ro": "Romanian", "ru": "Russian", "rw": "Kinyarwanda",
    "sd": "Sindhi", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "sn": "Shona", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "st": "Sotho", "su": "Sundanese", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "ti": "Tigrinya", "tk": "Turkmen", "tl": "Tagalog",
    "tr": "Turkish", "tt": "Tatar", "ug": "Uyghur", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "wo": "Wolof", "xh": "Xhosa", "yi": "Yiddish", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
