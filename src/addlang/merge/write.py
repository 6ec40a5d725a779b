"""Carrying out a merge: block by block from the models' files into a new model directory that appears complete or not
at all. No tensor is ever held as a whole, so the size of the models does not matter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from addlang.errors import AddlangError, AddlangWarning
from addlang.export import copy_small_files, write_json, write_text
from addlang.merge.layout import stored_weights
from addlang.merge.methods import Merge
from addlang.merge.sources import SIZES, Models, Part, Source
from addlang.merge.vocabulary import special_tokens
from addlang.models import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1
RECORD = "merge.json"
RECIPE = "merge.yaml"
INDEX = "model.safetensors.index.json"
NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Merging:
    """A merge whose models are open: gives the result's tensors in blocks.

    Args:
        models: opened already, when several merges of the same models are made.
        directories: where models are that are not found by their name.
    """

    def __init__(
        self, spec: Merge, models: Models | None = None, *, directories: Mapping[str, Path] | None = None
    ) -> None:
        self.spec = spec
        self.models = models or open_models(spec, directories)
        self.started = spec.start(self.models)
        self.counts: Counter[str] = Counter()
        self.restored = self._restored_rows()

    @property
    def stated(self) -> Source:
        return self.models.stated

    def parameter(self, stored: str) -> str:
        """The parameter that a tensor of the result's files holds."""
        layout = self.models.layout
        return layout.embedding if layout.tied and stored.endswith("lm_head.weight") else stored

    def dtype(self, stored: str) -> str:
        """Type of a tensor of the result, as safetensors names it."""
        return NAMES[self.spec.dtype] if self.spec.dtype else self.stated.checkpoint.header[stored][0]

    def blocks(self, stored: str) -> Iterator[Tensor]:
        """The tensor in the result's type, in blocks of rows.

        Raises:
            AddlangError: a value is NaN or infinite.
        """
        parameter = self.parameter(stored)
        kind = self.dtype(stored)
        part = self.models.part(parameter, seed=self.spec.seed, counts=self.counts)
        rows = self.restored if parameter in (self.models.layout.embedding, self.models.layout.head) else {}
        for (start, stop), block in zip(part.ranges(), self.started.merge(part), strict=True):
            if rows:
                block = self._restore(part, block, start, stop)
            out = block.to(_torch_dtype(kind))
            if not bool(out.isfinite().all()):
                raise AddlangError(
                    f"'{stored}' is NaN or infinite after merging",
                    "check the models, the weights, and dtype float16's range",
                )
            yield out

    def _restored_rows(self) -> dict[int, int]:
        """Row of the result -> row of the model whose special tokens are restored."""
        name = self.spec.restore_special_tokens
        if name is None:
            return {}
        lender, vocabulary = self.models[name], self.stated.vocabulary
        if (
            lender.layout.tied != self.models.layout.tied
            or lender.layout.shapes[lender.layout.embedding][1:]
            != (self.models.layout.shapes[self.models.layout.embedding][1:])
        ):
            raise AddlangError(
                f"special tokens of '{name}' cannot be put into '{self.stated.name}': embeddings of another width, or tied in only one",
                "name the model that this one was trained from",
            )
        if vocabulary is None:
            raise AddlangError(f"{self.stated.directory} has no tokenizer", "put tokenizer.json beside config.json")
        theirs = {t: row for t, row in special_tokens(lender.directory).items() if row < lender.layout.rows}
        if missing := sorted(set(theirs) - set(vocabulary)):
            raise AddlangError(
                f"the result's vocabulary lacks special tokens of '{name}': {', '.join(missing[:4])}",
                f"take that model's tokenizer (--tokenizer {name})"
                if name in self.models.merged
                else "name another model",
            )
        return {vocabulary[token]: row for token, row in theirs.items()}

    def _restore(self, part: Part, block: Tensor, start: int, stop: int) -> Tensor:
        lender = self.models[str(self.spec.restore_special_tokens)]
        block = block.clone()  # it may be the file itself
        for row, theirs in self.restored.items():
            if start <= row < stop:
                block[row - start] = lender.read(part.name, theirs, theirs + 1)[0].to(block.dtype)
        return block


def open_models(spec: Merge, directories: Mapping[str, Path] | None = None) -> Models:
    """The models that a merge reads, checked against each other."""
    lender = [spec.restore_special_tokens] if spec.restore_special_tokens else []
    return Models(
        [*spec.names(), *lender],
        merged=spec.names(),
        stated=spec.config_from or spec.stated(),
        base=spec.base(),
        tokenizer_source=spec.tokenizer_source,
        directories=directories,
    )


