"""The fast execution: what is frozen in a linear layer is no trainable parameter (see ``split_linear.py``).

Clipping, weight decay, momentum and sharding are then right by construction. Whole frozen tensors get no gradient,
whole trained tensors stay ordinary parameters, partly frozen vectors and token rows are overlaid (``overlay.py``).
Nothing depends on hooks, and in the assemble form nothing has to happen between two optimizer steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from addlang.errors import AddlangError
from addlang.freeze.masked import LOW_PRECISION
from addlang.freeze.overlay import Overlay, overlay, remove_overlay
from addlang.freeze.plan import FreezePlan, Frozen
from addlang.freeze.split_linear import Form, SplitLinear, split_linear, unsplit_linear
from addlang.models import SAME_INPUT
from addlang.strategies.base import Attached


def why_not_split(model: nn.Module, plan: FreezePlan) -> str | None:
    """Why split execution cannot run this plan on this model, naming the first parameter in the way; None if it can."""
    owners = _owners(model)
    outside = _outside(model)
    for name in plan:
        entry = _simple(plan[name])
        if entry.kind in ("none", "all"):
            continue
        uses = owners[name]
        module, leaf = uses[0]
        if len(entry.shape) == 1:
            continue
        if entry.kind == "elements":
            return f"'{name}' is frozen element by element; split layers hold whole columns or rows"
        if any(m in outside for m, _ in uses):
            if entry.kind == "columns":
                return f"'{name}' is the embedding or the head, which is never split; only rows of it can be frozen"
        elif len(uses) > 1:
            return f"'{name}' is partly frozen and tied to another layer"
        elif type(module) is not nn.Linear or leaf != "weight":
            return f"'{name}' belongs to {type(module).__name__}; only the weight of a plain nn.Linear can be split"
    return None


class SplitAttached(Attached):
    """A model whose linear layers are split as the plan says.

    ``named_trainable`` names the trained piece of a split layer as the weight it comes from; the piece is
    [n, out] for columns and [n, in] for rows, n the number of trained columns or rows.

    Args:
        form: ``assemble`` (least memory; the only one that can be sharded), ``resident`` (fastest on one device) or
            ``auto``: resident on one device whose free memory holds the optimizer's state and the dense weights with
            half as much again for activations. Runs leave nothing to choose: ``train/memory.py`` knows their settings.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FreezePlan,
        *,
        form: Literal["auto", "assemble", "resident"] = "auto",
        masters: bool = True,
    ) -> None:
        super().__init__(model, plan)
        cut = next((n for n, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
        if cut is not None:
            raise AddlangError(
                f"'{cut}' is sharded already (FSDP2 or tensor parallel), so its columns cannot be told apart",
                "make the plan true on the whole model first, then shard it",
            )
        reason = why_not_split(model, plan)
        if reason is not None:
            raise AddlangError(f"split execution cannot run this plan: {reason}", "use execution: masked")
        owners = _owners(model)
        outside = _outside(model)
        self.form: Form = _choose_form(model, plan) if form == "auto" else form
        self.execution = f"split ({self.form})"
        self._places: dict[str, tuple[nn.Module, str]] = {}
        shared = _shared_columns(plan)
        for name in plan:
            entry = _simple(plan[name])
            module, leaf = owners[name][0]
            parameter = module._parameters[leaf]
            assert parameter is not None
            if entry.kind == "all":
                parameter.requires_grad_(False)
                continue
            parameter.requires_grad_(True)
            self._places[name] = (module, leaf)
            if entry.kind != "none" and len(entry.shape) == 2 and module not in outside:
                assert entry.kind in ("columns", "rows")
                assert entry.index is not None
                assert isinstance(module, nn.Linear)
                # nothing but the layer itself keeps the input of a down projection: a product made for it
                narrow = name.endswith("down_proj.weight") or name in shared
                split_linear(module, entry.kind, entry.index, form=self.form, masters=masters, narrow_save=narrow)
                if (first := shared.get(name, name)) != name:  # the very same index tells layers that they share
                    module.index_trainable = owners[first][0][0].index_trainable  # type: ignore[union-attr]
                self._places[name] = (module, "weight_trainable")
                continue
            if entry.kind != "none":
                index = _first_dimension(entry)
                for m, leaf_there in owners[name]:  # a tied tensor is covered wherever it is used
                    overlay(m, leaf_there, index)
            if masters and parameter.dtype in LOW_PRECISION:
                parameter.data = parameter.data.float()

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer owns, in the order of the model's parameters; looked up anew, for sharding replaces it."""
        found = []
        for name, (module, leaf) in self._places.items():
            p = module._parameters[leaf]
            assert p is not None
            found.append((name, p))
        return found

    def after_step(self, step: int) -> None:
        """Write what was trained into the resident weights, and put overlaid elements back where decay moved them."""
        for module in self._modules():
            if isinstance(module, SplitLinear):
                module.write_back()
            if isinstance(module, Overlay):
                module.restore()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.after_step(0)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of which some part may have moved, dense, in a type that holds all of it exactly."""
        for name, (module, leaf) in self._places.items():
            if isinstance(module, SplitLinear) and leaf == "weight_trainable":
                yield name, module.dense()
                continue
            if isinstance(module, Overlay):
                module.restore()
            p = module._parameters[leaf]
            assert p is not None
            yield name, p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach()

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Keep dense weights inside this context, as for generation, where each would be built for every new token.

        Nothing may be trained inside. Sharded models gain nothing and are left alone.
        """
        layers = [m for m in self._modules() if isinstance(m, SplitLinear) and m.form == "assemble"]
        layers = [m for m in layers if not hasattr(m.weight_trainable, "full_tensor")]
        for m in layers:
            m.form = "resident"
        try:
            yield
        finally:
            for m in layers:
                m.drop_dense()
                m.form = "assemble"

    def detach(self) -> nn.Module:
        """Make the model plain again: ordinary layers with dense weights, everything trainable."""
        for module in self._modules():
            if isinstance(module, Overlay):
                remove_overlay(module)
            if isinstance(module, SplitLinear):
                unsplit_linear(module)
        self.model.requires_grad_(True)
        return self.model

    def _modules(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if isinstance(m, SplitLinear | Overlay)]


def _shared_columns(plan: FreezePlan) -> dict[str, str]:
    """Weight -> the first of the weights with the same input, where all of these freeze the same columns of it."""
    found: dict[str, str] = {}
    for leaves in SAME_INPUT:
        for name in plan:
            if not name.endswith(f".{leaves[0]}.weight"):
                continue
            group = [name.removesuffix(f"{leaves[0]}.weight") + f"{leaf}.weight" for leaf in leaves]
            entries = [_simple(plan[member]) for member in group if member in plan]
            index = entries[0].index
            if len(entries) < len(group) or index is None or any(e.kind != "columns" for e in entries):
                continue
            if all(e.index is not None and torch.equal(e.index, index) for e in entries):
                found |= dict.fromkeys(group, name)
    return found


def _simple(entry: Frozen) -> Frozen:
    """An index that covers nothing or everything is no partial freeze."""
    if entry.frozen_count == 0:
        return Frozen(entry.shape, "none")
    return Frozen(entry.shape, "all") if entry.frozen_count == entry.numel else entry


def _first_dimension(entry: Frozen) -> Tensor:
    """Frozen indices of a vector, or of the rows of a matrix."""
    assert entry.index is not None
    return entry.index.nonzero().flatten() if entry.kind == "elements" else entry.index


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Parameter name -> every (module, attribute) that holds it; a tied one is held several times."""
    names = {id(p): n for n, p in model.named_parameters()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {n: [] for n in names.values()}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                owners[names[id(p)]].append((module, leaf))
    return owners


def _outside(model: nn.Module) -> set[nn.Module]:
    """The input embedding and the head."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is not None:
            found.add(module)
    return found | {m for m in model.modules() if isinstance(m, nn.Embedding)}


def _choose_form(model: nn.Module, plan: FreezePlan) -> Form:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "assemble"  # resident weights cannot be sharded, and DDP would broadcast them at every step
    device = next(model.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return "assemble"
    optimizer = 12 * plan.trainable_count  # fp32 gradient and two moments
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    return "resident" if free > 1.5 * (optimizer + dense) else "assemble"
