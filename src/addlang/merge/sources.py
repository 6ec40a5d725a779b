"""The models of a merge as they lie on disk: compared before anything is read, then read a few rows at a time."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError, AddlangWarning
from addlang.merge.layout import Layout, layout_of, stored_names
from addlang.merge.settings import Setting, value_at
from addlang.merge.vocabulary import differing, read_vocabulary, row_map, superset
from addlang.models import Checkpoint, ParamInfo, resolve

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

BLOCK = 1 << 20  # elements of one tensor that are held at once (4 MiB in fp32), of each model
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of an element, by the type's name in safetensors
MUST_AGREE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
MAY_DIFFER = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id",
    "initializer_range", "pad_token_id", "resid_pdrop", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


class Source:
    """One model directory.

    Attributes:
        rows: [rows of the result] its row of embedding and head for each of the result's, -1 where it has none; None where
            they are the same.
    """

    def __init__(self, name: str, directory: Path | None = None) -> None:
        self.name = name
        self.directory = directory or find(name)
        self.checkpoint = Checkpoint(self.directory)
        for tensor, (kind, _) in self.checkpoint.header.items():
            if kind not in SIZES:
                raise AddlangError(
                    f"'{tensor}' of {self.directory} is of type {kind}, which cannot be merged",
                    "use an unquantised checkpoint",
                )
        self.layout: Layout = layout_of(self.directory)
        if self.layout.config.get("quantization_config"):
            raise AddlangError(
                f"{self.directory} is quantised, as its config.json says (quantization_config)",
                "use an unquantised checkpoint",
            )
        self.stored = {p: s for s, p in stored_names(self.checkpoint, self.layout).items()}
        self.rows: Tensor | None = None

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token -> row. Tokens that a tokenizer numbers beyond the embedding have none, and are not there."""
        found = read_vocabulary(self.directory)
        return None if found is None else {t: row for t, row in found.items() if row < self.layout.rows}

    def read(self, parameter: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter as stored; without the result's order of tokens."""
        return self.checkpoint.rows(self.stored[parameter], start, stop)

    def gather(self, parameter: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of embedding or head in the result's order of tokens, and which of them the model has."""
        assert self.rows is not None
        index = self.rows[start:stop]
        return self.checkpoint.get(self.stored[parameter])[index.clamp_min(0)], index >= 0


def find(name: str) -> Path:
    """Directory of a model: as :func:`addlang.models.resolve`, and ``owner/name@revision``."""
    if "@" in name and not Path(name).expanduser().exists():
        model, _, revision = name.rpartition("@")
        return resolve(model, revision)
    return resolve(name)


class Models:
    """The models of one merge, made comparable.

    Args:
        names: every model that is read.
        merged: those of them that must be alike (the others only lend single rows).
        stated: whose configuration, tokenizer and file layout the result gets.
        base: takes the place of a model that lacks a token; None: the mean of those that have it.
        tokenizer_source: None: all vocabularies must be the same; ``ids``: rows are matched by number; ``base``, ``union`` or
            a model: rows are matched by token.

    Raises:
        AddlangError: the models do not fit together; the message says in what and how to go on.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        merged: Sequence[str],
        stated: str,
        base: str | None = None,
        tokenizer_source: str | None = None,
        directories: Mapping[str, Path] | None = None,
    ) -> None:
        self.sources = {n: Source(n, (directories or {}).get(n)) for n in dict.fromkeys(names)}
        self.merged = list(dict.fromkeys(merged))
        self.base = base
        if tokenizer_source == "union":
            stated = superset(self._vocabularies(), [stated])
        elif tokenizer_source == "base":
            if base is None:
                raise AddlangError("tokenizer base: this merge has no base model", "name the model, or use union")
            stated = base
        elif tokenizer_source not in (None, "ids"):
            stated = str(tokenizer_source)
        self.stated = self.sources[stated]
        by_token = tokenizer_source not in (None, "ids")
        for name in self.merged:
            self._require_alike(self.sources[name], by_token)
        if by_token:
            self._map_rows()
        elif tokenizer_source is None:
            self._require_same_tokens()

    def __getitem__(self, name: str) -> Source:
        return self.sources[name]

    @property
    def layout(self) -> Layout:
        """Of the result."""
        return self.stated.layout

    def _vocabularies(self) -> dict[str, dict[str, int]]:
        found = {}
        for name in self.merged:
            vocabulary = self.sources[name].vocabulary
            if vocabulary is None:
                raise AddlangError(
                    f"{self.sources[name].directory} has no tokenizer, so its rows cannot be matched by token",
                    "put tokenizer.json beside config.json, or match rows by number with --tokenizer ids",
                )
            found[name] = vocabulary
        return found

    def _require_alike(self, other: Source, by_token: bool) -> None:
        """Same architecture; warns of settings that would be those of the stated model."""
        own, theirs = self.stated.layout, other.layout
        both = f"'{self.stated.name}' and '{other.name}'"
        for key in MUST_AGREE:
            if own.config.get(key) != theirs.config.get(key):
                fix = "merge models of one architecture"
                if key == "tie_word_embeddings":
                    fix = (
                        "untie the one that ties its head: load it, set config.tie_word_embeddings = False, "
                        "give lm_head a copy of the embedding, save it"
                    )
                raise AddlangError(
                    f"{both} cannot be merged: {key} is {own.config.get(key)!r} and {theirs.config.get(key)!r}", fix
                )
        odd = [n for n in [*own.shapes, *theirs.shapes] if own.shapes.get(n) != theirs.shapes.get(n)]
        vocabulary = {own.embedding, own.head}
        if shown := [n for n in dict.fromkeys(odd) if n not in vocabulary]:
            table = ", ".join(
                f"{n} ({own.shapes.get(n, 'absent')} and {theirs.shapes.get(n, 'absent')})" for n in shown[:4]
            )
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise AddlangError(
                f"{both} have tensors of other shapes: {table}{more}", "merge models of one architecture and size"
            )
        if odd and (not by_token or any(own.shapes[n][1:] != theirs.shapes[n][1:] for n in odd)):
            table = ", ".join(f"{n} ({own.shapes[n]} and {theirs.shapes[n]})" for n in dict.fromkeys(odd))
            raise AddlangError(
                f"{both} have embeddings of other sizes: {table}; nothing is cut off silently",
                f"match rows by token: --tokenizer union, or --tokenizer {self.stated.name} to keep that model's tokens only",
            )
        different = [
            k for k in sorted(own.config.keys() | theirs.config.keys()) if own.config.get(k) != theirs.config.get(k)
        ]
        if told := [k for k in different if k not in MAY_DIFFER]:
            values = ", ".join(f"{k} ({own.config.get(k)!r} and {theirs.config.get(k)!r})" for k in told)
            warnings.warn(
                f"{both} differ in {values}; the result has the former", AddlangWarning, stacklevel=2
            )  # fmt: skip

    def _require_same_tokens(self) -> None:
        first = self.stated
        for other in (self.sources[n] for n in self.merged):
            if other is first:
                continue
            if first.vocabulary is None or other.vocabulary is None:
                lacks = first if first.vocabulary is None else other
                warnings.warn(
                    f"{lacks.directory} has no tokenizer: that its rows stand for the same tokens is not checked",
                    AddlangWarning,
                    stacklevel=2,
                )
                continue
            if odd := differing(first.vocabulary, other.vocabulary):
                shown = ", ".join(
                    f"'{t}' ({first.vocabulary.get(t, 'absent')} and {other.vocabulary.get(t, 'absent')})"
                    for t in odd[:4]
                )
                raise AddlangError(
                    f"'{first.name}' and '{other.name}' have other tokens in the same rows: {len(odd):,} differ, such as {shown}",
                    f"match rows by token with --tokenizer union or --tokenizer {first.name}; "
                    "or, if only names of unused tokens differ, by number with --tokenizer ids",
                )

    def _map_rows(self) -> None:
        vocabularies = self._vocabularies()
        own = vocabularies[self.stated.name]
        for name in self.merged:
            source = self.sources[name]
            if source is not self.stated:
                source.rows = row_map(own, self.layout.rows, vocabularies[name], source.layout.rows)

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 where a merged model is stored in it."""
        import torch

        stored = {self.sources[n].checkpoint.dtype for n in self.merged}
        return torch.float64 if torch.float64 in stored else torch.float32

    def part(self, parameter: str, *, seed: int = 0, counts: Counter[str] | None = None) -> Part:
        """One parameter of the result, to be merged."""
        layout = self.layout
        counter = Counter() if counts is None else counts
        return Part(
            parameter,
            layout.kinds[parameter],
            layout.shapes[parameter],
            layout.position(parameter),
            seed,
            counter,
            self,
            self.compute_dtype,
        )

    def mapping(self) -> list[dict[str, Any]]:
        """What was done with tokens that not all models have."""
        out = []
        for name in self.merged:
            source = self.sources[name]
            if source.rows is not None and source.vocabulary is not None and self.stated.vocabulary is not None:
                lacking = int((source.rows < 0).sum())
                dropped = len(set(source.vocabulary) - set(self.stated.vocabulary))
                out.append({"model": name, "rows_it_lacks": lacking, "tokens_left_out": dropped})
        return out

    def block(self, parameter: str, start: int, stop: int, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """Rows start .. stop - 1 of the result's parameter in several models, in ``dtype``."""
        vocabulary = parameter in (self.layout.embedding, self.layout.head)
        if not vocabulary or all(self.sources[n].rows is None for n in self.merged):
            return [self.sources[n].read(parameter, start, stop).to(dtype) for n in names]
        filled = self._filled(parameter, start, stop, dtype)
        return [filled[n] for n in names]

    def _filled(self, parameter: str, start: int, stop: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Embedding rows of every merged model; a token it lacks gets the base's row, or the mean of those that have it."""
        import torch

        rows: dict[str, Tensor] = {}
        there: dict[str, Tensor] = {}
        for name in self.merged:
            source = self.sources[name]
            if source.rows is None:
                rows[name] = source.read(parameter, start, stop).to(dtype)
                there[name] = torch.ones(stop - start, dtype=torch.bool)
            else:
                found, there[name] = source.gather(parameter, start, stop)
                rows[name] = found.to(dtype)
        have = torch.stack([there[n] for n in self.merged]).to(dtype)
        values = torch.stack([rows[n] for n in self.merged])
        stand_in = (values * have[..., None]).sum(0) / have.sum(0)[:, None]
        if self.base is not None:
            stand_in = torch.where(there[self.base][:, None], rows[self.base], stand_in)
        return {n: torch.where(there[n][:, None], rows[n], stand_in) for n in self.merged}


@dataclass(frozen=True)
class Part:
    """One parameter of the result while it is merged.

    Attributes:
        name, info, shape: of the parameter.
        position: of its layer, from 0 to 1.
        counts: what happened how often, for the report.
    """

    name: str
    info: ParamInfo
    shape: tuple[int, ...]
    position: float
    seed: int
    counts: Counter[str]
    models: Models
    dtype: torch.dtype

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Rows that are read at a time."""
        rows = self.shape[0]
        size = 1
        for s in self.shape[1:]:
            size *= s
        step = max(1, BLOCK // size)
        for start in range(0, rows, step):
            yield start, min(rows, start + step)

    def blocks(self, *names: str) -> Iterator[tuple[Tensor, ...]]:
        """The parameter in these models, block by block."""
        for start, stop in self.ranges():
            yield tuple(self.models.block(self.name, start, stop, names, self.dtype))

    def rng(self, number: int = 0) -> np.random.Generator:
        """Generator of its own for every (seed, parameter, number)."""
        import numpy as np

        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        return np.random.default_rng([self.seed, key, number])

    def value(self, *settings: Setting | None) -> float:
        """The first setting that is given and applies to this parameter.

        Raises:
            AddlangError: none does.
        """
        for setting in settings:
            if setting is not None and (found := value_at(setting, self.name, self.position)) is not None:
                return found
        raise AddlangError(
            f"no filter of a parameter applies to '{self.name}'", "end the list with a value without filter"
        )
