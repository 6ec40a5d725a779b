"""Which pairs of the lab model and a phase-2 set are run, and each one's recipe.

``fit`` and ``unseen`` are drawn at random from the same space; some kinds of content stand in ``unseen`` only. The
``volume`` and ``content`` pairs are the referee's test: one content at growing volume, one volume with changing content.
``held-fit`` and ``held-unseen`` are held to the source by a penalty or by KL (guards): what such runs lose has a forecast of its own.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sets import language_of, rows

FIT, UNSEEN, NEW_UNSEEN = 76, 32, 10
HELD_FIT, HELD_UNSEEN, HELD_NEW = 60, 30, 8
COMMON = (
    "english", "similar-sw", "similar-hi", "dissimilar", "raw-sw", "raw-hi", "narrow-sw", "relabelled-en",
    "similar-sw+dissimilar@0.25", "similar-sw+dissimilar@0.5", "similar-sw+dissimilar@0.75",
    "similar-hi+dissimilar@0.5", "english+dissimilar@0.5", "similar-sw+similar-hi@0.5", "raw-en",
)  # fmt: skip
NEW = ("cyrillic-sw", "raw-cyrillic", "narrow-hi", "relabelled-sw", "english+relabelled-en@0.3")  # never in fitting
TOKENS = (30_720, 61_440, 122_880)
ROWS = (200, 800, 3000)
STRATEGIES = ("full", "full", "full", "full", "ssu", "ssu", "replay", "self_anchor")
SEQUENCE, BATCH, REPLAY = 128, 4, 0.1
SAMPLING = {"max_instruction_tokens": 80, "max_answer_tokens": 48}
ANCHOR = {"name": "self_anchor", "anchor": SAMPLING}
# how a run is held: (guard, range of its weight), the commoner the more often it stands here
GUARDS = (
    *[("ewc, own words", (1e2, 1e4))] * 4, *[("ewc", (1e2, 1e4))] * 2, *[("l2sp", (1e-3, 1e-1))] * 2,
    ("kl", (0.1, 1.0)), ("self_anchor", (0.1, 1.0)),
)  # fmt: skip
HELD_STRATEGIES = ("full", "full", "full", "ssu")


@dataclass(frozen=True)
class Pair:
    """The lab model, a set, and how it is trained on."""

    group: str
    number: int
    content: str
    rows: int
    tokens: int
    learning_rate: float
    strategy: str
    seed: int
    guard: str = ""
    weight: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.group}-{self.number:03d}"


def pairs() -> list[Pair]:
    """All of them, in the order in which they are run."""
    out = [_draw(group, i, COMMON) for group, n in (("fit", FIT), ("unseen", UNSEEN - NEW_UNSEEN)) for i in range(n)]
    out += [_draw("unseen", UNSEEN - NEW_UNSEEN + i, (NEW[i % len(NEW)],)) for i in range(NEW_UNSEEN)]
    number = 0
    for content in ("similar-sw", "dissimilar"):
        for tokens in (15_360, 30_720, 61_440, 122_880, 245_760):
            for seed in (0, 1):
                out.append(Pair("volume", number, content, 3000, tokens, 1.5e-3, "full", seed))
                number += 1
    number = 0
    for content in ("english", "similar-sw", "similar-hi", "similar-sw+dissimilar@0.5", "dissimilar", "relabelled-en"):
        for seed in (0, 1):
            out.append(Pair("content", number, content, 3000, 61_440, 1.5e-3, "full", seed))
            number += 1
    out += [_draw_held("held-fit", i, COMMON) for i in range(HELD_FIT)]
    out += [_draw_held("held-unseen", i, COMMON) for i in range(HELD_UNSEEN - HELD_NEW)]
    out += [_draw_held("held-unseen", HELD_UNSEEN - HELD_NEW + i, (NEW[i % len(NEW)],)) for i in range(HELD_NEW)]
    return out


def _draw(group: str, number: int, contents: tuple[str, ...]) -> Pair:
    rng = random.Random(f"{group}/{number}")
    rate = round(10 ** rng.uniform(math.log10(2e-4), math.log10(3e-3)), 6)
    content = contents[number % len(contents)]
    return Pair(group, number, content, rng.choice(ROWS), rng.choice(TOKENS), rate, rng.choice(STRATEGIES), number)


def _draw_held(group: str, number: int, contents: tuple[str, ...]) -> Pair:
    """Up to higher rates than the others: that is what a guard allows."""
    rng = random.Random(f"{group}/{number}")
    rate = round(10 ** rng.uniform(math.log10(4e-4), math.log10(5e-3)), 6)
    guard, (low, high) = rng.choice(GUARDS)
    weight = float(f"{10 ** rng.uniform(math.log10(low), math.log10(high)):.3g}")
    content = contents[number % len(contents)]
    strategy = rng.choice(HELD_STRATEGIES)
    return Pair(
        group, number, content, rng.choice(ROWS), rng.choice(TOKENS), rate, strategy, number, guard, weight
    )  # fmt: skip


def guard_of(pair: Pair) -> list[dict[str, Any]]:
    """What holds a pair's run to the source, as in a recipe."""
    if not pair.guard:
        return []
    guard: dict[str, Any] = {"name": pair.guard, "weight": pair.weight}
    if pair.guard == "ewc, own words":
        guard |= {"name": "ewc", "data": "self", "sampling": {**SAMPLING, "conversations": 500}}
    if guard["name"] == "ewc":
        guard["per"] = "conversation"
    elif pair.guard == "self_anchor":
        guard |= SAMPLING
    return [guard]


def write_data(root: Path, wanted: list[Pair]) -> None:
    """Training sets, and English for calibration, replay and measurement; each written once."""
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for pair in wanted:
        _once(data_path(root, pair), rows(pair.content, pair.rows, 1000 + pair.seed))
    _once(folder / "calibration.jsonl", rows("english", 600, 7))
    _once(folder / "replay.jsonl", rows("english", 1000, 12))


def data_path(root: Path, pair: Pair) -> Path:
    return root / "data" / f"{pair.name}.jsonl"


def _once(path: Path, made: list[dict[str, Any]]) -> None:
    if not path.is_file():
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made), encoding="utf-8")
        os.replace(tmp, path)


def recipe(pair: Pair, root: Path) -> dict[str, Any]:
    """The recipe of a pair, as plain data."""
    data = root / "data"
    datasets: list[dict[str, Any]] = [{"path": str(data_path(root, pair))}]
    if pair.strategy == "replay":
        datasets.append({"path": str(data / "replay.jsonl"), "role": "replay", "weight": REPLAY})
    strategies: dict[str, Any] = {"ssu": {"name": "ssu"}, "self_anchor": ANCHOR}
    return {
        "model_name_or_path": "lab",
        "language": language_of(pair.content),
        "seed": pair.seed,
        "output_dir": str(root / "runs" / pair.name),
        "device": "cpu",
        "datasets": datasets,
        "strategy": strategies.get(pair.strategy, {"name": "full"}),
        "guards": guard_of(pair),
        "tokens": pair.tokens,
        "sequence_length": SEQUENCE,
        "batch_size": BATCH,
        "learning_rate": pair.learning_rate,
        "save_steps": 1000,
        "calibration": {
            "datasets": [{"path": str(data / "calibration.jsonl"), "role": "source"}],
            "sequence_length": SEQUENCE,
            "batch_size": 25,
        },
        "evaluation": {
            "tasks": ["lab"], "replies": None, "batch_size": 64, "sequence_length": SEQUENCE,
            "holdout": 0.1, "holdout_max": 40, "resamples": 100,
        },
    }  # fmt: skip
