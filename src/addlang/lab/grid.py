"""``addlang lab``: a grid of real runs on the embedded world, side by side, and what they show.

Every arm is an ordinary recipe carried out by :func:`addlang.run.execute` in a run directory of its own; this file only
lists the arms, keeps the cores busy and gathers the results. Interrupted, it continues where it was.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.export import write_json
from addlang.sweep import sweep

LANGUAGE_NAMES = {"sw": "Swahili", "hi": "Hindi"}
TOKENS = 240 * 512
DOCUMENTS = 3000
HELDOUT = 200

NOTES = (
    "The model has 0.9 million parameters and was trained on exactly the tasks it is tested on. "
    "What holds here need not hold at 7 billion.",
    "Compare arms by the front and at equal gain. Retention at one equal learning rate alone flatters methods that learn less.",
    "A lower learning rate alone already keeps much English: that is why full fine-tuning stands in the grid twice.",
    "All arms read the same number of tokens; replayed and anchored ones count.",
    "The self anchor and EWC on its own words are at their best here: the model samples from exactly the tasks that are tested.",
    "A difference between Wanda and random columns is that of this one tiny model; another base may show another.",
    "Two-phase runs are one seed each and carry no interval, unless the lab was run with --full.",
)


@dataclass(frozen=True)
class Arm:
    """One line of an experiment: settings that a seed completes to a recipe."""

    experiment: str
    name: str
    label: str
    language: str
    data: str
    strategy: dict[str, Any]
    learning_rate: float
    replay: bool = False
    tokens: int = TOKENS
    note: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    extra: dict[str, Any] = field(default_factory=dict)


# The lab's turns are short; with the defaults a sampled turn that never ends would only cost time.
ANCHOR = {"name": "self_anchor", "anchor": {"max_instruction_tokens": 80, "max_answer_tokens": 48}}
OWN_WORDS = {
    "name": "ewc",
    "data": "self",
    "sampling": {"conversations": 500, "max_instruction_tokens": 80, "max_answer_tokens": 48},
}
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("full", {"name": "full"}, False),
    "ssu": ("SSU-Wanda", {"name": "ssu"}, False),
    "random": ("random columns", {"name": "ssu", "scorer": "random"}, False),
    "replay": ("full, 10 % replay", {"name": "full"}, True),
    "anchor": ("self anchor", ANCHOR, False),
    "ewc": ("EWC on its own words", {"name": "full"}, False),
}
GUARDS: dict[str, list[dict[str, Any]]] = {"ewc": [OWN_WORDS]}
# Full fine-tuning's rates span the target gain of the other arms, so that each can be compared with it at equal gain.
RATES = {
    "full": (8e-4, 1.5e-3),
    "ssu": (2e-3,),
    "random": (2e-3,),
    "replay": (1.5e-3,),
    "anchor": (1.5e-3,),
    "ewc": (3e-3,),  # a penalty wants a higher rate
}
FULL_RATES = {
    "full": (4e-4, 8e-4, 1.5e-3, 2.5e-3),
    "ssu": (1e-3, 2e-3, 3e-3),
    "random": (1e-3, 2e-3, 3e-3),
    "replay": (8e-4, 1.5e-3, 2.5e-3),
    "anchor": (8e-4, 1.5e-3, 2.5e-3),
    "ewc": (2.5e-3, 4e-3, 6e-3),
}


def arms(full: bool) -> list[Arm]:
    """The default grid, or the long one."""
    seeds = (0, 1, 2, 3, 4) if full else (0, 1, 2)
    out: list[Arm] = []
    for language in ("sw", "hi") if full else ("sw",):
        for method, rates in (FULL_RATES if full else RATES).items():
            label, strategy, replay = METHODS[method]
            for rate in rates:
                name, words = f"{method}-{rate:g}", f"{label}, lr {rate:g}"
                extra = {"guards": GUARDS[method]} if method in GUARDS else {}
                arm = Arm(
                    f"cpt-{language}",
                    name,
                    words,
                    language,
                    language,
                    strategy,
                    rate,
                    replay=replay,
                    seeds=seeds,
                    extra=extra,
                )
                out.append(arm)
        for kind in ("similar", "dissimilar") if language == "sw" else ("similar",):  # the dissimilar set is in both
            data = f"similar-{language}" if kind == "similar" else kind
            for method in ("full", "ssu"):
                label, strategy, _ = METHODS[method]
                name, words = f"{kind}-{method}", f"{kind} data, {label}"
                seeds_here = seeds if full else (0,)
                out.append(
                    Arm(
                        f"two-phase-{language}",
                        name,
                        words,
                        language,
                        data,
                        strategy,
                        2e-3,
                        tokens=TOKENS // 2,
                        seeds=seeds_here,
                    )
                )
    return out


def recipe_data(arm: Arm, seed: int, root: Path) -> dict[str, Any]:
    """The recipe of one run, as plain data."""
    data = root / "data"
    datasets: list[dict[str, Any]] = [{"path": str(data / f"{arm.data}.jsonl")}]
    if arm.replay:
        datasets.append({"path": str(data / "english.jsonl"), "role": "replay", "weight": 0.1})
    return {
        "model_name_or_path": "lab",
        "language": arm.language,
        "seed": seed,
        "output_dir": str(root / "runs" / arm.experiment / f"{arm.name}-s{seed}"),
        "device": "cpu",
        "datasets": datasets,
        "strategy": arm.strategy,
        "tokens": arm.tokens,
        "sequence_length": 128,
        "batch_size": 4,
        "learning_rate": arm.learning_rate,
        "logging_steps": 10,
        "save_steps": 100,
        "calibration": {
            "datasets": [{"path": str(data / "calibration.jsonl"), "role": "source"}],
            "sequence_length": 128,
            "batch_size": 25,
        },
        "evaluation": {
            "tasks": ["lab"] if arm.experiment.startswith("cpt") else ["lab", "lab-target"],
            "replies": None,
            "source_datasets": [{"path": str(data / "english-heldout.jsonl"), "role": "source"}],
            "target_datasets": [{"path": str(data / f"{arm.data}-heldout.jsonl")}],
            "batch_size": 64,
            "sequence_length": 128,
        },
        **arm.extra,
    }


def write_data(root: Path, grid: list[Arm]) -> None:
    """The world's text for these arms; written once."""
    from addlang.lab.world import write_dataset

    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {(a.data, DOCUMENTS, 11) for a in grid} | {("english", 1000, 12)}
    for kind, n, seed in sorted(wanted):
        _once(folder / f"{kind}.jsonl", lambda p, k=kind, m=n, s=seed: write_dataset(k, p, m, s))  # type: ignore[misc]
    _once(folder / "calibration.jsonl", lambda p: write_dataset("english", p, 600, 7))
    _once(folder / "english-heldout.jsonl", lambda p: write_heldout("en", p, HELDOUT, 13, folder))
    for kind in sorted({a.data for a in grid}):
        _once(folder / f"{kind}-heldout.jsonl", lambda p, k=kind: write_heldout(k, p, HELDOUT, 13, folder))  # type: ignore[misc]


