"""Train every pair of the forecasts' grid, measure the signals before each, fit the forecasts and judge them.

    python benchmarks/forecast/run.py --output forecast-out [--jobs 1] [--part held]

Interrupted, the same command continues where it was. ``--part``: only the pairs without guards (free) or with them (held); the
other part of ``forecast.json`` then stays as it ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fit import Row, load, part, study
from pairs import SEQUENCE, Pair, pairs, recipe, write_data

from addlang.export import write_json
from addlang.preflight.forecast import FORMAT
from addlang.sweep import sweep

PAIR = "pair.json"


def train_all(root: Path, grid: list[Pair], jobs: int) -> None:
    """Carry out every pair's run; finished ones of the same pair are taken as they are."""
    write_data(root, grid)
    todo = [(pair, recipe(pair, root)) for pair in grid if not finished(root, pair)]
    done = len(grid) - len(todo)
    for pair, _ in sweep(todo, workers=jobs, threads=1, cache=root / "cache", where="forecast"):
        write_json(root / "runs" / pair.name / PAIR, vars(pair))
        done += 1
        print(f"{done}/{len(grid)} {pair.name}", file=sys.stderr, flush=True)


def finished(root: Path, pair: Pair) -> bool:
    """Whether a pair was run, as it stands in the grid now."""
    path = root / "runs" / pair.name / PAIR
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == vars(pair)


def measure_all(root: Path, grid: list[Pair], jobs: int) -> None:
    """Measure the signals of every pair; measured ones are taken as they are."""
    (root / "signals").mkdir(exist_ok=True)
    todo = [
        (p, {"pair": vars(p), "root": str(root)}) for p in grid if not (root / "signals" / f"{p.name}.json").is_file()
    ]
    done = len(grid) - len(todo)
    for pair, _ in sweep(todo, workers=jobs, threads=1, cache=root / "cache", work=measure_one):
        done += 1
        print(f"{done}/{len(grid)} {pair.name} measured", file=sys.stderr, flush=True)


def measure_one(data: dict[str, Any], _where: str, _base_dir: Path | None) -> str:
    """The signals of one pair, as preflight measures them."""
    import torch

    from addlang.data.prepare import prepare
    from addlang.models import load_tokenizer, resolve
    from addlang.preflight.probe import run_probe
    from addlang.preflight.signals import measure_conflict, measure_similarity, signals
    from addlang.preflight.watch import watched
    from addlang.recipe import Recipe

    root, pair = Path(data["root"]), Pair(**data["pair"])
    loaded = Recipe.parse(recipe(pair, root))
    phase, source, device = loaded.phases[0], resolve("lab"), torch.device("cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    tokenizer = load_tokenizer(source)
    prepared = prepare(loaded, phase, tokenizer)
    text = watched(phase.calibration, tokenizer, language="en", sequence_length=SEQUENCE, base_dir=None)
    probe = run_probe(loaded, phase, source, tokenizer, prepared, text, device=device)
    steps = prepared.sequences // prepared.batch_size
    target = [s for s in prepared.card["sources"] if s["role"] == "target"]
    row = signals(
        probe=probe,
        conflict=measure_conflict(phase, source, prepared, text, device),
        similarity=measure_similarity(phase, phase.calibration.datasets, "states", source, device, None, 0),
        learning_rate=phase.learning_rate,
        steps=steps,
        sequence_tokens=prepared.batch_size * SEQUENCE,
        epochs=max(s["epochs"] for s in target),
    )
    path = root / "signals" / f"{pair.name}.json"
    write_json(path, {"signals": row, "losses": probe.losses, "seconds": probe.seconds})
    return str(path)


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """Every pair with what was lost, for whoever wants to look."""
    return [
        {**vars(r.pair), "lost": r.lost, "before": r.before, "after": r.after, "mpd": r.mpd, **r.signals} for r in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", choices=("free", "held"), help="default: both")
    given = parser.parse_args()
    root = given.output.resolve()
    grid = [p for p in pairs() if given.part in (None, "held" if p.guard else "free")]
    train_all(root, grid, given.jobs)
    measure_all(root, grid, given.jobs)
    rows = load(root, grid)
    ships = json.loads((files("addlang.preflight") / "forecast.json").read_text(encoding="utf-8"))
    for name in ("free", "held") if given.part is None else (given.part,):
        result = study(rows, held=name == "held")
        ships[name] = part(result)
        write_json(root / f"{name}.json", {**result, "coefficients": asdict(result["coefficients"])})
    write_json(root / "pairs.json", table(rows))
    write_json(root / "forecast.json", {**ships, "format": FORMAT})
    print(f"{root / 'forecast.json'} is what src/addlang/preflight/forecast.json should hold", file=sys.stderr)


if __name__ == "__main__":
    main()
