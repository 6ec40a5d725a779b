"""Methods, learning rates, seeds and languages on real text with a real small model: what is kept, what is gained.

    python benchmarks/real_text.py --model base-5m --text ha=ha.jsonl --text am=am.jsonl \\
        --methods full,ssu,hft --learning_rates 3e-4,1e-3,3e-3 --seeds 0,1,2 --tokens 500k --output real-text

Every run is an ordinary recipe in a directory of its own. Interrupted, the same command continues. ``--arms FILE.yaml``
adds arms beyond plain methods: a mapping of labels to recipe keys, such as ``random: {strategy: {name: ssu, scorer:
random}}``. Writes ``results.json`` and ``table.md``.

English lost and target gained are differences in bits per byte on the same held-out text before and after, with 95 % t
intervals over seeds. The second table compares methods at one target gain, read off linearly between a method's own
learning rates on its front, seed by seed; paired t tests, Holm's correction over all methods and languages.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.export import write_json, write_text
from addlang.sweep import sweep

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    language: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.language}/{self.arm}-lr{self.learning_rate:g}-s{self.seed}"


def recipe(run: Run, given: argparse.Namespace, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe of a run as plain data."""
    evaluation: dict[str, Any] = {
        "source_datasets": [{"path": str(p.resolve()), "role": "source"} for p in given.source],
        "holdout": 0.1,
        "holdout_max": given.heldout,
        "replies": {"limit": given.replies, "max_new_tokens": 48} if given.replies else None,
        "tasks": given.tasks,
    }
    return {
        "model_name_or_path": str(given.model.resolve()),
        "language": run.language,
        "seed": run.seed,
        "output_dir": str((given.output / "runs" / run.folder).resolve()),
        "datasets": [{"path": str(p.resolve())} for p in given.texts[run.language]],
        "tokens": given.tokens,
        "sequence_length": given.sequence_length,
        "batch_size": given.batch_size,
        "learning_rate": run.learning_rate,
        "calibration": {
            "datasets": [{"path": str(p.resolve()), "role": "source"} for p in given.calibration],
            "sequence_length": given.sequence_length,
            "sequences": given.calibration_sequences,
        },
        "evaluation": evaluation,
        **arms[run.arm],
    }


