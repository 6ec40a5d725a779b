"""``addlang adapt``: from a few arguments to a full recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from addlang.errors import AddlangError, did_you_mean
from addlang.recipe import ALIASES, Evaluation, Phase, Recipe

# The lab model is a thousand times smaller than the paper's: a learning rate of 5e-5 would leave it where it is.
LAB_DEFAULTS: dict[str, Any] = {
    "sequence_length": 128, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 0.05, "weight_decay": 0.01, "save_steps": 200,
}  # fmt: skip
LAB_TOKENS = 300 * 512


def adapt_recipe(
    model: str,
    texts: Sequence[str],
    *,
    language: str,
    output_dir: str,
    strategy: str = "ssu",
    tokens: str | int | None = None,
    seed: int = 0,
    weights: Sequence[float] = (),
    replay: str | None = None,
    replay_share: float = 0.1,
    calibration: str | None = None,
    extra: Sequence[tuple[str, Any]] = (),
) -> Recipe:
    """The recipe of one continual pre-training phase.

    Args:
        extra: ``(key, value)`` pairs: any key of the recipe, the phase, the strategy, calibration or evaluation.

    Raises:
        AddlangError: every problem at once.
    """
    from addlang.strategies import load_strategy

    if weights and len(weights) != len(texts):
        raise AddlangError(
            f"{len(texts)} texts but {len(weights)} weights",
            "give --weight once per TEXT, in the same order, or not at all",
        )
    left = 1.0 - (replay_share if replay else 0.0)
    total = sum(weights)
    datasets: list[dict[str, Any]] = [{"path": t} for t in texts]
    for spec, weight in zip(datasets, weights, strict=False):
        spec["weight"] = left * weight / total
    if replay is not None:
        if not 0 < replay_share < 1:
            raise AddlangError(
                f"--replay_share {replay_share} is no share", "give a number between 0 and 1, such as 0.1"
            )
        datasets.append({"path": replay, "role": "replay", "weight": replay_share})
    data: dict[str, Any] = {
        "model_name_or_path": model, "language": language, "output_dir": output_dir, "seed": seed,
        "datasets": datasets, "strategy": {"name": strategy}, "tokens": tokens, "evaluation": {}, "calibration": {},
    }  # fmt: skip
    if model == "lab":
        data.update(LAB_DEFAULTS)
        if tokens is None and not any(key == "epochs" for key, _ in extra):
            data["tokens"] = LAB_TOKENS
        data["evaluation"] = {"tasks": ["lab"], "sequence_length": 128}
        if calibration is None:
            calibration = lab_calibration()
            data["calibration"] = {"sequence_length": 128}
    if calibration is not None:
        data["calibration"]["datasets"] = [{"path": calibration, "role": "source"}]
    try:
        options = set(load_strategy(strategy).model_fields)
    except AddlangError:  # unknown: the recipe says so, beside its other problems
        options = set()
    unknown = [hint for key, value in extra if (hint := _place(data, key.replace("-", "_"), value, options))]
    return Recipe.parse(data, where="addlang adapt", files=True, problems=unknown)


def _place(data: dict[str, Any], key: str, value: Any, options: set[str]) -> str | None:
    """Put ``--key value`` where the recipe has that key, dots leading into mappings; the problem if it has none."""
    path = key.split(".")
    head = path[0]
    if head != "phases" and (head in Recipe.model_fields or head in Phase.model_fields):
        pass
    elif head in options:
        path = ["strategy", *path]
    elif head in Evaluation.model_fields:
        path = ["evaluation", *path]
    else:
        known = {*Recipe.model_fields, *Phase.model_fields, *Evaluation.model_fields, *options} - {"phases", "name"}
        alias = ALIASES.get(head)
        return f"--{key}: unknown option. " + (f"addlang calls it '{alias}'" if alias else did_you_mean(head, known))
    node: Any = data
    for parent in path[:-1]:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"--{key}: '{parent}' is already set to a plain value"
    node[path[-1]] = value
    return None


def lab_calibration() -> str:
    """English conversations of the lab's world, for scoring the lab model; written once to the cache."""
    from addlang.data.prepare import cache_root
    from addlang.lab.world import write_dataset

    path = cache_root() / "lab" / "calibration-english-600.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_dataset("english", path, 600, 7)
    return str(path)
