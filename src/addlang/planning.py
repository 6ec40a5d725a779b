"""``addlang plan``: what a recipe will do, worked out without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.freeze.plan import FreezePlan
    from addlang.recipe import Phase, Recipe


def plan_run(
    recipe: Recipe, *, base_dir: Path | None = None, gpu: float | None = None, devices: int = 1, probe: bool = False
) -> dict[str, Any]:
    """Trained and frozen parts by module type, tokens, steps and memory of every phase.

    The data are read and packed (into the cache, where the run finds them); nothing is scored, and weights are loaded
    only for a probe.

    Args:
        gpu: memory of one GPU in GiB; what of the recipe must change to fit is worked out. None: this machine's device.
        devices: processes that the run is launched with (FSDP2).
        probe: measure a few steps here.
    """
    import torch

    from addlang.checks import check_model
    from addlang.data.prepare import prepare
    from addlang.freeze.split import why_not_split
    from addlang.models import load_tokenizer, parameter_kinds, resolve, skeleton, stored_dtype, weights_at_hand
    from addlang.run import describe, prepare_device
    from addlang.train.loop import compute_dtype
    from addlang.train.memory import GIB, ROOM, USABLE, forms_of, free_memory, splits, taken
    from addlang.train.optimizers import check_steps
    from addlang.train.probe import not_timed, seconds_per_step
    from addlang.train.schedule import micro_batch
    from addlang.train.shard import World, check_sharding

    source = resolve(recipe.model_name_or_path, recipe.revision)
    tokenizer = load_tokenizer(source, recipe.template_path(base_dir))
    check_model(recipe, source, tokenizer, weights=weights_at_hand(source))
    here = prepare_device(recipe)
    device = here if gpu is None else torch.device("cuda")
    model = skeleton(source)
    config = model.config
    stored = stored_dtype(source, config)
    kinds = parameter_kinds(model)
    phases = []
    for phase in recipe.phases:
        sharding = check_sharding(phase, World(size=devices))
        plan: FreezePlan = phase.strategy.outline(model)
        data = prepare(recipe, phase, tokenizer, base_dir=base_dir)
        micro = micro_batch(phase, data.batch_size, device.type, devices)
        refused = why_not_split(model, plan)
        masked = phase.execution == "masked" or refused is not None
        dtype = compute_dtype(phase, device) or stored
        groups: dict[str, list[int]] = {}
        for name, entry in plan.entries.items():
            row = groups.setdefault(kinds[name].group, [0, 0])
            row[0] += entry.numel
            row[1] += entry.frozen_count
        kept, besides = phase.strategy.footprint(model, plan)
        about: dict[str, Any] = {
            "besides": besides,
            "compute_bytes": dtype.itemsize,
            "forms": forms_of(config, kept, phase, splittable=refused is None, devices=devices),
            "room": ROOM[device.type] * (free_memory(here) if gpu is None else gpu * GIB * USABLE),
            "shards": devices if sharding == "fsdp" else 1,
            "accumulated": data.batch_size > micro * devices,
        }
        steps, tokens, notes = data.sequences // data.batch_size, data.card["tokens"], list(data.card["notes"])
        if not weights_at_hand(source):
            notes.append(
                f"{source} has no weights: their type ({str(stored).removeprefix('torch.')}) is the configuration's"
            )
        if data.pool is not None:
            longer = 1 + data.pool.replay.share if data.pool.replay.mode == "append" else 1.0
            steps, tokens = math.ceil(steps * longer), round(tokens * longer)
            notes.append(f"{data.pool.replay.share:.0%} replay is still to be written by the model before this phase")
        if before := phase.strategy.steps_before:
            notes.append(
                f"{before} more steps on the first {before * data.batch_size * phase.sequence_length:,} tokens decide beforehand what is "
                "trained; they do not count towards the budget"
            )
        check_steps(phase, steps)
        form, memory = taken(config, kept, phase, micro=micro, stored_bytes=stored.itemsize, **about)
        alone = {**about, "shards": 1}
        _, whole = taken(config, kept, phase, micro=micro, stored_bytes=stored.itemsize, **alone)
        seconds = None
        if probe:
            seconds = steps * seconds_per_step(
                source, phase, plan, data, micro=micro, need=whole["total"], device=here, devices=devices
            )
        phases.append(
            {
                "phase": phase.name,
                "strategy": phase.strategy.name,
                "execution": "adapters" if besides else "masked" if masked else "split",
                "form": form if splits(config, kept) and not masked else None,
                "why_masked": refused if phase.execution == "auto" and refused else None,
                "parameters": plan.numel,
                "trainable": kept.trainable_count + besides,
                "trainable_fraction": (kept.trainable_count + besides) / plan.numel,
                "groups": [{"group": g, "elements": n, "frozen": f} for g, (n, f) in groups.items()],
                "tokens": tokens,
                "steps": steps,
                "batch_size": data.batch_size,
                "micro_batch": micro,
                "sources": data.card["sources"],
                "notes": notes,
                "memory": memory,
                "gpu": None
                if gpu is None
                else fit_gpu(
                    model, kept, phase, gpu * GIB * USABLE, micro=micro, batch=data.batch_size, stored=stored, **about
                ),
                "seconds": seconds,
                "not_timed": not_timed(phase, devices) if probe else None,
                "checkpoint_bytes": whole["trained_weights"] + whole["optimizer"],
            }
        )
    weights = sum(p.numel() for p in model.parameters()) * stored.itemsize
    disk = weights * len(recipe.phases) + max(
        (p["checkpoint_bytes"] * (ph.save_total_limit + 1) for p, ph in zip(phases, recipe.phases, strict=True)),
        default=0,
    )
    return {
        "model": str(recipe.model_name_or_path),
        "device": str(here) if gpu is None else f"GPU of {gpu:g} GiB",
        "here": describe(here),
        "devices": devices,
        "phases": phases,
        "disk_bytes": disk,
    }


def fit_gpu(model: Any, plan: FreezePlan, phase: Phase, available: float, **about: Any) -> dict[str, Any]:
    """The setting nearest to the recipe that fits into ``available`` bytes, and a table of what the others need.

    First smaller passes and activation checkpointing, which change no result; then 8-bit state, stochastic rounding,
    both; last a higher ratio, which trains less.

    Args:
        about: the remaining arguments of :func:`addlang.train.memory.choices`.
    """
    from addlang.train.memory import PASS, Choice, choices

    every = list(choices(model.config, plan, phase, **about))
    chosen = next((c for c in every if c.total <= available), None)
    ratio = getattr(phase.strategy, "ratio", None)
    for higher in (0.625, 0.75, 0.875):
        if chosen is None and isinstance(ratio, float) and higher > ratio:
            narrower = phase.strategy.model_copy(update={"ratio": higher}).outline(model)
            found = next((c for c in choices(model.config, narrower, phase, **about) if c.total <= available), None)
            if found is not None:
                chosen = Choice({**found.changes, "strategy.ratio": higher}, found.micro, found.memory)
    rows: dict[str, Choice] = {}
    for c in every:  # per setting the largest pass that fits, or else the smallest
        key = str({k: v for k, v in c.changes.items() if k not in PASS})
        if key not in rows or rows[key].total > available:
            rows[key] = c
    return {
        "available_bytes": round(available),
        "changes": None if chosen is None else dict(chosen.changes),
        "memory": None if chosen is None else dict(chosen.memory),
        "table": [{"changes": dict(c.changes), "total": c.total, "fits": c.total <= available} for c in rows.values()],
    }


def show_plan(result: dict[str, Any]) -> None:
    """Print the plan as tables."""
    from addlang.progress import duration
    from addlang.report import render_table

    if not result["phases"]:
        raise AddlangError("the recipe has no phases")
    for p in result["phases"]:
        print(
            f"phase {p['phase']}: strategy {p['strategy']}, execution {p['execution']}"
            + (f" ({p['form']})" if p["form"] else "")
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
        render_table(
            ["memory per device", "GiB"],
            [[k.replace("_", " "), f"{v / 2**30:.3f}"] for k, v in p["memory"].items() if v],
        )
        if result["device"] == "cpu":
            print("on a CPU these are the tensors; the process takes more, up to twice as much")
        if p["gpu"] is not None:
            show_gpu(p["gpu"])
        if p["seconds"] is not None:
            left_out = ", ".join(p["not_timed"])
            print(f"time: about {duration(p['seconds'])} for this phase on {result['here']}; not counted: {left_out}")
    print(f"disk: {result['disk_bytes'] / 2**30:.3f} GiB")


def show_gpu(found: dict[str, Any]) -> None:
    """Print what fits on the GPU asked for."""
    from addlang.report import render_table

    print(f"{found['available_bytes'] / 2**30:.1f} GiB of the GPU can be used")
    rows = [
        [_settings(r["changes"]), f"{r['total'] / 2**30:.1f}", "yes" if r["fits"] else "no"] for r in found["table"]
    ]
    render_table(["setting", "GiB", "fits"], rows)
    if found["changes"] is None:
        print("nothing fits: use more devices (--devices N)")
    else:
        print(f"nearest to the recipe that fits: {_settings(found['changes'])}")


def _settings(changes: dict[str, Any]) -> str:
    said = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in changes.items())
    return said or "the recipe as it is"
