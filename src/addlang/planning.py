"""``addlang plan``: what a recipe will do, worked out without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.freeze.plan import FreezePlan
    from addlang.recipe import Recipe


def plan_run(recipe: Recipe, *, base_dir: Path | None = None) -> dict[str, Any]:
    """Trained and frozen parts by module type, tokens, steps and memory of every phase.

    The data are read and packed (into the cache, where the run finds them); weights are not loaded and nothing is scored.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from addlang.data.prepare import prepare
    from addlang.freeze.split import why_not_split
    from addlang.models import Checkpoint, load_tokenizer, parameter_kinds, resolve
    from addlang.run import prepare_device
    from addlang.train.loop import compute_dtype
    from addlang.train.memory import estimate, form_of
    from addlang.train.schedule import micro_batch

    source = resolve(recipe.model_name_or_path, recipe.revision)
    tokenizer = load_tokenizer(source, recipe.template_path(base_dir))
    stored = Checkpoint(source)
    device = prepare_device(recipe)
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    kinds = parameter_kinds(model)
    phases = []
    for phase in recipe.phases:
        plan: FreezePlan = phase.strategy.outline(model)
        data = prepare(recipe, phase, tokenizer, base_dir=base_dir)
        micro = micro_batch(phase, data.batch_size, device.type)
        refused = why_not_split(model, plan)
        masked = phase.execution == "masked" or refused is not None
        dtype = compute_dtype(phase, device) or stored.dtype
        groups: dict[str, list[int]] = {}
        for name, entry in plan.entries.items():
            row = groups.setdefault(kinds[name].group, [0, 0])
            row[0] += entry.numel
            row[1] += entry.frozen_count
        phases.append(
            {
                "phase": phase.name,
                "strategy": phase.strategy.name,
                "execution": "masked" if masked else "split",
                "why_masked": refused if phase.execution == "auto" and refused else None,
                "parameters": plan.numel,
                "trainable": plan.trainable_count,
                "trainable_fraction": plan.trainable_fraction,
                "groups": [{"group": g, "elements": n, "frozen": f} for g, (n, f) in groups.items()],
                "tokens": data.card["tokens"],
                "steps": data.sequences // data.batch_size,
                "batch_size": data.batch_size,
                "micro_batch": micro,
                "sources": data.card["sources"],
                "notes": data.card["notes"],
                "memory": estimate(
                    config,
                    plan,
                    phase,
                    micro=micro,
                    stored_bytes=stored.dtype.itemsize,
                    compute_bytes=dtype.itemsize,
                    form=form_of(plan, phase, splittable=refused is None),
                ),
                "checkpoint_bytes": plan.trainable_count * 12,
            }
        )
    weights = sum(math.prod(shape) for _, shape in stored.header.values()) * stored.dtype.itemsize
    disk = weights * len(recipe.phases) + max(
        (p["checkpoint_bytes"] * (ph.save_total_limit + 1) for p, ph in zip(phases, recipe.phases, strict=True)),
        default=0,
    )
    return {"model": str(recipe.model_name_or_path), "device": str(device), "phases": phases, "disk_bytes": disk}


def show_plan(result: dict[str, Any]) -> None:
    """Print the plan as tables."""
    from addlang.report import render_table

    if not result["phases"]:
        raise AddlangError("the recipe has no phases")
    for p in result["phases"]:
        print(
            f"phase {p['phase']}: strategy {p['strategy']}, execution {p['execution']}"
            + (f" ({p['why_masked']})" if p["why_masked"] else "")
        )
        print(f"{p['trainable']:,} of {p['parameters']:,} parameters are trained ({p['trainable_fraction']:.1%})")
        rows = [
            [g["group"], f"{g['elements']:,}", f"{g['elements'] - g['frozen']:,}", f"{g['frozen'] / g['elements']:.1%}"]
            for g in p["groups"]
        ]
        render_table(["module", "elements", "trained", "frozen"], rows)
        print(
            f"{p['tokens']:,} tokens in {p['steps']:,} steps of {p['batch_size']} sequences ({p['micro_batch']} at a time)"
        )
        for s in p["sources"]:
            print(f"  {s['path']}: {s['tokens']:,} tokens, read {s['epochs']:.2f} times")
        for line in p["notes"]:
            print(f"  note: {line}")
        render_table(["memory", "GiB"], [[k.replace("_", " "), f"{v / 2**30:.3f}"] for k, v in p["memory"].items()])
    print(f"disk: {result['disk_bytes'] / 2**30:.3f} GiB")
