"""Texts of the lab's world of which it is known what is alike, to try encoders on that know no other world."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from addlang.lab.facts import RELATIONS, people, say_parallel
from addlang.lab.tasks import PHRASINGS, TASKS, make_with

if TYPE_CHECKING:
    from addlang.analyze.encoders import Known


def known_prompts(seed: int = 0) -> Known:
    """Two prompts of every phrasing of every task, and facts in English, Swahili and Hindi.

    A prompt's subject is its task. Only another phrasing can be its neighbour, so that words alone do not decide.
    """
    from addlang.analyze.encoders import Known

    rng = random.Random(f"known/{seed}")
    facts = [say_parallel(p, rng.choice(RELATIONS), ("en", "sw", "hi"), rng) for p in rng.sample(people(), 12)]
    english, swahili, hindi = (tuple(sentences) for sentences in zip(*facts, strict=True))
    prompts = [
        (make_with(task, phrasing, "en", rng)[0], number, f"{task}/{phrasing}")
        for number, task in enumerate(TASKS)
        for phrasing in PHRASINGS[task]["en"]
        for _ in range(2)
    ]
    texts, subjects, forms = zip(*prompts, strict=True)
    index = {form: i for i, form in enumerate(dict.fromkeys(forms))}
    return Known(texts, subjects, tuple(index[f] for f in forms), english, {"sw": swahili, "hi": hindi})
