"""Export: an ordinary Hugging Face checkpoint, laid out like the source, with frozen elements byte for byte the source's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from addlang.errors import AddlangError
from addlang.freeze.proof import frozen_part, tied_names
from addlang.models import TOKENIZER_FILES, Checkpoint
from addlang.train.shard import ALONE, World

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.freeze.plan import FreezePlan
    from addlang.strategies.base import Attached

CONFIG_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def export(
    source: Checkpoint,
    attached: Attached,
    plan: FreezePlan,
    out: Path,
    *,
    world: World = ALONE,
    chat_template: Path | None = None,
) -> None:
    """Write the adapted checkpoint into ``out``: same files, names, shapes and types as the source.

    Streams one weight file at a time. Trained tensors are cast to the source's type; of a partly frozen tensor the
    frozen elements are copied from the source file. Every file is written under a temporary name and renamed.

    Args:
        world: all processes gather the trained tensors, one at a time; the first one writes.
        chat_template: file of the template that was trained with in place of the source's; becomes the checkpoint's own.

    Raises:
        AddlangError: a trained tensor is NaN or infinite, or has no counterpart in the source.
    """
    trained: dict[str, Tensor] = {}
    for name, tensor in attached.export():
        if world.leads:
            trained[name] = tensor.detach().to("cpu")
    world.first(lambda: write_checkpoint(source, trained, plan, out))
    if chat_template is not None and world.leads:
        write_text(out / "chat_template.jinja", chat_template.read_text(encoding="utf-8"))


def write_checkpoint(source: Checkpoint, trained: Mapping[str, Tensor], plan: FreezePlan, out: Path) -> None:
    """The source's files with the trained tensors in place of the source's; see :func:`export`."""
    import torch
    from safetensors.torch import save_file

    twins = tied_names(source, plan.entries)
    stored = {twins.get(n, n) for n in source.header}
    for name in trained:
        if name not in stored:
            raise AddlangError(f"trained parameter '{name}' has no counterpart in {source.directory}")
    out.mkdir(parents=True, exist_ok=True)
    for file in source.files:
        tensors: dict[str, Tensor] = {}
        for name, old in source.tensors(file):
            key = twins.get(name, name)
            entry = frozen_part(name, source, plan, twins)
            if key not in trained:
                if entry.kind != "all":
                    raise AddlangError(f"'{key}' was planned trainable but the strategy does not export it")
                tensors[name] = old
                continue
            new = trained[key].detach().to("cpu", old.dtype)
            if new.shape != old.shape:
                raise AddlangError(f"'{key}' has shape {tuple(new.shape)} after training, {tuple(old.shape)} before")
            if not bool(torch.isfinite(new).all()):
                raise AddlangError(
                    f"trained tensor '{key}' is NaN or infinite", "lower the learning rate; nothing was exported"
                )
            if entry.kind == "none":
                tensors[name] = (
                    new.contiguous().clone() if new.data_ptr() == trained[key].data_ptr() else new.contiguous()
                )
            else:
                tensors[name] = torch.where(entry.mask(), old, new)
        tmp = out / (file + ".tmp")
        save_file(tensors, tmp, metadata={"format": "pt"})
        _sync(tmp)
        os.replace(tmp, out / file)
    copy_small_files(source.directory, out)
    if len(source.files) > 1:
        write_text(
            out / "model.safetensors.index.json",
            (source.directory / "model.safetensors.index.json").read_text(encoding="utf-8"),
        )


def copy_small_files(source: Path, out: Path) -> None:
    """Configuration and tokenizer, as they are in the source."""
    for name in CONFIG_FILES:
        if (source / name).is_file():
            tmp = out / (name + ".tmp")
            shutil.copyfile(source / name, tmp)
            os.replace(tmp, out / name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    _sync(tmp)
    os.replace(tmp, path)


def _sync(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1))
