"""Training checkpoints, written whole or not at all, with everything an exact resume needs.

One process writes safetensors and JSON. A sharded run writes with ``torch.distributed.checkpoint``: every process its own
part. Either form can be read by any number of processes; with the same number the resume is bit-exact.

The state is copied to host memory, then written by a thread while training goes on. At most one write is in flight.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from addlang.errors import AddlangError, AddlangWarning
from addlang.train.optimizers import is_quantised, make_state, state_parts
from addlang.train.shard import ALONE, World, local_part

if TYPE_CHECKING:
    from addlang.strategies.base import Attached

PARTS = ("trained", "optimizer", "random")  # first component of every key
MANIFEST = "state.json"
PLACE = re.compile(r"(?P<kind>[^/@]+)@(?P<rank>\d+)\.(?P<part>\w+)")  # of one process's part of a quantised state


class Writer:
    """Writes ``checkpoint-N`` directories in the background and keeps the newest ``keep`` that are whole.

    Args:
        sharded: every process writes its part; otherwise the first one writes everything.
    """

    def __init__(self, directory: Path, keep: int, world: World = ALONE, *, sharded: bool = False) -> None:
        self.directory, self.keep, self.world, self.sharded = directory, keep, world, sharded
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, attached: Attached, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
        """Copy the state and begin to write it; waits for the write before.

        Args:
            extra: plain data (scheduler, tokens seen); comes back from :func:`load`.

        Raises:
            OSError: the write before failed; nothing is half-written.
        """
        self.wait()
        if not (self.sharded or self.world.leads):
            return
        state = to_host(collect(attached, optimizer, self.world, sharded=self.sharded))
        manifest = {"step": step, "extra": extra, "processes": self.world.size if self.sharded else 1}
        self._thread = threading.Thread(target=self._run, args=(step, state, manifest), name="addlang-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in flight.

        Raises:
            OSError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the write in flight, whatever becomes of it: another error is on its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        try:
            self._write(step, state, manifest)
        except BaseException as error:  # shown by the next wait()
            if not isinstance(error, OSError) and "No space left" in str(error):  # safetensors and torch hide it
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
            self._error = error

    def _write(self, step: int, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        final = self.directory / f"checkpoint-{step}"
        tmp = self.directory / f"checkpoint-{step}.tmp"

        def begin() -> None:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)

        def finish() -> None:
            files = sorted(p for p in tmp.iterdir() if p.is_file())
            manifest["bytes"] = {p.name: p.stat().st_size for p in files}
            (tmp / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            for path in (*files, tmp / MANIFEST):
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(tmp, final)
            others = [path for _, path in reversed(_listed(self.directory)) if path != final]
            kept = [path for path in others if _problem(path) is None][: self.keep - 1]
            for old in others:  # also a torn one of a higher number, which must not count in the place of a whole one
                if old not in kept:
                    shutil.rmtree(old)

        try:
            self._first(begin)
            if self.sharded:
                write_sharded(tmp, state, self.world)
            else:
                for part in PARTS:
                    save_file(
                        {k.partition("/")[2]: t for k, t in state.items() if k.startswith(part + "/")},
                        tmp / f"{part}.safetensors",
                    )
            self._first(finish)
        except BaseException:
            if self.world.leads:
                shutil.rmtree(tmp, ignore_errors=True)
            raise

    def _first(self, function: Callable[[], None]) -> None:
        """``function`` in the first process; its error in all of them, so that none waits for another in vain."""
        if not self.sharded:
            function()
            return
        import torch.distributed as dist

        box: list[str | None] = [None]
        caught: BaseException | None = None
        if self.world.leads:
            try:
                function()
            except BaseException as error:
                caught, box[0] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(box, src=0, group=self.world.writing)
        if caught is not None:
            raise caught
        if box[0] is not None:
            raise OSError(f"the first process could not write a checkpoint ({box[0]})")


def collect(attached: Attached, optimizer: torch.optim.Optimizer, world: World, *, sharded: bool) -> dict[str, Tensor]:
    """Everything an exact resume needs, by key: ``trained/NAME``, ``optimizer/KIND/NAME``, ``random/DEVICE@RANK``.

    Quantised states and random states belong to one process and carry its rank; sharded tensors are DTensors.
    """
    rank = world.rank if sharded else 0
    state = {f"trained/{n}": t for n, t in attached.state_dict().items()}
    for name, p in attached.named_trainable():
        for kind, value in optimizer.state.get(p, {}).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            if is_quantised(optimizer) and tensor.dim() > 0:
                local = local_part(tensor)[0]
                for part, piece in (state_parts(local) or {"plain": local}).items():
                    state[f"optimizer/{kind}@{rank}.{part}/{name}"] = piece
            else:
                state[f"optimizer/{kind}/{name}"] = tensor
    return {**state, **{f"random/{k}@{rank}": t for k, t in random_state().items()}}


def to_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that training cannot change; DTensors stay DTensors."""
    return {k: t.detach().to("cpu", copy=True).contiguous() for k, t in state.items()}


