"""Files for recipes/small beside a base model that ``train.py`` made: text of the languages, conversations, held-out English.

    python benchmarks/base_model/study_data.py --data data.npz --corpus ../shared/corpus --output recipes/small/data

``data.npz`` is what ``prepare.py`` wrote: what it held out, no base model has seen. Written are

    LANGUAGE.jsonl      raw text to adapt to, at most ``--megabytes`` of each language
    chat.jsonl          English conversations that the base model was trained on, for scores and penalties
    english.jsonl       held-out English: prose, and conversations as text
    english-chat.jsonl  the same conversations as conversations
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import prepare
from streams import Prepared

CALIBRATION = 1000  # conversations
LANGUAGES = ("ha", "ig", "am", "ne", "ky")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    """The conversation that ``prepare.py`` has rendered."""
    user = prompt.removeprefix(prepare.USER).removesuffix(prepare.ASSISTANT).removesuffix(prepare.END)
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer.removesuffix(prepare.END)}]


def seen(data: Prepared, count: int) -> list[list[dict[str, str]]]:
    """Conversations of the training data, drawn with a fixed seed; without those that have a system prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.tokenizer)
    order = random.Random(0).sample(range(len(data.answers)), len(data.answers))
    found = []
    for c in order:
        ids = data.chat[data.starts[c] : data.starts[c + 1]].tolist()
        prompt, answer = (
            tokenizer.decode(part, skip_special_tokens=False)
            for part in (ids[: data.answers[c]], ids[data.answers[c] :])
        )
        if prompt.startswith(prepare.USER):
            found.append(turns(prompt, answer))
        if len(found) == count:
            break
    return found


def texts(corpus: Path, language: str, size: int) -> Iterable[str]:
    """Documents of a language in a fixed random order, together at most ``size`` bytes."""
    found = [row["text"] for file in prepare.files(corpus, "text", language) for row in prepare.read(file)]
    random.Random(0).shuffle(found)
    for text in found:
        size -= len(text.encode())
        if size < 0:
            return
        yield text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megabytes", type=float, default=2)
    given = parser.parse_args(argv)
    given.output.mkdir(parents=True, exist_ok=True)
    data = Prepared.load(given.data)
    for language in LANGUAGES:
        found = texts(given.corpus, language, int(given.megabytes * 1e6))
        write(given.output / f"{language}.jsonl", ({"text": text} for text in found))
    write(given.output / "chat.jsonl", ({"messages": m} for m in seen(data, CALIBRATION)))
    held = [turns(prompt, answer) for prompt, answer in data.heldout["chats"][:150]]
    prose = [{"text": text} for text in data.heldout["texts"]["en"]]
    write(given.output / "english.jsonl", [*prose, *({"text": f"{u['content']}\n{a['content']}"} for u, a in held)])
    write(given.output / "english-chat.jsonl", ({"messages": m} for m in held))


if __name__ == "__main__":
    main()
