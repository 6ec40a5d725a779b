"""FreezePlan: which elements of which parameter must stay bit-identical to the source model. Pure data.

A plan always names the *frozen* set. It is made once on one device and then used by every execution, by sharded
training, by resume and by the proof.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["none", "all", "columns", "rows", "elements"]
FORMAT = "addlang-freeze-plan-1"


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen part of one parameter.

    Attributes:
        shape: the parameter's shape.
        kind: ``none``; ``all``; ``columns`` (indices into the *last* dimension: one input feature of a linear
            layer, one element of a 1-D parameter); ``rows`` (indices into the first dimension); ``elements``.
        index: sorted unique int64 indices for ``columns`` and ``rows``, a bool mask of ``shape`` for ``elements``.
    """

    shape: tuple[int, ...]
    kind: Kind
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind in ("none", "all"):
            if self.index is not None:
                raise AddlangError(f"a plan entry of kind '{self.kind}' has no index")
            return
        if self.index is None:
            raise AddlangError(f"a plan entry of kind '{self.kind}' needs an index")
        if self.kind == "elements":
            if self.index.dtype != torch.bool or tuple(self.index.shape) != self.shape:
                raise AddlangError(f"an element mask must be bool of shape {self.shape}")
            return
        size = self.shape[-1] if self.kind == "columns" else self.shape[0]
        ix = self.index
        if ix.dtype != torch.int64 or ix.dim() != 1:
            raise AddlangError("column and row indices must be a 1-D int64 tensor")
        if ix.numel() and (int(ix.min()) < 0 or int(ix.max()) >= size or bool((ix[1:] <= ix[:-1]).any())):
            raise AddlangError(f"indices must be sorted, unique and in 0..{size - 1}")

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @cached_property
    def frozen_count(self) -> int:
        """Number of frozen elements; counted once, for the mask of a large matrix has millions."""
        if self.kind == "none":
            return 0
        if self.kind == "all":
            return self.numel
        assert self.index is not None
        if self.kind == "elements":
            return int(self.index.sum())
        size = self.shape[-1] if self.kind == "columns" else self.shape[0]
        return self.index.numel() * (self.numel // size)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool mask of ``shape``, True where frozen."""
        m = torch.zeros(self.shape, dtype=torch.bool, device=device)
        if self.kind == "all":
            m.fill_(True)
        elif self.kind != "none":
            assert self.index is not None
            ix = self.index.to(device)
            if self.kind == "elements":
                m = ix.clone()
            elif self.kind == "columns":
                m[..., ix] = True
            else:
                m[ix] = True
        return m

    def union(self, other: Frozen) -> Frozen:
        """Everything that either entry freezes."""
        if self.shape != other.shape:
            raise AddlangError(f"plans disagree on a shape: {self.shape} and {other.shape}")
        if self.kind == "all" or other.kind == "none":
            return self
        if other.kind == "all" or self.kind == "none":
            return other
        if self.kind == other.kind and self.kind in ("columns", "rows"):
            assert self.index is not None
            assert other.index is not None
            return Frozen(self.shape, self.kind, torch.unique(torch.cat([self.index, other.index])))
        return Frozen(self.shape, "elements", self.mask() | other.mask())


@dataclass(frozen=True, eq=False)
class FreezePlan:
    """Parameter name -> frozen part, for *every* parameter of a model, with provenance.

    Names are those of ``model.named_parameters()``; a tied parameter appears once, under its first name.
    """

    entries: Mapping[str, Frozen]
    model_hash: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Frozen:
        try:
            return self.entries[name]
        except KeyError:
            raise AddlangError(
                f"the freeze plan has no entry for parameter '{name}'", did_you_mean(name, self.entries)
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def numel(self) -> int:
        return sum(e.numel for e in self.entries.values())

    @property
    def trainable_count(self) -> int:
        return sum(e.numel - e.frozen_count for e in self.entries.values())

    @property
    def trainable_fraction(self) -> float:
        """Share of all parameters' elements that may move, in [0, 1]."""
        return self.trainable_count / self.numel

    @classmethod
    def empty(cls, model: nn.Module, **kw: Any) -> FreezePlan:
        """The plan that freezes nothing."""
        return cls({n: Frozen(tuple(p.shape), "none") for n, p in model.named_parameters()}, **kw)

    def union(self, other: FreezePlan) -> FreezePlan:
        """The plan that freezes what either freezes."""
        if set(self.entries) != set(other.entries):
            odd = sorted(set(self.entries) ^ set(other.entries))
            raise AddlangError(f"plans of different models cannot be joined; for example '{odd[0]}' is in one only")
        return FreezePlan(
            {n: e.union(other.entries[n]) for n, e in self.entries.items()},
            self.model_hash,
            {"union": [dict(self.provenance), dict(other.provenance)]},
        )

    def validate(self, model: nn.Module) -> None:
        """Check that the plan names exactly this model's parameters, in their shapes, and leaves something to train.

        Raises:
            AddlangError: naming the first parameter that is missing, unknown or of another shape; or the model is
                partitioned by DeepSpeed ZeRO-3, whose parameters are empty.
        """
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise AddlangError(
                "the model's parameters are partitioned by DeepSpeed ZeRO-3, so no freeze plan can be checked against them",
                "shard with FSDP2 after the plan is attached (docs/distributed.md)",
            )
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        for name, shape in shapes.items():
            if name not in self.entries:
                raise AddlangError(
                    f"the freeze plan has no entry for parameter '{name}'", "make the plan for this model"
                )
            if self.entries[name].shape != shape:
                raise AddlangError(
                    f"the freeze plan has shape {self.entries[name].shape} for '{name}', the model has {shape}",
                    "make the plan for this model",
                )
        for name in self.entries:
            if name not in shapes:
                raise AddlangError(
                    f"the freeze plan names '{name}', which the model does not have", did_you_mean(name, shapes)
                )
        if self.trainable_count == 0:
            raise AddlangError("the freeze plan leaves nothing to train", "lower the ratio or narrow the pattern")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file, atomically. Element masks are packed to one bit each."""
        tensors: dict[str, Tensor] = {}
        table: dict[str, Any] = {}
        for name, e in self.entries.items():
            table[name] = [e.kind, list(e.shape)]
            if e.kind == "elements":
                assert e.index is not None
                tensors[name] = _pack_bits(e.index)
            elif e.index is not None:
                tensors[name] = e.index.to(torch.int32).contiguous()
        meta = {
            "format": FORMAT,
            "entries": json.dumps(table),
            "model_hash": self.model_hash,
            "provenance": json.dumps(dict(self.provenance)),
        }
        path = Path(path)
        tmp = path.with_name(path.name + ".tmp")
        save_file(tensors, tmp, metadata=meta)
        os.replace(tmp, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezePlan:
        """Read a plan written by :meth:`save`.

        Raises:
            AddlangError: when the file is missing, torn or no freeze plan.
        """
        try:
            with safe_open(str(path), "pt") as f:
                meta = f.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise AddlangError(f"{path}: not a freeze plan of this version of addlang")
                entries: dict[str, Frozen] = {}
                for name, (kind, shape) in json.loads(meta["entries"]).items():
                    index = None
                    if kind == "elements":
                        index = _unpack_bits(f.get_tensor(name), tuple(shape))
                    elif kind in ("columns", "rows"):
                        index = f.get_tensor(name).to(torch.int64)
                    entries[name] = Frozen(tuple(shape), kind, index)
        except AddlangError:
            raise
        except Exception as error:
            raise AddlangError(f"{path}: cannot be read as a freeze plan ({error})", "make the plan again") from error
        return cls(entries, meta["model_hash"], json.loads(meta["provenance"]))

    def equal(self, other: FreezePlan) -> bool:
        """Same frozen set (provenance is not compared)."""
        if set(self.entries) != set(other.entries):
            return False
        for n, a in self.entries.items():
            b = other.entries[n]
            if a.shape != b.shape or a.kind != b.kind:
                return False
            if a.index is not None and (b.index is None or not torch.equal(a.index, b.index)):
                return False
        return True


def _pack_bits(mask: Tensor) -> Tensor:  # bool [...] -> uint8 [ceil(n / 8)], lowest bit first
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    n = 1
    for s in shape:
        n *= s
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:n].bool().view(shape)