def gather(path: Path, keep_weights: bool) -> dict[str, Any]:
    """A finished run's numbers; its weights are removed unless they are wanted."""
    kept = path / "numbers.json"
    if not kept.is_file():
        rows = [json.loads(line) for line in (path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        numbers: dict[str, Any] = {"before": {}, "after": {}}
        for row in rows:
            if row["model"] in numbers:
                name = f"{row['role']}/{row['metric']}" + (
                    "" if row["metric"] == "bits_per_byte" else f"/{row['task']}"
                )
                numbers[row["model"]][name] = row["value"]
        numbers["seconds"] = round(state["seconds"], 1)
        numbers["trainable_fraction"] = next(iter(state["plan"].values()))["trainable_fraction"]
        numbers["proof_ok"] = json.loads((path / "proof.json").read_text(encoding="utf-8"))["ok"]
        write_json(kept, numbers)
    if not keep_weights:
        for pattern in WEIGHTS:
            for file in path.glob(pattern):
                file.unlink()
    return json.loads(kept.read_text(encoding="utf-8"))


def changes(numbers: Mapping[str, Any]) -> tuple[float, float]:
    """Target gained and English lost, in bits per byte."""
    before, after = numbers["before"], numbers["after"]
    gained = before["target/bits_per_byte"] - after["target/bits_per_byte"]
    return gained, after["source/bits_per_byte"] - before["source/bits_per_byte"]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (gained, lost), those that no other beats."""
    from addlang.evaluate.statistics import pareto_front

    return [points[i] for i in pareto_front([(gained, -lost) for gained, lost in points])]


def matched(results: Mapping[Run, Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Every method against the reference at the highest target gain that every method reaches with every seed."""
    from addlang.evaluate.statistics import holm, interpolate_at, paired_t, t_interval

    out: list[dict[str, Any]] = []
    for language in dict.fromkeys(r.language for r in results):
        curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for run, numbers in results.items():
            if run.language == language:
                curves.setdefault(run.arm, {}).setdefault(run.seed, []).append(changes(numbers))
        fronts = {arm: {seed: front(points) for seed, points in by.items()} for arm, by in curves.items()}
        gain = min(max(g for g, _ in points) for by in fronts.values() for points in by.values())
        lost = {
            arm: [interpolate_at(*map(list, zip(*by[seed], strict=True)), gain) for seed in sorted(by)]
            for arm, by in fronts.items()
        }
        for arm, values in lost.items():
            row: dict[str, Any] = {"language": language, "arm": arm, "target_gained": gain, "english_lost": None}
            out.append(row)
            known = [v for v in values if v is not None]
            if len(known) < len(values):
                row["note"] = "gains more than this at every learning rate"
                continue
            interval = t_interval(known)
            row["english_lost"] = [interval.mean, interval.low, interval.high]
            base = lost.get(reference, [])
            if arm != reference and len(base) == len(known) > 1 and None not in base:
                test = paired_t(known, [v for v in base if v is not None])
                row |= {"difference": [test.difference, test.low, test.high], "p": test.p_value}
    for row, p in zip(out, holm([row.get("p") for row in out]), strict=True):
        if p is not None:
            row["p_holm"] = p
    return out


def interval_text(values: Sequence[float | None] | None, digits: int = 3) -> str:
    """``mean [low, high]``."""
    if values is None or values[0] is None:
        return "-"
    mean, low, high = values
    text = f"{mean:+.{digits}f}"
    return text if low is None or high is None else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def tables(results: Mapping[Run, Mapping[str, Any]], reference: str, command: str) -> tuple[list[str], dict[str, Any]]:
    """Markdown and the same as data."""
    from addlang.evaluate.statistics import t_interval

    lines, cells = [], []
    for language in dict.fromkeys(r.language for r in results):
        chosen = {r: n for r, n in results.items() if r.language == language}
        before = next(iter(chosen.values()))["before"]
        lines += [
            f"### {language}: {len({r.seed for r in chosen})} seed(s)",
            "",
            f"Before: {before['target/bits_per_byte']:.3f} bits per byte of {language}, "
            f"{before['source/bits_per_byte']:.3f} of English.",
            "",
            f"| method | learning rate | {language} gained | English lost | trained | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for arm, rate in dict.fromkeys((r.arm, r.learning_rate) for r in chosen):
            runs = [n for r, n in chosen.items() if (r.arm, r.learning_rate) == (arm, rate)]
            pairs = [changes(n) for n in runs]
            gained, lost = (t_interval([pair[i] for pair in pairs]) for i in (0, 1))
            cell = {
                "language": language,
                "arm": arm,
                "learning_rate": rate,
                "target_gained": [gained.mean, gained.low, gained.high],
                "english_lost": [lost.mean, lost.low, lost.high],
                "trainable_fraction": runs[0]["trainable_fraction"],
                "seconds": sum(n["seconds"] for n in runs) / len(runs),
                "proof_ok": all(n["proof_ok"] for n in runs),
            }
            cells.append(cell)
            lines.append(
                f"| {arm} | {rate:g} | {interval_text(cell['target_gained'])} | {interval_text(cell['english_lost'])} "
                f"| {cell['trainable_fraction']:.1%} | {cell['seconds']:.0f} |"
            )
        lines.append("")
    at = matched(results, reference)
    lines += [
        "### At the same target gain",
        "",
        f"| language | method | gained | English lost | against {reference} | p | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in at:
        p, adjusted = (f"{row[k]:.3f}" if k in row else "-" for k in ("p", "p_holm"))
        lost_text = row["note"] if "note" in row else interval_text(row["english_lost"])
        lines.append(
            f"| {row['language']} | {row['arm']} | {row['target_gained']:+.3f} | {lost_text} "
            f"| {interval_text(row.get('difference'))} | {p} | {adjusted} |"
        )
    lines += ["", "```", command, "```", ""]
    return lines, {"cells": cells, "matched": at}


def numbers_list(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in text.split(",") if part.strip()]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--text", action="append", required=True, metavar="LANG=FILE", help="again for more")
    parser.add_argument("--methods", default="full,ssu", help="names of strategies")
    parser.add_argument("--arms", type=Path, metavar="FILE.yaml", help="labels of further arms, and their recipe keys")
    parser.add_argument("--learning_rates", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--reference", default="full", help="what the others are tested against")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--source", type=Path, action="append", metavar="FILE", help="English; default: heldout_en.jsonl of the model"
    )
    parser.add_argument(
        "--calibration", type=Path, action="append", default=[], metavar="FILE", help="default: the built-in set"
    )
    parser.add_argument("--calibration_sequences", type=int, default=500)
    parser.add_argument("--heldout", type=int, default=100, help="documents of the target, at most")
    parser.add_argument("--replies", type=int, default=0, help="English prompts whose replies are judged; 0: none")
    parser.add_argument("--tasks", default="", help="as in a recipe")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep_weights", action="store_true")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    import yaml

    argv = list(sys.argv[1:] if argv is None else argv)
    given = arguments().parse_args(argv)
    texts: dict[str, list[Path]] = {}
    for item in given.text:
        language, _, path = item.partition("=")
        if not path:
            raise SystemExit(f"--text {item}: write LANG=FILE")
        texts.setdefault(language, []).append(Path(path))
    given.texts = texts
    if not given.source:
        given.source = [p for p in [given.model / "heldout_en.jsonl"] if p.is_file()]
    arms: dict[str, dict[str, Any]] = {m: {"strategy": {"name": m}} for m in numbers_list(given.methods, str)}
    if given.arms is not None:
        arms |= yaml.safe_load(given.arms.read_text(encoding="utf-8"))
    grid = [
        Run(language, arm, rate, seed)
        for seed in numbers_list(given.seeds, int)
        for language in texts
        for arm in arms
        for rate in numbers_list(given.learning_rates, float)
    ]
    todo = [(run, recipe(run, given, arms)) for run in grid]
    found: dict[Run, dict[str, Any]] = {}
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        for run, path in sweep(
            todo, workers=given.jobs, threads=given.threads, cache=given.output.resolve() / "cache", where="real_text"
        ):
            found[run] = gather(path, given.keep_weights)
            gained, lost = changes(found[run])
            print(f"{len(found)}/{len(todo)} {run.folder}: gained {gained:.3f}, lost {lost:.3f}", file=sys.stderr)
    except AddlangError as error:
        raise SystemExit(f"{error}") from None
    results = {
        run: found[run]
        for run in sorted(grid, key=lambda r: (r.language, list(arms).index(r.arm), r.learning_rate, r.seed))
    }
    command = shlex.join(["python", "benchmarks/real_text.py", *argv])
    lines, data = tables(results, given.reference, command)
    runs = [{**vars(run), **numbers} for run, numbers in results.items()]
    write_json(given.output / "results.json", {"command": command, "arms": arms, "runs": runs, **data})
    write_text(given.output / "table.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
