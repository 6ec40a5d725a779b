"""Tokenizer and token streams of the small English base model, in one compressed file.

    python benchmarks/base_model/prepare.py --corpus ../shared/corpus --output data.npz

The file holds the tokenizer (byte-level BPE trained on English alone, so that other languages cost more tokens, as they do
in real models, but every language can be encoded), the stream of prose, the stream of conversations with its loss mask,
and held-out text of English and of the languages to be added. Nothing else is needed to train. Like any real English model
it meets a trace of other languages, but none of those to be added.

Public-domain and openly licensed prose, and the corpus's instructions, half of which are CC BY-NC; ``--noncommercial``
changes that.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANGUAGES = ("ha", "ig", "am", "ne", "ky")  # to be added later; only measured here
TRACE_LANGUAGES = ("de", "es", "fr", "ja", "ru")
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# One token ends turns and documents. There is none for the beginning: text stands after the end of what came before.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}
{%- elif message['role'] in ('user', 'system') -%}
<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{%- else -%}
{{ raise_exception('this model knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"  # digits alone; marks belong to their letters
HELDOUT_BYTES = 80_000  # of text per language
HELDOUT_CONVERSATIONS = 200
HELDOUT_SHARE = 0.005
TRACE = 0.01  # of the bytes of prose, in equal parts
BATCH = 2000
VERSION = 1

Row = dict[str, Any]


def read(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file, compressed with zstd or not."""
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
        return
    import zstandard

    with path.open("rb") as raw, zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw) as stream:
        yield from map(json.loads, io.TextIOWrapper(stream, encoding="utf-8"))


def files(corpus: Path, part: str, stem: str) -> list[Path]:
    """The file ``STEM.jsonl.zst``, or ``STEM.01.jsonl.zst`` and so on in order."""
    found = sorted([*(corpus / part).glob(f"{stem}.jsonl*"), *(corpus / part).glob(f"{stem}.[0-9]*.jsonl*")])
    if not found:
        raise SystemExit(f"there is no {part}/{stem}.jsonl.zst in '{corpus}'")
    return found


def conversation(row: Row) -> tuple[str, str]:
    """The user's turn and the answer, as addlang reads rows of instructions."""
    user = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return f"{USER}{user}{END}{ASSISTANT}", f"{row['output']}{END}"


def is_heldout(text: str) -> bool:
    """By content, so that the choice depends on neither order nor size of the corpus."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < HELDOUT_SHARE * 2**64


def make_tokenizer(texts: Iterator[str], vocabulary: int) -> Any:
    """Byte-level BPE trained on ``texts``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core


