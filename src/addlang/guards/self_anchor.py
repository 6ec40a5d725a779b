"""The self anchor: the source model writes its own source data and is held to its own distribution on them.

Given nothing but the start of a user turn, an instruct model samples an instruction and then its answer (as Magpie does to
make training data, arXiv 2406.08464). The source's top-k next-token probabilities on these conversations are stored once;
while the model learns the target language, a share of every step's tokens is anchored to them by KL divergence. No source
data, no judge, and no second model in memory.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from addlang.guards.base import ActiveGuard, Guard, GuardContext
from addlang.guards.sampling import Sampling, sampled_by, stored_conversations


class SelfAnchor(Sampling, Guard):
    """Our own method; ``docs/methods/self_anchor.md`` has its ablations."""

    name = "self_anchor"
    paper = "addlang (this project); sampling after Magpie (arXiv 2406.08464)"
    summary = "hold the model to the source's own distribution on conversations that the source itself samples"

    share: float = Field(
        0.1, gt=0, lt=0.9, description="share of every step's tokens that is anchored; counts towards the budget"
    )
    weight: float = Field(0.3, gt=0, description="weight of the anchor's mean term against the target's mean loss")
    mode: Literal["kl", "replay", "both"] = Field(
        "kl", description="KL to the source, next-token loss on its words, or both"
    )
    top_k: int = Field(64, gt=0, description="next-token probabilities stored per position; the rest is one bucket")
    temperature: float = Field(1.0, gt=0, description="softens both distributions in the KL")
    schedule: Literal["constant", "decay", "ramp"] = Field(
        "constant", description="of the weight over the run: as it is, to 0, or from 0"
    )

    @property
    def token_share(self) -> float:
        return self.share

    @property
    def needs_start(self) -> bool:
        return self.mode != "replay"  # which trains on words and knows no probabilities

    def rows_per_pass(self, micro: int, length: int, vocabulary: int) -> int:
        from addlang.guards.anchored import most_rows

        return min(micro, most_rows(length, vocabulary))

    def requires(self) -> frozenset[str]:
        return frozenset({"chat_template"})

    def start(self, context: GuardContext) -> ActiveGuard:
        from addlang.data.cache import fingerprint
        from addlang.guards.anchored import anchored, stored_teacher
        from addlang.guards.teacher import VERSION

        key = fingerprint("self_anchor", VERSION, sampled_by(self, context), self.top_k)
        found = stored_teacher(context, key, self.top_k, lambda: stored_conversations(self, context))
        return anchored(self, *found, context, size="conversations")
