"""Translation-following demonstrations, as in x-LLM and CrossAlpaca: parallel sentences put into many instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from addlang.builders.parallel import Pair
from addlang.builders.templates import TRANSLATE
from addlang.data.similar import content_hash

Direction = Literal["both", "forward", "backward", "each"]


def demonstrations(
    pairs: Iterable[Pair],
    *,
    languages: tuple[str, str],
    names: tuple[str, str],
    direction: Direction = "both",
    templates: Sequence[str] = TRANSLATE,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Conversations that ask for a translation and give it.

    Template and, for ``each``, direction depend on the pair's own text and the seed, so that adding pairs changes no others.

    Args:
        languages, names: ISO 639 codes and names of source and target.
        direction: ``both``: every pair twice; ``forward``: source to target; ``backward``; ``each``: every pair once, half
            of them in each direction.
        templates: with ``{source}``, ``{target}`` and ``{text}``.
    """
    for pair in pairs:
        ways = {"both": (0, 1), "forward": (0,), "backward": (1,)}.get(direction)
        drawn = content_hash(pair.source + "\0" + pair.target, seed)
        for way in ways if ways is not None else (drawn % 2,):
            number = (drawn // 2 + 7 * way) % len(templates)  # the two directions of a pair are asked for differently
            text, translation = (pair.source, pair.target)[:: -1 if way else 1]
            source, target = names[:: -1 if way else 1]
            ask = templates[number].format(source=source, target=target, text=text.strip())
            codes = languages[:: -1 if way else 1]
            yield {
                "messages": [
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": translation.strip()},
                ],
                "task": "translation",
                "direction": f"{codes[0]}-{codes[1]}",
                "language": codes[1],
                "template": number,
                "from": {"file": Path(pair.file).name, "row": pair.row},
                **({"license": pair.license} if pair.license else {}),
            }
