"""Scaling an update back and merging on the lab: English and Swahili of many mixtures of the same three trained models.

    python benchmarks/scale_back.py OUT [--jobs 2] [--json FILE]

Trains the lab's arms ``full`` at two learning rates and ``ssu``, three seeds each (ordinary runs in OUT; finished ones are
taken as they are), then merges and measures. ``against`` is the difference in English from the same seed's update scaled back
to the same bits per byte of Swahili, read off linearly between its shares: what the method does that one number does not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
ARMS = ("full-0.0015", "full-0.0008", "ssu-0.002")
SHARES = tuple(k / 10 for k in range(11))
KEEP = 0.8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def mixtures(run: Path, ssu: Path) -> dict[str, dict[str, Any]]:
    """Label -> merge, for one seed."""

    def revert(**parameters: Any) -> dict[str, Any]:
        return {"merge_method": "revert", "model": str(run), "source_model": "lab", "parameters": parameters}

    def task(method: str, **parameters: Any) -> dict[str, Any]:
        return {"merge_method": method, "base_model": "lab", "models": [str(run)], "parameters": parameters}

    def without(*modules: str) -> dict[str, Any]:
        return revert(modules=dict.fromkeys(modules, 0.0))

    def swap(**parameters: Any) -> dict[str, Any]:
        return {"merge_method": "layer_swap", "task_model": "lab", "language_model": str(run), "parameters": parameters}

    return {
        "attention goes back": without(*ATTENTION),
        "MLPs go back": without(*MLP),
        "embedding and head go back": without("embed_tokens", "lm_head"),
        "down projections go back": without("down_proj"),
        "half of the weights go back: the smallest changes": revert(density=0.5),
        "80 % of the weights go back: the smallest changes": revert(density=0.2),
        "SSU's columns go back after training": revert(plan=str(ssu)),
        "DARE, half dropped, the rest doubled": task("dare_linear", density=0.5),
        "DARE, 90 % dropped, the rest times 10": task("dare_linear", density=0.1),
        "SLERP, t = 0.8": {
            "merge_method": "slerp", "base_model": "lab", "models": [str(run)], "parameters": {"t": 0.8},
        },
        "layer swap: bottom 1 and top 1 of 3 layers": swap(bottom=1, top=1, transition=0),
        "layer swap: bottom 1 of 3 layers": swap(bottom=1, top=0, transition=0),
        "special tokens restored": {
            "merge_method": "special_tokens", "model": str(run), "restore_special_tokens": "lab",
        },
    }  # fmt: skip


def train(out: Path, jobs: int) -> None:
    """The runs that are mixed."""
    from addlang.lab import grid
    from addlang.sweep import sweep

    arms = [a for a in grid.arms(False) if a.name in ARMS and a.experiment == "cpt-sw"]
    grid.write_data(out, arms)
    todo = [((a.name, s), grid.recipe_data(a, s, out)) for a in arms for s in SEEDS]
    for (name, seed), _ in sweep(todo, workers=jobs, threads=1, cache=out / "cache", where="scale_back"):
        print(f"{name}, seed {seed}: trained", flush=True)


def measure(directory: Path, seed: int, out: Path) -> dict[str, float]:
    """English and Swahili of a model, on the lab's items."""
    import torch

    from addlang.data.prepare import labelled_chats, labelled_texts
    from addlang.evaluate.suite import build_suite, cached_evaluate
    from addlang.lab import grid
    from addlang.models import Checkpoint, load_model, load_tokenizer, resolve
    from addlang.recipe import Recipe

    arm = next(a for a in grid.arms(False) if a.name == ARMS[0])
    recipe = Recipe.parse(grid.recipe_data(arm, seed, out))
    suite = build_suite(
        recipe.evaluation,
        tokenizer=load_tokenizer(resolve("lab")),
        heldout_target=labelled_texts(recipe.evaluation.target_datasets),
        source_language="en",
        target_language="sw",
        sequence_length=128,
        heldout_chats=labelled_chats(recipe.evaluation.target_datasets),
    )
    model = load_model(directory, dtype=torch.float32)
    rows = cached_evaluate(model, Checkpoint(directory).hash, suite, out / "cache" / "evaluations")
    found = {(m.role, m.metric): m.value for m in rows}
    return {
        "english": found["source", "exact_match"],
        "swahili": found["target", "bits_per_byte"],
        "cloze": found["target", "accuracy"],
    }


