"""Does half of the weighted square of EWC estimate the KL divergence from the source? On the lab model and its own conversations.

    python benchmarks/fisher_kl.py lab-out/cache/conversations/*.json

The files are those that a run with ``ewc`` and ``data: self`` (or the self anchor) keeps in its cache. All weights are changed at
random by as much; the KL is of the next token, per token of the conversations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from addlang.guards.ewc import fisher
from addlang.lab import lab_model_path
from addlang.models import load_model


def log_probabilities(model: Any, conversations: list[list[int]]) -> list[torch.Tensor]:
    """Of every next token, one [T - 1, vocabulary] in fp64 per conversation."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([c])).logits[0, :-1].double().log_softmax(-1) for c in conversations]


def compare(model: Any, conversations: list[list[int]], size: float, seed: int = 1) -> tuple[float, float]:
    """The KL per token after a random change of that standard deviation, and its estimate; the model is left as it was."""
    named = list(model.named_parameters())
    attached: Any = SimpleNamespace(model=model, named_trainable=lambda: named)
    context: Any = SimpleNamespace(
        device=torch.device("cpu"), autocast=contextlib.nullcontext, progress=lambda *_: None
    )  # fmt: skip
    found = fisher(attached, conversations, context)
    source = log_probabilities(model, conversations)
    before = {name: p.detach().clone() for name, p in named}
    generator = torch.Generator().manual_seed(seed)
    estimate = 0.0
    with torch.no_grad():
        for name, p in named:
            change = size * torch.randn(p.shape, generator=generator)
            estimate += 0.5 * float((found[name] * change.square()).double().sum())
            p.add_(change)
        pairs = zip(source, log_probabilities(model, conversations), strict=True)
        total = sum(float((s.exp() * (s - now)).sum()) for s, now in pairs)
        for name, p in named:
            p.copy_(before[name])
    return total / sum(len(c) - 1 for c in conversations), estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=200)
    given = parser.parse_args()
    model = load_model(lab_model_path(), dtype=torch.float32, device="cpu").eval()
    for path in given.conversations:
        ids = json.loads(path.read_text(encoding="utf-8"))["ids"][: given.limit]
        length = sum(len(c) - 1 for c in ids) / len(ids)
        for size in (1e-3, 3e-3):
            kl, estimate = compare(model, ids, size)
            words = f"{path.name}: {len(ids)} of {length:.1f} tokens, change {size:g}"
            print(f"{words}: KL {kl:.3g}, estimate {estimate:.3g}, ratio {kl / estimate:.2f}")


if __name__ == "__main__":
    main()