def write_heldout(kind: str, path: Path, n: int, seed: int, folder: Path) -> None:
    """Rows like those of training data ``kind``, none of them in it."""
    from addlang.lab.world import LANGUAGES, conversations, documents

    if kind in LANGUAGES:
        rows: list[dict[str, Any]] = [{"text": t} for t in documents(kind, n, seed, split="eval")]
    else:
        trained = set((folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines())
        drawn = {
            json.dumps({"messages": m}, ensure_ascii=False): {"messages": m} for m in conversations(kind, 8 * n, seed)
        }
        rows = [row for line, row in drawn.items() if line not in trained][:n]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _once(path: Path, write: Any) -> None:
    if not path.is_file():
        tmp = path.with_name(path.name + ".tmp")
        write(tmp)
        os.replace(tmp, path)


def run_lab(root: Path, *, full: bool = False, jobs: int | None = None, overwrite: bool = False) -> Path:
    """Carry out the grid in ``root`` and write ``lab.json`` and ``report.html``.

    Args:
        jobs: runs at a time, each with its share of the cores.

    Raises:
        AddlangError: the directory holds something else, or a run failed (its own error is shown).
    """
    import shutil

    from addlang.progress import note, progress
    from addlang.report import write_lab_report

    marker = root / "grid.json"
    wanted = {"grid": "full" if full else "default", "version": 1}
    if root.exists() and not root.is_dir():
        raise AddlangError(f"output directory '{root}' is a file", "choose another --output_dir")
    if root.is_dir() and any(root.iterdir()):
        there = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
        if there is None:
            raise AddlangError(f"'{root}' is not empty and holds no lab", "choose another --output_dir")
        if overwrite:
            shutil.rmtree(root)
        elif there != wanted:
            raise AddlangError(
                f"'{root}' holds the {there['grid']} lab",
                f"add {'--full' if there['grid'] == 'full' else 'no --full'}, or start again with --overwrite",
            )
    root.mkdir(parents=True, exist_ok=True)
    write_json(marker, wanted)
    started = time.monotonic()
    grid = arms(full)
    write_data(root, grid)
    todo = [(arm, seed) for arm in grid for seed in arm.seeds]
    # the first run of every experiment measures the base model; the others find that measurement in the cache
    todo.sort(key=lambda x: (x[1], x[0].experiment))
    cores = os.cpu_count() or 1
    jobs = max(1, min(jobs or cores, len(todo)))
    note(f"{len(todo)} runs, {jobs} at a time; results go to {root}")
    results: dict[tuple[str, str, int], dict[str, Any]] = {}
    with progress("lab", total=len(todo), unit="runs") as bar:
        recipes = [((arm, seed), recipe_data(arm, seed, root)) for arm, seed in todo]
        runs = sweep(recipes, workers=jobs, threads=max(1, cores // jobs), cache=root / "cache", where="lab")
        for (arm, seed), path in runs:
            results[arm.experiment, arm.name, seed] = gather(path, arm, seed)
            bar.update(len(results))
    write_json(root / "lab.json", summary(grid, results, root, time.monotonic() - started))
    write_lab_report(root)
    return root


def gather(path: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """One run's numbers, before and after."""
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    proof = json.loads((path / "proof.json").read_text(encoding="utf-8"))

    def value(model: str, metric: str, role: str) -> float | None:
        found = [r["value"] for r in rows if r["model"] == model and r["metric"] == metric and r["role"] == role]
        if len(found) > 1:
            raise AddlangError(f"{path}: {len(found)} results for {metric} of role {role}")
        return found[0] if found else None

    def numbers(model: str) -> dict[str, float | None]:
        return {
            "english": value(model, "exact_match", "source"),
            "target_bpb": value(model, "bits_per_byte", "target"),
            "english_bpb": value(model, "bits_per_byte", "source"),
            "cloze": value(model, "accuracy", "target"),
            "target_exact_match": value(model, "exact_match", "target"),
        }

    plan = next(iter(state["plan"].values()))
    return {
        "seed": seed,
        **numbers("after"),
        "before": numbers("before"),
        "seconds": round(state["seconds"], 1),
        "trainable_fraction": plan["trainable_fraction"],
        "proof_ok": proof["ok"],
        "run": str(path.name),
    }


def summary(
    grid: list[Arm], results: dict[tuple[str, str, int], dict[str, Any]], root: Path, seconds: float
) -> dict[str, Any]:
    """``lab.json``."""
    from addlang.run import versions

    titles = {
        "cpt": "Continual pre-training on raw {} text, {:,} tokens",
        "two-phase": "Tuning the English model on instructions in {} (similar) and on unlike tasks (dissimilar), {:,} tokens",
    }
    experiments = []
    for name in dict.fromkeys(a.experiment for a in grid):
        kind, _, language = name.rpartition("-")
        members = [a for a in grid if a.experiment == name]
        runs = {a.name: [results[a.experiment, a.name, s] for s in a.seeds] for a in members}
        first = runs[members[0].name][0]
        experiments.append(
            {
                "name": name,
                "title": titles[kind].format(LANGUAGE_NAMES[language], members[0].tokens),
                "language": language,
                "baseline": first["before"],
                "arms": [
                    {
                        "name": a.name,
                        "label": a.label,
                        "strategy": a.strategy["name"],
                        "learning_rate": a.learning_rate,
                        "data": a.data,
                        "note": a.note,
                        "runs": [
                            {k: v for k, v in r.items() if k != "before"} | {"baseline": r["before"]}
                            for r in runs[a.name]
                        ],
                    }
                    for a in members
                ],
            }
        )
    return {
        "language": experiments[0]["language"],
        "seeds": list(grid[0].seeds),
        "baseline": experiments[0]["baseline"],
        "experiments": experiments,
        "notes": list(NOTES),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "command": "addlang lab",
    }