def write_sharded(path: Path, state: dict[str, Tensor], world: World) -> None:
    """All processes write their parts."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, storage_writer=FileSystemWriter(path), process_group=world.writing)


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint; torn ones are skipped with a warning."""
    for _, path in reversed(_listed(directory)):
        problem = _problem(path)
        if problem is None:
            return path
        warnings.warn(f"{path.name} is torn ({problem}) and is skipped", AddlangWarning, stacklevel=2)
    return None


def load(
    path: Path, attached: Attached, optimizer: torch.optim.Optimizer, world: World = ALONE, *, sharded: bool = False
) -> tuple[int, dict[str, Any]]:
    """Restore everything, also what another number of processes has written; returns (step, extra).

    With the same number the resume is exact; with another one, 8-bit states are quantised anew and each further process
    keeps its fresh random state.
    """
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    stored: Stored = ShardedFile(path, world if sharded else ALONE) if (path / ".metadata").is_file() else Files(path)
    trained = {n: torch.empty_like(t) for n, t in attached.state_dict().items()}
    want = {f"trained/{n}": t for n, t in trained.items()}
    have = {k for k in stored.shapes if k.startswith("trained/")}
    if have != set(want):
        odd = sorted(have ^ set(want))[0].partition("/")[2]
        raise AddlangError(
            f"the checkpoint does not fit this run: '{odd}' is in one only", "start again with --overwrite"
        )
    stored.read(want)
    attached.load_state_dict(trained)
    del trained, want  # before the optimizer's state takes its room
    restore_optimizer(attached, optimizer, stored, manifest["processes"], world if sharded else ALONE)
    rank = world.rank if sharded else 0
    random = {
        device: torch.empty(shape, dtype=torch.uint8)
        for device in ("cpu", "cuda")
        if (shape := stored.shapes.get(f"random/{device}@{rank}", (None,))[0]) is not None
    }
    stored.read({f"random/{d}@{rank}": t for d, t in random.items()})
    if random:
        set_random_state(random)
    return int(manifest["step"]), dict(manifest["extra"])


