"""The proof: compare two checkpoints tensor by tensor and show that what was frozen is bit-identical."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from addlang.errors import AddlangError
from addlang.freeze.plan import Frozen
from addlang.models import Checkpoint

if TYPE_CHECKING:
    from addlang.freeze.plan import FreezePlan

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns as integers: unlike ``==``, NaN equals itself and 0.0 differs from -0.0."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def prove(source: Checkpoint, adapted: Checkpoint, plan: FreezePlan) -> dict[str, Any]:
    """Recompute the proof from the two checkpoints.

    Args:
        source: what training started from.
        adapted: what it wrote.
        plan: what was declared frozen.

    Returns:
        ``ok``, totals and one row per tensor. ``ok`` is False when any frozen element differs.

    Raises:
        AddlangError: the two do not have the same tensors in the same shapes and types, or the plan is of another model.
    """
    if plan.model_hash and plan.model_hash != source.hash:
        raise AddlangError(
            f"the freeze plan was made for a model with hash {plan.model_hash}, but {source.directory} has {source.hash}",
            "give the source model that the run started from",
        )
    for name in sorted(set(source.header) ^ set(adapted.header)):
        raise AddlangError(f"tensor '{name}' is in only one of {source.directory} and {adapted.directory}")
    twins = tied_names(source, plan.entries)
    rows: list[dict[str, Any]] = []
    for name in source.names():
        if source.header[name] != adapted.header[name]:
            raise AddlangError(
                f"tensor '{name}' is {source.header[name]} in the source and {adapted.header[name]} in the result"
            )
        entry = frozen_part(name, source, plan, twins)
        differs = bits(source.get(name)) != bits(adapted.get(name))
        total = int(differs.sum())
        if entry.kind == "all":
            changed = total
        elif entry.kind == "none":
            changed = 0
        else:
            changed = int((differs & entry.mask()).sum())
        parts = name.split(".")
        rows.append(
            {
                "name": name,
                "kind": entry.kind,
                "group": parts[-2] if len(parts) > 1 else name,
                "layer": next((int(p) for p in parts if p.isdigit()), None),
                "elements": entry.numel,
                "frozen": entry.frozen_count,
                "frozen_changed": changed,
                "moved": total - changed,
            }
        )
    changed = sum(r["frozen_changed"] for r in rows)
    frozen = sum(r["frozen"] for r in rows)
    trainable = sum(r["elements"] for r in rows) - frozen
    return {
        "ok": changed == 0,
        "source": str(source.directory),
        "source_hash": source.hash,
        "adapted_hash": adapted.hash,
        "frozen_elements": frozen,
        "frozen_changed": changed,
        "trainable_elements": trainable,
        "trainable_moved": sum(r["moved"] for r in rows),
        "tensors": rows,
    }


def frozen_part(stored: str, source: Checkpoint, plan: FreezePlan, twins: Mapping[str, str]) -> Frozen:
    """What of a stored tensor must not change; a buffer is copied, so all of it."""
    return Frozen(source.header[stored][1], "all") if is_buffer(stored) else plan[twins.get(stored, stored)]


def is_buffer(stored: str) -> bool:
    """Rotary frequencies, which Llama 2's files hold although every model computes them from its configuration."""
    return stored.endswith(".rotary_emb.inv_freq")


def tied_names(source: Checkpoint, parameters: Collection[str]) -> dict[str, str]:
    """Stored tensor name -> parameter, for a head that is stored although it is tied to the embedding.

    Raises:
        AddlangError: a stored tensor that is no parameter (nor a known buffer), or a parameter that is not stored.
    """
    twins: dict[str, str] = {}
    embeddings = [n for n in parameters if n.endswith("embed_tokens.weight")]
    for name in source.header:
        if name in parameters or is_buffer(name):
            continue
        if not name.endswith("lm_head.weight") or not embeddings:
            raise AddlangError(
                f"{source.directory} stores '{name}', which is no parameter of the model its config.json describes",
                "save the model again with save_pretrained of AutoModelForCausalLM",
            )
        twins[name] = embeddings[0]
    missing = [n for n in parameters if n not in source.header]
    if missing:
        raise AddlangError(
            f"parameter '{missing[0]}' is not stored in {source.directory}", "save the model again with save_pretrained"
        )
    return twins
