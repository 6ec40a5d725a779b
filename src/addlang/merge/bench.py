"""Measuring a model at many shares of its update: one model in memory, its weights mixed anew from the two checkpoints for
every point, every measurement cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from addlang.merge.methods import Revert
from addlang.merge.write import Merging

if TYPE_CHECKING:
    import torch

    from addlang.evaluate.measurement import Outcome
    from addlang.evaluate.suite import Suite, Task
    from addlang.merge.sources import Models


class Bench:
    """The source model, to be given shares of an update.

    Args:
        spec: a revert whose shares are replaced; names the two models.
        models: those two, open.
        device: where to measure.
    """

    def __init__(self, spec: Revert, models: Models, device: torch.device) -> None:
        import torch

        from addlang.models import load_model

        self.spec = spec
        self.models = models
        source = models[spec.source_model].directory
        self.model = load_model(source, dtype=torch.float32 if device.type == "cpu" else None, device=device)
        self._applied: Revert | None = None

    def measure(self, spec: Revert, suite: Suite, progress: Callable[[float], None] | None = None) -> Outcome:
        """Every task of a suite on the source with the update's shares of ``spec``, as it would be written to disk."""
        from addlang.data.prepare import cache_root
        from addlang.evaluate.suite import cached_evaluate

        tasks = tuple(replace(task, run=self._with_weights(task, spec)) for task in suite.tasks)
        return cached_evaluate(
            self.model, self.key(spec), replace(suite, tasks=tasks), cache_root() / "evaluations", progress=progress
        )

    def key(self, spec: Revert) -> str:
        """Names the weights: those of a checkpoint on disk where they are exactly that."""
        from addlang.data.cache import fingerprint

        source, tuned = (self.models[n].checkpoint.hash for n in (spec.source_model, spec.model))
        factors = self.factors(spec)
        if not any(factors.values()):
            return source
        if all(f == 1 for f in factors.values()):
            return tuned
        return fingerprint("share of an update", source, tuned, factors)

    def factors(self, spec: Revert) -> dict[str, float]:
        """Share of every parameter."""
        from addlang.merge.layers import Factors

        layout = self.models.layout
        share = Factors(spec.parameters.modules, spec.parameters.layers, layout)
        return {n: float(spec.parameters.scale) * share(info) for n, info in layout.kinds.items()}  # type: ignore[arg-type]

    def _with_weights(self, task: Task, spec: Revert) -> Any:
        """The task's function, which mixes the weights first if others are loaded (not at all if it is cached)."""

        def run(model: Any, tokenizer: Any, progress: Any) -> Outcome:
            if self._applied != spec:
                self._apply(spec)
            return task.run(model, tokenizer, progress)

        return run

    def _apply(self, spec: Revert) -> None:
        import torch

        self._applied = None  # if it is interrupted, the weights are neither's
        merging = Merging(spec, self.models)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                rows = 0
                for block in merging.blocks(merging.stated.stored[name]):
                    parameter[rows : rows + block.shape[0]].copy_(block)
                    rows += block.shape[0]
        self._applied = spec
