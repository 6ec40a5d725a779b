"""What the tensors of a model directory are, from its configuration alone: no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.freeze.proof import is_buffer
from addlang.models import Checkpoint, ParamInfo, embedding_names, parameter_kinds, skeleton


@dataclass(frozen=True)
class Layout:
    """Parameters of a causal language model.

    Attributes:
        config: the configuration with every default filled in.
        kinds: parameter name -> what it is, in the model's order; a tied head is not listed.
        shapes: parameter name -> shape.
        embedding, head: names of the input embedding's and the head's weight; the same where they are tied.
        layers: number of decoder layers.
    """

    config: dict[str, Any]
    kinds: dict[str, ParamInfo]
    shapes: dict[str, tuple[int, ...]]
    embedding: str
    head: str
    layers: int

    @property
    def tied(self) -> bool:
        return self.embedding == self.head

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.shapes[self.embedding][0]

    def elements(self, parameter: str) -> int:
        return math.prod(self.shapes[parameter])

    def position(self, parameter: str) -> float:
        """Of a parameter's layer, from 0 (first) to 1 (last); 0 outside the layers."""
        layer = self.kinds[parameter].layer
        return 0.0 if layer is None else 1.0 if self.layers == 1 else layer / (self.layers - 1)


def layout_of(directory: Path) -> Layout:
    """Raises AddlangError for what addlang does not know: see :func:`addlang.models.parameter_kinds`."""
    model = skeleton(directory)
    kinds = parameter_kinds(model)
    embedding, head, _ = embedding_names(model)
    return Layout(
        config=model.config.to_dict(),
        kinds=kinds,
        shapes={n: tuple(p.shape) for n, p in model.named_parameters()},
        embedding=embedding,
        head=head,
        layers=1 + max((i.layer for i in kinds.values() if i.layer is not None), default=-1),
    )


def stored_weights(checkpoint: Checkpoint, file: str | None = None) -> list[str]:
    """Names of the stored tensors, of one file or all, without buffers: every model computes those from its configuration."""
    return [name for name in checkpoint.names(file) if not is_buffer(name)]


def stored_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """Stored tensor -> parameter, for every tensor in a checkpoint. A tied head that is stored all the same is the embedding.

    Raises:
        AddlangError: a tensor that is no parameter, a parameter that is not stored, or one stored in another shape than
            the configuration says.
    """
    names: dict[str, str] = {}
    where = checkpoint.directory
    for stored in stored_weights(checkpoint):
        shape = checkpoint.header[stored][1]
        parameter = layout.embedding if layout.tied and stored.endswith("lm_head.weight") else stored
        if parameter not in layout.kinds:
            raise AddlangError(
                f"{where} stores '{stored}', which is no parameter of the model its config.json describes",
                "load it with AutoModelForCausalLM and save it again with save_pretrained",
            )
        if shape != layout.shapes[parameter]:
            raise AddlangError(
                f"'{stored}' has shape {shape} in {where}, but its config.json says {layout.shapes[parameter]}",
                "copy the model again, or correct vocab_size in config.json",
            )
        names[stored] = parameter
    if missing := [p for p in layout.kinds if p not in names.values()]:
        raise AddlangError(f"{where} has no tensor '{missing[0]}'", "copy the model again")
    return names
