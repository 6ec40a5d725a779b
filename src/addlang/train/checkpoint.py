"""Training checkpoints: safetensors and JSON, written whole or not at all, with everything an exact resume needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from addlang.errors import AddlangError, AddlangWarning

if TYPE_CHECKING:
    from addlang.strategies.base import Attached

FILES = ("trained.safetensors", "optimizer.safetensors", "random.safetensors")


def save(
    directory: Path, step: int, attached: Attached, optimizer: torch.optim.Optimizer, extra: dict[str, Any], keep: int
) -> Path:
    """Write ``checkpoint-<step>`` and remove all but the newest ``keep``.

    Args:
        extra: plain data (scheduler, tokens seen); comes back from :func:`load`.
    """
    final = directory / f"checkpoint-{step}"
    tmp = directory / f"checkpoint-{step}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        save_file({n: t.contiguous() for n, t in attached.state_dict().items()}, tmp / FILES[0])
        save_file(_optimizer_tensors(attached, optimizer), tmp / FILES[1])
        save_file(random_state(), tmp / FILES[2])
        manifest = {"step": step, "extra": extra, "bytes": {f: (tmp / f).stat().st_size for f in FILES}}
        (tmp / "state.json").write_text(json.dumps(manifest), encoding="utf-8")
        for file in (*FILES, "state.json"):
            with open(tmp / file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    for _, old in _listed(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint; torn ones are skipped with a warning."""
    for _, path in reversed(_listed(directory)):
        problem = _problem(path)
        if problem is None:
            return path
        warnings.warn(f"{path.name} is torn ({problem}) and is skipped", AddlangWarning, stacklevel=2)
    return None


def load(path: Path, attached: Attached, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Restore everything; returns (step, extra)."""
    manifest = json.loads((path / "state.json").read_text(encoding="utf-8"))
    device = next(p.device for _, p in attached.named_trainable())
    attached.load_state_dict(load_file(path / FILES[0], device=str(device)))
    _restore_optimizer(attached, optimizer, load_file(path / FILES[1]))
    set_random_state(load_file(path / FILES[2]))
    return int(manifest["step"]), dict(manifest["extra"])


def clear(directory: Path) -> None:
    """Remove all training checkpoints (after the export)."""
    for _, path in _listed(directory):
        shutil.rmtree(path)
    for tmp in directory.glob("checkpoint-*.tmp"):
        shutil.rmtree(tmp)


def _listed(directory: Path) -> list[tuple[int, Path]]:
    found = []
    for p in directory.glob("checkpoint-*"):
        m = re.fullmatch(r"checkpoint-(\d+)", p.name)
        if m and p.is_dir():
            found.append((int(m[1]), p))
    return sorted(found)


def _problem(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for file, size in manifest["bytes"].items():
            if (path / file).stat().st_size != size:
                return f"{file} has {(path / file).stat().st_size} bytes, expected {size}"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _optimizer_tensors(attached: Attached, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, p in attached.named_trainable():
        for key, value in optimizer.state.get(p, {}).items():
            out[f"{key}/{name}"] = (value if isinstance(value, Tensor) else torch.tensor(value)).detach().contiguous()
    return out


def _restore_optimizer(attached: Attached, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, p in attached.named_trainable():
        state = by_name.pop(name, {})
        # the step counter stays where the fused optimizer made it; moments go to the parameter
        optimizer.state[p] = {k: v.to(p.device) if (v.shape == p.shape or p.is_cuda) else v for k, v in state.items()}
    if by_name:
        raise AddlangError(
            f"the checkpoint has optimizer state for '{sorted(by_name)[0]}', which is not trained here",
            "start again with --overwrite",
        )


def random_state() -> dict[str, Tensor]:
    """Random states of this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