def merge_models(spec: Merge, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Carry out a merge and write it to ``out``; returns the content of its ``merge.json``.

    Args:
        overwrite: replace what is in ``out`` if it is the result of a merge.

    Raises:
        AddlangError: the models do not fit together, or ``out`` holds something else.
    """
    check_output(out, overwrite)
    merging = Merging(spec)
    if out.resolve() in (used := {s.directory.resolve(): n for n, s in merging.models.sources.items()}):
        raise AddlangError(
            f"'{out}' is the model '{used[out.resolve()]}' that is merged", "choose another --output_dir"
        )
    with complete_or_absent(out) as directory:
        return write_result(merging, directory)


def write_result(merging: Merging, directory: Path, **extra: Any) -> dict[str, Any]:
    """Weights, small files, ``merge.json``, ``merge.yaml`` and the model card, into an empty directory.

    Args:
        extra: more for ``merge.json``, plain data.
    """
    import yaml

    from addlang.merge.card import merge_card
    from addlang.progress import progress
    from addlang.run import versions

    started = time.monotonic()
    stated, spec = merging.stated, merging.spec
    layout = merging.models.layout
    total = sum(layout.elements(merging.parameter(n)) for n in stored_weights(stated.checkpoint))
    with progress(f"merging ({spec.title})", total=total, unit="weights") as bar:
        done = 0
        for file in stated.checkpoint.files:
            names = stored_weights(stated.checkpoint, file)
            table = {n: (merging.dtype(n), layout.shapes[merging.parameter(n)]) for n in names}
            with SafetensorsFile(directory / file, table) as writer:
                for name in writer.names:
                    for block in merging.blocks(name):
                        writer.append(name, block)
                        done += block.numel()
                        bar.update(done)
    _copy_small_files(merging, directory)
    hashes = {n: s.checkpoint.hash for n, s in merging.models.sources.items()}
    record = {
        "format": FORMAT,
        "merge": spec.resolved(),
        "title": spec.title,
        "paper": spec.paper,
        "notes": spec.notes(),
        "decided": merging.started.about,
        "counts": dict(merging.counts),
        "tokens": merging.models.mapping(),
        "restored_rows": len(merging.restored),
        "config_from": stated.name,
        "models": [
            {"model": n, "directory": str(s.directory.resolve()), "hash": hashes[n]}
            for n, s in merging.models.sources.items()
        ],
        "hash": Checkpoint(directory).hash,
        "parameters": sum(layout.elements(n) for n in layout.kinds),
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions(),
        **extra,
    }
    write_text(directory / RECIPE, yaml.safe_dump(spec.resolved(), sort_keys=False, allow_unicode=True))
    write_text(directory / "README.md", merge_card(record))
    write_json(directory / RECORD, record)
    return record


def _copy_small_files(merging: Merging, directory: Path) -> None:
    """Configuration, tokenizer and chat template of the stated model; the index, if it has several files."""
    source = merging.stated.directory
    copy_small_files(source, directory)
    if merging.spec.dtype is not None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        write_json(directory / "config.json", {**config, "dtype": merging.spec.dtype})
    if (source / INDEX).is_file():
        table = json.loads((source / INDEX).read_text(encoding="utf-8"))
        kept = stored_weights(merging.stated.checkpoint)
        places = {name: file for name, file in table["weight_map"].items() if name in kept}
        size = sum((directory / f).stat().st_size for f in merging.stated.checkpoint.files)
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    chats = [n for n in merging.models.merged if _has_template(merging.models[n].directory)]
    if chats and not _has_template(source):
        warnings.warn(
            f"the result has no chat template: '{merging.stated.name}', whose files are copied, has none, but '{chats[0]}' has "
            f"(--config_from {chats[0]})",
            AddlangWarning,
            stacklevel=2,
        )


def _has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    try:
        return "chat_template" in json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def check_output(out: Path, overwrite: bool) -> None:
    """Raise before any work if ``out`` cannot become the result's directory."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise AddlangError(f"'{out}' is not empty and holds no merge", "choose another --output_dir")
        if not overwrite:
            raise AddlangError(f"'{out}' holds a merge", "choose another --output_dir, or add --overwrite")
    elif out.exists() and not out.is_dir():
        raise AddlangError(f"output directory '{out}' is a file", "choose another --output_dir")


@contextlib.contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that takes its place when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.*.merging"):  # left by a process that was killed
        if not _alive(old.name.split(".")[-2]):
            shutil.rmtree(old, ignore_errors=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.merging"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.is_dir():
            replaced = out.parent / f".{out.name}.old.{os.getpid()}.merging"
            os.replace(out, replaced)
            os.replace(temporary, out)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


class SafetensorsFile:
    """Writes one safetensors file block by block: the library's own writer needs all its tensors in memory.

    Args:
        table: tensor name -> (type as safetensors names it, shape).
    """

    def __init__(self, path: Path, table: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        # larger types first, as the library does it, so that every tensor begins at a multiple of its element's size
        self.names = sorted(table, key=lambda n: (-SIZES[table[n][0]], n))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.left: dict[str, int] = {}
        offset = 0
        for name in self.names:
            kind, shape = table[name]
            size = SIZES[kind]
            for s in shape:
                size *= s
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self.left[name] = size
            offset += size
        text = json.dumps(header).encode()
        self.header = text + b" " * (-len(text) % 8)
        self.file: BinaryIO

    def __enter__(self) -> SafetensorsFile:
        self.file = open(self.path, "wb")
        self.file.write(len(self.header).to_bytes(8, "little"))
        self.file.write(self.header)
        return self

    def append(self, name: str, block: Tensor) -> None:
        """The next block of a tensor; tensors in the order of :attr:`names`."""
        import torch

        assert next(n for n, left in self.left.items() if left) == name, f"'{name}' is not next"
        data = block.contiguous().view(torch.uint8).flatten()
        self.left[name] -= data.numel()
        self.file.write(data.numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert not any(self.left.values()), "a tensor is incomplete"
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()


def _torch_dtype(kind: str) -> torch.dtype:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
