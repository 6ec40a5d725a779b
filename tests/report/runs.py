"""Synthetic run directories: every file of a run, without running anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm")


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def comparison(task: str = "lab", role: str = "source", **changes: Any) -> dict[str, Any]:
    """A row in which exact match fell from 80 % to 77.68 % (kept 97.1 % [95.2, 99.0])."""
    row: dict[str, Any] = {
        "task": task,
        "role": role,
        "language": "en" if role == "source" else "ig",
        "metric": "exact_match",
        "unit": "share",
        "higher_is_better": True,
        "before": 0.8,
        "after": 0.7768,
        "difference": -0.0232,
        "low": -0.0384,
        "high": -0.008,
        "p": 0.0031,
        "relative": -0.029,
        "relative_low": -0.048,
        "relative_high": -0.010,
        "n": 480,
        "method": "paired bootstrap over items, 2000 resamples; p: exact McNemar",
    }
    return {**row, **changes}


def bits(task: str = "text-ig", role: str = "target", **changes: Any) -> dict[str, Any]:
    """A row in which bits per byte fell by 31 % [29, 33]."""
    row = {
        "metric": "bits_per_byte",
        "unit": "bits/byte",
        "higher_is_better": False,
        "before": 2.0,
        "after": 1.38,
        "difference": -0.62,
        "low": -0.66,
        "high": -0.58,
        "p": 0.0005,
        "relative": -0.31,
        "relative_low": -0.33,
        "relative_high": -0.29,
        "n": 500,
        "method": "paired bootstrap over items, 2000 resamples; p: bootstrap",
    }
    return comparison(task, role, **{**row, **changes})


def training_log(phase: str, steps: int = 1200, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for step in range(10, steps + 1, 10):
        rows.append(
            {
                "phase": phase,
                "step": step,
                "steps": steps,
                "tokens": step * 16_384,
                "loss": 1.6 + 2.4 * math.exp(-step / 220) + draw.gauss(0, 0.06),
                "learning_rate": 5e-5 * min(1, step / 60) * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "grad_norm": 0.6 + 1.5 * math.exp(-step / 90) + abs(draw.gauss(0, 0.08)),
                "tokens_per_second": 12_300 + draw.gauss(0, 200),
                "seconds": step * 1.3,
            }
        )
    return rows


def tensors(layers: int = 3, share: float = 0.5, changed: int = 0) -> list[dict[str, Any]]:
    rows = []

    def add(name: str, group: str, layer: int | None, elements: int, part: float) -> None:
        frozen = int(elements * part)
        kind = "none" if not frozen else "all" if frozen == elements else "columns"
        rows.append(
            {
                "name": name,
                "kind": kind,
                "group": group,
                "layer": layer,
                "elements": elements,
                "frozen": frozen,
                "frozen_changed": 0,
                "moved": elements - frozen,
            }
        )

    add("model.embed_tokens.weight", "embed_tokens", None, 115_200, 0)
    for layer in range(layers):
        for g in GROUPS:
            part = 1.0 if g == "k_proj" and layer == 0 else 0.25 if g == "down_proj" else share
            add(f"model.layers.{layer}.{g}.weight", g, layer, 128 if "norm" in g else 16_384, part)
    add("model.norm.weight", "norm", None, 128, share)
    add("lm_head.weight", "lm_head", None, 115_200, 0)
    rows[1]["frozen_changed"] = changed
    return rows


def proof(phases: Sequence[str] = ("adapt",), layers: int = 3, share: float = 0.5, changed: int = 0) -> dict[str, Any]:
    parts = []
    for name in phases:
        rows = tensors(layers, share, changed)
        frozen = sum(t["frozen"] for t in rows)
        parts.append(
            {
                "phase": name,
                "ok": not changed,
                "source": "lab",
                "frozen_elements": frozen,
                "frozen_changed": changed,
                "trainable_elements": sum(t["elements"] for t in rows) - frozen,
                "trainable_moved": sum(t["moved"] for t in rows) - 1200,
                "tensors": rows,
            }
        )
    return {"ok": not changed, "phases": parts}


def recipe(model: str = "allenai/OLMo-2-1124-7B-Instruct", phases: Sequence[str] = ("adapt",)) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "revision": None,
        "output_dir": "out",
        "language": "ig",
        "source_language": "en",
        "seed": 0,
        "phases": [
            {
                "name": name,
                "datasets": [{"path": "data/ig.jsonl", "role": "target"}],
                "tokens": 19_660_800,
                "sequence_length": 512,
                "batch_size": 32,
                "learning_rate": 5e-5,
                "lr_scheduler_type": "cosine",
                "weight_decay": 0.01,
                "strategy": {"name": "ssu", "scorer": "wanda", "ratio": 0.5, "granularity": "column"},
            }
            for name in phases
        ],
    }


def state(phases: Sequence[str] = ("adapt",), **changes: Any) -> dict[str, Any]:
    data = {
        "status": "finished",
        "fingerprint": "0123456789abcdef",
        "started": 1_795_190_400.0,
        "seconds": 1612.4,
        "warnings": ["calibration used 480 of 500 sequences", "the tokenizer adds a BOS token to every document"],
        "not_run": [{"task": "ifeval", "reason": "the data set could not be loaded offline"}],
        "versions": {"addlang": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0"},
        "device": "CPU (x86_64, 2 threads)",
        "data": {
            name: {
                "sources": [
                    {
                        "path": "data/cpt/ig.jsonl",
                        "role": "target",
                        "rows": 21_000,
                        "documents": 20_431,
                        "tokens": 9_812_345,
                        "bytes": 31_234_567,
                        "duplicates": 512,
                        "licenses": {"CC-BY-4.0": 20_000, "ODC-BY": 431},
                        "epochs": 1.998,
                    },
                    {
                        "path": "HuggingFaceH4/some_replay",
                        "role": "replay",
                        "documents": 900,
                        "tokens": 812_345,
                        "bytes": 3_234_567,
                        "duplicates": 2,
                        "licenses": {},
                        "epochs": 0.4,
                    },
                ],
                "heldout": {"documents": 500, "bytes": 812_345},
            }
            for name in phases
        },
        "plan": {
            name: {
                "strategy": "ssu",
                "scorer": "wanda",
                "ratio": 0.5,
                "ties_broken_by_seed": 0,
                "calibration": {"source": "built-in English", "sequences": 480, "tokens": 123_456},
                "trainable_fraction": 0.738,
            }
            for name in phases
        },
    }
    return {**data, **changes}


def results(rows: Sequence[Mapping[str, Any]], models: Sequence[str] = ("before", "after")) -> list[dict[str, Any]]:
    keep = ("task", "role", "language", "metric", "unit", "higher_is_better", "n")
    found = []
    for c in rows:
        for i, model in enumerate(models):
            value = c["before"] + (c["after"] - c["before"]) * i / (len(models) - 1)
            settings = {"decoding": "greedy", "max_new_tokens": 24}
            row = {"model": model, "phase": model, "version": "1", "seed": 0, "settings": settings}
            found.append({**{k: c[k] for k in keep}, **row, "value": value, "stderr": 0.018})
    return found


def items(right: float, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for i in range(40):
        ok = draw.random() < right
        detail = {
            "prompt": f"Sort these words: tree, apple, river, {i}",
            "answer": "apple, river, tree",
            "reply": "apple, river, tree" if ok else "apple osisi river",
        }
        rows.append({"id": f"sort-{i}", "numerator": float(ok), "denominator": 1.0, "cluster": None, "detail": detail})
    return rows


def many_rows() -> list[dict[str, Any]]:
    """A table with everything: kept, lost, gained, inconclusive, no interval, zero before."""
    none = {"low": None, "high": None, "relative_low": None, "relative_high": None, "p": None}
    return [
        comparison(),
        comparison(
            "gsm8k",
            before=0.52,
            after=0.515,
            difference=-0.005,
            low=-0.03,
            high=0.02,
            p=0.71,
            relative=-0.0096,
            relative_low=-0.058,
            relative_high=0.039,
            n=1319,
            metric="exact_match",
        ),
        bits(
            "text-en",
            "source",
            before=0.81,
            after=0.829,
            difference=0.019,
            low=0.014,
            high=0.024,
            relative=0.0235,
            relative_low=0.017,
            relative_high=0.03,
            n=60,
        ),
        comparison(
            "replies",
            metric="sentences_in_language",
            before=0.985,
            after=0.962,
            difference=-0.023,
            low=-0.041,
            high=-0.006,
            p=0.008,
            relative=-0.0234,
            relative_low=-0.042,
            relative_high=-0.006,
            n=60,
        ),
        bits(),
        comparison(
            "cloze-ig",
            "target",
            metric="accuracy",
            before=0.11,
            after=0.41,
            difference=0.30,
            low=0.26,
            high=0.34,
            p=1e-9,
            relative=2.727,
            relative_low=2.1,
            relative_high=3.6,
            n=400,
        ),
        comparison(
            "mt-en-ig",
            "target",
            metric="chrf",
            unit="points",
            before=0.0,
            after=21.3,
            difference=21.3,
            relative=None,
            **none,
        ),
        comparison(
            "harmbench",
            "safety",
            metric="refused",
            before=0.9,
            after=0.88,
            difference=-0.02,
            low=-0.06,
            high=0.02,
            p=0.4,
            relative=-0.022,
            relative_low=-0.066,
            relative_high=0.022,
            n=320,
        ),
    ]


def write_run(
    root: Path,
    *,
    rows: Sequence[Mapping[str, Any]] | None = (),
    phases: Sequence[str] = ("adapt",),
    layers: int = 3,
    share: float = 0.5,
    changed: int = 0,
    model: str = "allenai/OLMo-2-1124-7B-Instruct",
    **state_changes: Any,
) -> Path:
    """A complete run directory; ``rows`` are those of ``comparison.json`` (default: kept and gained)."""
    root.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe(model, phases), sort_keys=False, allow_unicode=True)
    (root / "recipe.yaml").write_text(text, encoding="utf-8")
    for i, name in enumerate(phases):
        own = root if i == len(phases) - 1 else root / "phases" / name
        write_jsonl(own / "metrics.jsonl", training_log(name, seed=i))
    models = ["before", *phases[:-1], "after"]
    if rows is not None:
        table = list(rows) or [comparison(), bits()]
        write_json(root / "comparison.json", table)
        write_jsonl(root / "results.jsonl", results(table, models))
    for i, model_name in enumerate(("before", "after")):
        write_jsonl(root / "samples" / model_name / "lab.jsonl", items(0.8 - 0.1 * i, i))
    write_json(root / "proof.json", proof(phases, layers, share, changed))
    write_json(root / "state.json", state(phases, **state_changes))
    return root


def lab(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """A lab result of the shape of the prototype's."""

    def arm(
        name: str,
        label: str,
        strategy: str,
        rate: float,
        english: float,
        gain: float,
        n: Sequence[int],
        tuning: bool = False,
    ) -> dict[str, Any]:
        draw = random.Random(name)
        runs = []
        for seed in n:
            run = {"seed": seed, "english": english + draw.gauss(0, 0.012), "seconds": 17.2, "proof_ok": True}
            if tuning:
                run["target_exact_match"] = gain + draw.gauss(0, 0.01)
            else:
                run["target_bpb"] = gain + draw.gauss(0, 0.002)
                run["cloze"] = 0.42 + draw.gauss(0, 0.01)
            runs.append({**run, "trainable_fraction": 1.0 if strategy == "full" else 0.62})
        return {"name": name, "label": label, "strategy": strategy, "learning_rate": rate, "note": "", "runs": runs}

    return {
        "language": "sw",
        "seeds": list(seeds),
        "baseline": {"english": 0.819, "target_bpb": 1.92, "cloze": 0.05},
        "experiments": [
            {
                "name": "cpt-sw",
                "title": "Continual pre-training on raw Swahili",
                "arms": [
                    arm("full-2e-3", "full, 2e-3", "full", 2e-3, 0.428, 0.366, seeds),
                    arm("full-1.2e-3", "full, 1.2e-3", "full", 1.2e-3, 0.705, 0.381, seeds),
                    arm("ssu-wanda", "SSU-Wanda, 2e-3", "ssu", 2e-3, 0.641, 0.379, seeds),
                    arm("ssu-random", "random columns, 2e-3", "ssu", 2e-3, 0.633, 0.380, seeds),
                    arm("replay", "full + 10 % replay, 2e-3", "full", 2e-3, 0.696, 0.367, seeds),
                ],
            },
            {
                "name": "two-phase",
                "title": "Two-phase tuning on instructions",
                "arms": [
                    arm("similar-full", "full, similar", "full", 1e-3, 0.626, 0.41, [0], tuning=True),
                    arm("ssu-similar", "SSU, similar", "ssu", 1e-3, 0.687, 0.43, [0], tuning=True),
                    arm("dissimilar-full", "full, dissimilar", "full", 1e-3, 0.220, 0.30, [0], tuning=True),
                    arm("ssu-dissimilar", "SSU, dissimilar", "ssu", 1e-3, 0.35, 0.29, [0], tuning=True),
                ],
            },
        ],
        "notes": [
            "At this scale full fine-tuning at a lower learning rate closes most of SSU's advantage.",
            "Wanda hardly differs from random columns: a tiny model has no outlier features.",
        ],
        "seconds": 171.3,
        "versions": {"addlang": "0.1.0", "torch": "2.9.0"},
    }


def write_lab(root: Path, **changes: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "lab.json", {**lab(), **changes})
    return root