def merged(spec: dict[str, Any], seed: int, out: Path) -> dict[str, float]:
    from addlang.merge.spec import parse
    from addlang.merge.write import merge_models

    with tempfile.TemporaryDirectory() as folder:
        merge_models(parse(spec), Path(folder) / "model")
        return measure(Path(folder) / "model", seed, out)


def to_budget(run: Path, seed: int, keep: float, by: str, out: Path) -> dict[str, float]:
    """The model that ``addlang merge revert-to-budget`` chooses, with the share it keeps."""
    from addlang.merge.to_budget import revert_to_budget

    with tempfile.TemporaryDirectory() as folder:
        record = revert_to_budget(str(run), Path(folder) / "model", keep=keep, by=by)
        found = measure(Path(folder) / "model", seed, out)
    return {**found, "share": record["budget"]["share_of_update"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["ADDLANG_CACHE"] = str(args.out / "cache")
    train(args.out, args.jobs)
    runs = args.out / "runs" / "cpt-sw"
    rows: dict[str, list[dict[str, float]]] = {}
    curves = {}
    for seed in SEEDS:
        run = runs / f"{ARMS[0]}-s{seed}"

        def add(label: str, found: dict[str, float]) -> None:
            rows.setdefault(label, []).append(found)

        curve = [merged(_scaled(run, share), seed, args.out) for share in SHARES]
        curves[seed] = curve
        for share, found in zip(SHARES, curve, strict=True):
            add(f"full, lr 1.5e-3, scaled by {share:g}", found)
        for arm in ARMS[1:]:
            add(f"trained: {arm}", measure(runs / f"{arm}-s{seed}", seed, args.out))
        for label, spec in mixtures(run, runs / f"ssu-0.002-s{seed}").items():
            add(label, merged(spec, seed, args.out))
        add("SSU, lr 2e-3, scaled by 0.8", merged(_scaled(runs / f"ssu-0.002-s{seed}", 0.8), seed, args.out))
        for by in ("overall", "module", "layer"):
            add(f"revert-to-budget --keep {KEEP} --by {by}", to_budget(run, seed, KEEP, by, args.out))
        print(f"seed {seed}: measured", flush=True)
    table = {label: _summary(found, curves) for label, found in rows.items()}
    print(_markdown(table))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "table": table}, indent=1))


def _scaled(run: Path, share: float) -> dict[str, Any]:
    return {"merge_method": "revert", "model": str(run), "source_model": "lab", "parameters": {"scale": share}}


def _summary(found: list[dict[str, float]], curves: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    from addlang.evaluate.statistics import interpolate_at, t_interval

    out: dict[str, Any] = {}
    for key in found[0]:
        interval = t_interval([f[key] for f in found])
        out[key] = [interval.mean, interval.low, interval.high]
    there = []
    for f, curve in zip(found, curves.values(), strict=True):
        english = interpolate_at([c["swahili"] for c in curve], [c["english"] for c in curve], f["swahili"])
        there.append(None if english is None else f["english"] - english)
    if None not in there:
        interval = t_interval([d for d in there if d is not None])
        out["against"] = [interval.mean, interval.low, interval.high]
    return out


def _markdown(table: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | English exact match | Swahili bits per byte | cloze | against scaling back | share |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in table.items():
        english = "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * x for x in row["english"]))
        against = (
            "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * x for x in row["against"])) if "against" in row else "-"
        )
        share = "{:.2f} [{:.2f}, {:.2f}]".format(*row["share"]) if "share" in row else ""
        lines.append(
            f"| {label} | {english} | {row['swahili'][0]:.3f} | {100 * row['cloze'][0]:.1f} % | {against} | {share} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
