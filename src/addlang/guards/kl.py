"""KL to the source model on source-language conversations, with its answers stored once.

Learning without Forgetting (Li and Hoiem, 2016) with data of the source: what the self anchor does with conversations that
the model samples, this does with the conversations that are given.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from addlang.guards.base import ActiveGuard, Guard, GuardContext


class KL(Guard):
    """The conversations are those of the phase's ``calibration``."""

    name = "kl"
    paper = "Learning without Forgetting (Li and Hoiem, 2016; arXiv 1606.09282)"
    summary = "hold the model to the source's distribution on source-language conversations"

    share: float = Field(
        0.1, gt=0, lt=0.9, description="share of every step's tokens that is anchored; counts towards the budget"
    )
    weight: float = Field(0.3, gt=0, description="weight of the mean term against the target's mean loss")
    mode: Literal["kl", "replay", "both"] = Field(
        "kl", description="KL to the source, next-token loss on the words, or both"
    )
    top_k: int = Field(64, gt=0, description="next-token probabilities stored per position; the rest is one bucket")
    temperature: float = Field(1.0, gt=0, description="softens both distributions")
    schedule: Literal["constant", "decay", "ramp"] = Field("constant", description="of the weight over the run")

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
        return frozenset({"source_text"})

    def start(self, context: GuardContext) -> ActiveGuard:
        from addlang.data.cache import fingerprint
        from addlang.guards.anchored import anchored, stored_teacher
        from addlang.guards.teacher import VERSION

        given = context.calibration()
        key = fingerprint(
            "kl", VERSION, context.model_hash, context.behaviour, given.fingerprint, self.top_k, context.sequence_length
        )

        def conversations() -> tuple[list[list[int]], dict[str, Any]]:
            whole = [list(ids[: context.sequence_length]) for ids in given.ids]
            cut = sum(len(ids) > context.sequence_length for ids in given.ids)
            return whole, {"conversations": len(whole), "cut": cut, "source": given.source}

        found = stored_teacher(context, key, self.top_k, conversations)
        return anchored(self, *found, context, size="calibration.sequences")
