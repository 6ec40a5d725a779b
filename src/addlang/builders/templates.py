"""Instructions that ask for a translation, and what else the demonstrations say. Written for addlang.

``{source}`` and ``{target}`` are names of languages, ``{text}`` is the sentence.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from string import Formatter

from addlang.errors import AddlangError

TRANSLATE = (
    "Translate the following {source} sentence into {target}.\n\n{text}",
    "Translate from {source} to {target}: {text}",
    "{text}\n\nHow would you say this in {target}?",
    "What is the {target} translation of this {source} text?\n{text}",
    "Please put this into {target}:\n\n{text}",
    "Give me the {target} version of the sentence below.\n\n{text}",
    "{source}: {text}\n{target}:",
    'Here is a sentence in {source}. Write the same in {target}.\n\n"{text}"',
    'I need this in {target}: "{text}"',
    "Render the text into natural {target}.\n\n{text}",
    "You are a translator working from {source} into {target}. Your text is:\n{text}",
    "Can you translate what follows to {target}, please?\n\n{text}",
    "Say it in {target}.\n\n{text}",
    "A friend of mine only reads {target}. How do I tell them this?\n\n{text}",
    "Text ({source}):\n{text}\n\nTranslation ({target}):",
    "Convert this {source} sentence to {target}, keeping its meaning.\n\n{text}",
    "Write down in {target} what this {source} sentence says.\n\n{text}",
    '"{text}"\n\nThe above is {source}. What does it say in {target}?',
    "Task: translation. From: {source}. To: {target}.\nInput: {text}",
    "Could you help me with some {target}? I would like to say: {text}",
    "The next line is written in {source}; repeat it in {target}.\n{text}",
    "Please translate into {target} and add nothing else.\n\n{text}",
    "How does one express the following in {target}?\n\n{text}",
    "Provide an accurate {target} translation for:\n\n{text}",
    "I found this {source} text: {text}\n\nWhat would it be in {target}?",
    "Turn the {source} below into {target}.\n---\n{text}\n---",
    "For a {target} newspaper, translate this sentence from {source}.\n\n{text}",
    "{text}\n\nTranslate the text above into {target}.",
    "My {target} is poor. Please write this for me in {target}: {text}",
    "Take this {source} sentence and make it a {target} one: {text}",
    "Reply with the {target} equivalent of the following.\n\n{text}",
    "Which {target} sentence means the same as this {source} one?\n\n{text}",
    "Explain to someone who speaks {target} only what is written here, word for word:\n\n{text}",
    "Subtitle in {source}: {text}\nSubtitle in {target}:",
    "Translation exercise. Put into {target}: {text}",
    "Read this ({source}) and write it again in {target}:\n{text}",
)

THEN_ANSWER = (
    "{prompt}\n\n(Translate this into {pivot} first, then answer in {target}.)",
    "First say in {pivot} what I am asking, then answer it in {target}.\n\n{prompt}",
    "{prompt}\n\nBefore you answer in {target}, write the question in {pivot}.",
    "Work in two steps: put the request into {pivot}, then reply to it in {target}.\n\n{prompt}",
    "{prompt}\n\nGive the {pivot} translation of this, and below it your answer in {target}.",
    "Please translate my request to {pivot} and then carry it out in {target}.\n\n{prompt}",
)

BOTH = (
    "{prompt}\n\n(Answer in {pivot} first, then in {target}.)",
    "Answer twice, first in {pivot}, then in {target}.\n\n{prompt}",
    "{prompt}\n\nPlease reply in {pivot}, and then say the same in {target}.",
    "I would like your answer in {pivot}, followed by its {target} version.\n\n{prompt}",
    "{prompt}\n\nGive me the {pivot} answer, and below it the {target} one.",
    "Think and answer in {pivot}; after that, answer in {target}.\n\n{prompt}",
)

IN_PIVOT = (
    "{prompt}\n\n(Answer in {pivot} for now.)",
    "Answer in {pivot}, please.\n\n{prompt}",
    "{prompt}\n\nIn {pivot} first, please.",
)

NOW_IN_TARGET = (
    "Now the same in {target}, please.",
    "Thank you. How would that be in {target}?",
    "And in {target}?",
    "Please say this in {target} too.",
    "Now answer me in {target}.",
)


def check_fields(text: str, known: Collection[str], required: str | None, where: str) -> None:
    """Refuse a template with another field in braces, or without the required one.

    Raises:
        AddlangError: naming ``where`` it stands.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise AddlangError(f"{where}: {error}", "write braces that are no field twice: {{ and }}") from None
    shown = ", ".join(f"{{{name}}}" for name in known)
    if unknown := sorted(fields - set(known)):
        raise AddlangError(f"{where}: unknown field {{{unknown[0]}}}", f"fields are {shown}; write other braces twice")
    if required is not None and required not in fields:
        raise AddlangError(f"{where}: there is no {{{required}}}", f"fields are {shown}")


def read_templates(path: Path, known: Collection[str], required: str) -> tuple[str, ...]:
    r"""Templates of one's own, one per line; ``\n`` in them stands for a line end.

    Raises:
        AddlangError: an unknown field or a missing one, with the row; no templates.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AddlangError(f"templates '{path}' cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            check_fields(line, known, required, f"{path}, row {number}")
            found.append(line.replace("\\n", "\n"))
    if not found:
        raise AddlangError(f"{path}: there are no templates in it")
    return tuple(found)