def restore_optimizer(
    attached: Attached, optimizer: torch.optim.Optimizer, stored: Stored, processes: int, world: World
) -> None:
    """Give every trained parameter its state; ``processes`` wrote it, ``world`` reads it."""
    parameters = dict(attached.named_trainable())
    want: dict[str, Tensor] = {}
    quantised: dict[tuple[str, str], dict[str, Tensor]] = {}
    fused = bool(optimizer.defaults.get("fused"))
    for key, (shape, dtype) in stored.shapes.items():
        part, _, rest = key.partition("/")
        kind, _, name = rest.partition("/")
        if part != "optimizer":
            continue
        if name not in parameters:
            raise AddlangError(
                f"the checkpoint has optimizer state for '{name}', which is not trained here",
                "start again with --overwrite",
            )
        p = parameters[name]
        place = PLACE.fullmatch(kind)
        if place is not None:
            pieces = quantised.setdefault((place["kind"], name), {})
            if processes != world.size or int(place["rank"]) == world.rank:
                pieces[kind] = want[key] = torch.empty(shape, dtype=dtype)
        elif tuple(shape) == tuple(p.shape) and shape:
            want[key] = optimizer.state[p][kind] = torch.empty_like(p, dtype=dtype, requires_grad=False)
        else:  # a step counter: the fused optimizer keeps it beside the parameter, torchao on the CPU
            want[key] = optimizer.state[p][kind] = torch.empty(shape, dtype=dtype, device=p.device if fused else "cpu")
    stored.read(want)
    for (kind, name), pieces in quantised.items():
        p = parameters[name]
        state = optimizer.state[p][kind] = make_state(optimizer, p, kind)
        local, start = local_part(state)
        own = {k.partition(".")[2]: t for k, t in pieces.items()}
        if processes == world.size:
            for part, tensor in (state_parts(local) or {"plain": local}).items():
                tensor.copy_(own[part])
        else:
            local.copy_(_merged(pieces, local, kind)[start : start + local.shape[0]].to(local.device))


def _merged(pieces: Mapping[str, Tensor], like: Tensor, kind: str) -> Tensor:
    """The whole state in its own type, from the parts of all processes that wrote it."""
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    table = torch.tensor(get_qmap_signed() if kind == "exp_avg" else get_qmap_unsigned(), dtype=torch.float32)
    ranks = sorted({int(m["rank"]) for k in pieces if (m := PLACE.fullmatch(k))})
    parts = []
    for rank in ranks:
        plain = pieces.get(f"{kind}@{rank}.plain")
        if plain is None:
            codes, scale = pieces[f"{kind}@{rank}.codes"], pieces[f"{kind}@{rank}.scale"]
            plain = OptimState8bit(codes, scale, table, kind == "exp_avg", dtype=torch.float32).dequantize()
        parts.append(plain.float())
    return torch.cat(parts)


class Stored(Protocol):
    """A checkpoint on disk."""

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors with what is stored under their keys; of a DTensor this process's part."""
        ...


class Files:
    """Safetensors of one process; the key's first component is the file."""

    def __init__(self, path: Path) -> None:
        self._files = {part: safe_open(str(path / f"{part}.safetensors"), "pt") for part in PARTS}
        self.shapes = {}
        for part, file in self._files.items():
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                lazy = file.get_slice(key)
                self.shapes[f"{part}/{key}"] = (tuple(lazy.get_shape()), DTYPES[lazy.get_dtype()])

    def read(self, into: Mapping[str, Tensor]) -> None:
        for key, target in into.items():
            part, _, rest = key.partition("/")
            local, start = local_part(target)
            if local.dim() == 0:
                local.copy_(self._files[part].get_tensor(rest))
            else:
                local.copy_(self._files[part].get_slice(rest)[start : start + local.shape[0]])


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


class ShardedFile:
    """A checkpoint of ``torch.distributed.checkpoint``, read by the processes of ``world`` together."""

    def __init__(self, path: Path, world: World) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        self._path, self._world = path, world
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        self.shapes = {k: (tuple(m.size), m.properties.dtype) for k, m in metadata.items()}  # type: ignore[union-attr]

    def read(self, into: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        alone = self._world.size == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
            load(
                dict(into),
                storage_reader=FileSystemReader(self._path),
                process_group=None if alone else self._world.writing,
                no_dist=alone,
            )


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
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for file, size in manifest["bytes"].items():
            if (path / file).stat().st_size != size:
                return f"{file} has {(path / file).stat().st_size} bytes, expected {size}"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def random_state() -> dict[str, Tensor]:
    """Random states of this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
