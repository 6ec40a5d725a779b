"""What strategies that choose whole layers or matrices have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import Frozen
    from addlang.models import ParamInfo

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("up_proj", "gate_proj", "down_proj")


def inside(model: nn.Module) -> dict[str, ParamInfo]:
    """Every parameter but embedding and head, in the model's order."""
    from addlang.models import parameter_kinds

    return {n: i for n, i in parameter_kinds(model).items() if i.kind not in ("embedding", "head")}


def depth(kinds: Mapping[str, ParamInfo]) -> int:
    """Number of decoder layers.

    Raises:
        AddlangError: there are none.
    """
    layers = {i.layer for i in kinds.values() if i.layer is not None}
    if not layers:
        raise AddlangError("the model has no numbered decoder layers", "use strategy: ssu or full")
    return max(layers) + 1


def sample(seed: int, name: str, n: int, k: int, *, ordered: bool = True) -> list[int]:
    """``k`` of ``range(n)``, sorted unless ``ordered`` is false; of its own for every (seed, name)."""
    import torch

    from addlang.scoring.random import generator

    drawn: list[int] = torch.randperm(n, generator=generator(seed, name))[:k].tolist()
    return sorted(drawn) if ordered else drawn


def freeze_whole(model: nn.Module, names: Iterable[str], frozen: set[str]) -> dict[str, Frozen]:
    """Entries that freeze the parameters in ``frozen`` as a whole and leave the others free."""
    from addlang.freeze.plan import Frozen

    return {n: Frozen(tuple(model.get_parameter(n).shape), "all" if n in frozen else "none") for n in names}


def share_of_depth(layers: int, of_32: int = 10) -> int:
    """The paper's 10 of 32 layers, as the same share of another depth; at least one."""
    return max(1, round(of_32 * layers / 32))


def heads_of(model: Any, group: str) -> int:
    """Number of heads that the outputs of ``q_proj``, ``k_proj`` or ``v_proj`` (or the inputs of ``o_proj``) consist of."""
    config = model.config
    heads = int(config.num_attention_heads)
    if group in ("k_proj", "v_proj"):
        return int(getattr(config, "num_key_value_heads", None) or heads)
    return heads