def encode(core: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids, in parallel batches; text is never read as special tokens."""
    for at in range(0, len(texts), BATCH):
        for encoding in core.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False):
            yield encoding.ids


def without_specials(text: str) -> str:
    """Text in which nothing can be taken for a special token."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, token.replace("|", ""))
    return text


def prepare(corpus: Path, output: Path, *, vocabulary: int, noncommercial: str, limit: int | None = None) -> Row:
    """Write the file; see the module.

    Args:
        corpus: with the folders ``english``, ``instructions`` and ``text``.
        output: ``.npz`` file.
        vocabulary: tokens, at most 65,536.
        noncommercial: ``none``, ``instructions`` or ``all``: where text under non-commercial terms is used.
        limit: rows per file, for tests.

    Returns:
        What the file says about itself.
    """
    started = time.monotonic()
    licences: dict[str, Counter[str]] = {
        "prose": Counter(),
        "trace": Counter(),
        "instructions": Counter(),
    }

    def rows(paths: Sequence[Path]) -> Iterator[Row]:
        for path in paths:
            for i, row in enumerate(read(path)):
                if i == limit:
                    break
                yield row

    classes = ["en_public_domain", "en_open_licence", *(["en_noncommercial"] if noncommercial == "all" else [])]
    prose_files = [path for name in classes for path in files(corpus, "english", name)]
    prose, heldout_prose = [], []
    for row in rows(prose_files):
        text = without_specials(row["text"])
        if is_heldout(text):
            heldout_prose.append(text)
        else:
            licences["prose"][row["license"]] += len(text.encode())
            prose.append(text)
    trace = []
    room = TRACE / len(TRACE_LANGUAGES) * licences["prose"].total()
    for language in TRACE_LANGUAGES:
        size = 0
        for row in rows(files(corpus, "text", language)):
            text = without_specials(row["text"])
            size += len(text.encode())
            if size > room:
                break
            licences["trace"][row["license"]] += len(text.encode())
            trace.append(text)
    chats, heldout_chats = [], []
    for row in rows(files(corpus, "instructions", "en_instructions")):
        if noncommercial == "none" and "NC" in row["license"]:
            continue
        row = {k: without_specials(v) if isinstance(v, str) else v for k, v in row.items()}
        chat = conversation(row)
        if is_heldout("".join(chat)):
            heldout_chats.append(chat)
        else:
            licences["instructions"][row["license"]] += len("".join(chat).encode())
            chats.append(chat)
    others = {language: [r["text"] for r in rows(files(corpus, "text", language))] for language in LANGUAGES}
    heldout = {"en": cut(heldout_prose), **{language: cut(texts) for language, texts in others.items()}}
    say(f"{len(prose):,} documents and {len(chats):,} conversations read")

    sample = (text for i, texts in enumerate((prose, ["\n".join(c) for c in chats])) for text in texts[:: 2 - i])
    core = make_tokenizer(sample, vocabulary)
    end, assistant = core.token_to_id(END), core.token_to_id(ASSISTANT)
    say(f"tokenizer of {core.get_vocab_size():,} tokens trained")
    stream = array("H")
    mixed = prose + trace
    random.Random(0).shuffle(mixed)
    for ids in encode(core, mixed):
        stream.extend(ids)
        stream.append(end)
    say(f"{len(stream):,} tokens of prose")
    chat_stream, starts, answers = array("H"), array("I"), array("H")
    for ids in encode(core, ["".join(chat) for chat in chats]):
        starts.append(len(chat_stream))
        answers.append(ids.index(assistant) + 1)  # tokens before the answer
        chat_stream.extend(ids)
    say(f"{len(chat_stream):,} tokens of conversations")
    facts = {
        "version": VERSION,
        "vocabulary": core.get_vocab_size(),
        "noncommercial": noncommercial,
        "prose": {"documents": len(prose), "tokens": len(stream), "bytes_by_licence": dict(licences["prose"])},
        "trace": {
            "languages": TRACE_LANGUAGES,
            "documents": len(trace),
            "bytes_by_licence": dict(licences["trace"]),
            "tokens": "among those of prose",
        },
        "instructions": {
            "conversations": len(chats),
            "tokens": len(chat_stream),
            "bytes_by_licence": dict(licences["instructions"]),
        },
        "bytes_per_token": {
            language: round(
                sum(len(t.encode()) for t in texts) / max(1, sum(len(ids) for ids in encode(core, texts))), 3
            )
            for language, texts in heldout.items()
        },
    }
    save(
        output,
        prose=np.frombuffer(stream, np.uint16),
        chat=np.frombuffer(chat_stream, np.uint16),
        starts=np.frombuffer(starts, np.uint32),
        answers=np.frombuffer(answers, np.uint16),
        tokenizer=as_bytes(core.to_str()),
        heldout=as_bytes(json.dumps({"texts": heldout, "chats": heldout_chats[:HELDOUT_CONVERSATIONS]})),
        facts=as_bytes(json.dumps(facts)),
    )
    say(f"{output}: {output.stat().st_size / 2**20:.1f} MiB in {time.monotonic() - started:.0f} s")
    return facts


def cut(texts: Sequence[str]) -> list[str]:
    """The first texts, about ``HELDOUT_BYTES`` of them."""
    kept: list[str] = []
    size = 0
    for text in texts:
        if size >= HELDOUT_BYTES:
            break
        kept.append(text)
        size += len(text.encode())
    return kept


def as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def save(output: Path, **arrays: NDArray[Any]) -> None:
    """Complete or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, output)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--noncommercial",
        choices=("none", "instructions", "all"),
        default="instructions",
        help="where text under non-commercial terms is used (default: instructions, not prose)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="rows per file, to try it out")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments().parse_args(argv)
    if not 300 <= given.vocabulary <= 65536:
        raise SystemExit("--vocabulary must be between 300 and 65536")
    prepare(
        given.corpus,
        given.output,
        vocabulary=given.vocabulary,
        noncommercial=given.noncommercial,
        limit=given.limit,
    )


if __name__ == "__main__":
    main()
