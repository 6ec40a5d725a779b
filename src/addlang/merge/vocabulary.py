"""Which row of an embedding stands for which token, and how rows of one model are found in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from addlang.errors import AddlangError
from addlang.models import TOKENIZER_FILES, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

Vocabulary = Mapping[str, int]


def read_vocabulary(directory: Path) -> dict[str, int] | None:
    """Token -> row, with added tokens; None if there is no tokenizer in the directory."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return dict(load_tokenizer(directory).get_vocab())


def special_tokens(directory: Path) -> dict[str, int]:
    """The tokens that control the model (end of sequence, turns of a chat): text never contains them."""
    tokenizer = load_tokenizer(directory)
    marked = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return marked | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def differing(first: Vocabulary, second: Vocabulary) -> list[str]:
    """Tokens that have another row in, or are missing from, one of the two; in order of their rows."""
    odd = [t for t in first.keys() | second.keys() if first.get(t) != second.get(t)]
    return sorted(odd, key=lambda t: (first.get(t, second.get(t, 0)), t))


def row_map(out: Vocabulary, rows: int, other: Vocabulary, other_rows: int) -> Tensor:
    """[rows] the row in ``other`` of each row of ``out``; -1 where it has none. Rows without a token match by number."""
    import torch

    index = torch.full((rows,), -1, dtype=torch.int64)
    named, other_named = set(out.values()), set(other.values())
    for row in range(min(rows, other_rows)):
        if row not in named and row not in other_named:
            index[row] = row
    for token, row in out.items():
        if row < rows and (place := other.get(token, -1)) < other_rows:
            index[row] = place
    return index


def superset(vocabularies: Mapping[str, Vocabulary], preferred: Sequence[str]) -> str:
    """The model whose vocabulary has the tokens of all.

    Raises:
        AddlangError: none has; joining two tokenizers into one would change how both cut text.
    """
    for name in [*preferred, *vocabularies]:
        if all(set(v) <= set(vocabularies[name]) for v in vocabularies.values()):
            return name
    largest = max(vocabularies, key=lambda n: len(vocabularies[n]))
    other, lacking = next(
        (n, sorted(set(v) - set(vocabularies[largest])))
        for n, v in vocabularies.items()
        if not set(v) <= set(vocabularies[largest])
    )
    raise AddlangError(
        f"tokenizer union: no model's vocabulary contains all the others' ('{largest}' lacks {len(lacking):,} tokens of '{other}', "
        f"such as '{lacking[0]}'), and two tokenizers cannot be joined without changing how both cut text",
        f"name the model whose tokenizer the result is to have (--tokenizer {largest}); tokens only others have are then left out",
    )
