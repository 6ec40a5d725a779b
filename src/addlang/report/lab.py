"""The lab's report: always the front, never retention at one equal learning rate alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.evaluate.statistics import Interval, interpolate_at, pareto_front, t_interval
from addlang.progress import duration
from addlang.report import numbers
from addlang.report.files import read_json, write_text
from addlang.report.front import Arm, front_figure
from addlang.report.html import REPORT, environment
from addlang.report.tiles import Tile

ONE_SEED = "one seed, no interval"


@dataclass(frozen=True)
class Gain:
    """What is gained in an experiment: the x axis."""

    key: str
    label: str
    unit: str
    higher_is_better: bool


GAINS = (
    Gain("target_bpb", "bits per byte", "bits/byte", False),
    Gain("target_exact_match", "exact match", "share", True),
    Gain("cloze", "cloze accuracy", "share", True),
)


def read_lab(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``lab.json`` of a lab directory.

    Raises:
        AddlangError: there is none, or it is torn.
    """
    path = Path(directory) / "lab.json"
    data = read_json(path, dict)
    if data is None:
        raise AddlangError(f"'{path}' does not exist", "give the directory of a lab run")
    return dict(data)


def write_lab_report(directory: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a lab directory, atomically."""
    path = Path(directory) / REPORT
    write_text(path, lab_html(directory))
    return path


def lab_html(directory: str | os.PathLike[str]) -> str:
    """The lab's report as HTML."""
    lab = read_lab(directory)
    experiments = [_Experiment(lab, e) for e in lab.get("experiments") or []]
    seconds = lab.get("seconds")
    took = duration(seconds) if isinstance(seconds, int | float) else "time not stated"
    runs = sum(len(a["runs"]) for e in experiments for a in e.arms)
    broken = [
        f"{a['label']}, seed {r['seed']}"
        for e in experiments
        for a in e.arms
        for r in a["runs"]
        if r.get("proof_ok") is False
    ]
    return (
        environment()
        .get_template("lab.html.j2")
        .render(
            language=numbers.language_name(str(lab.get("language", "und"))),
            facts=f"{runs} runs · {took}",
            verdict=lab_verdict(lab),
            broken=broken,
            tiles=_tiles(lab, experiments, runs, len(broken)),
            experiments=[e.context() for e in experiments],
            command=str(lab.get("command") or "addlang lab"),
            notes=[str(n) for n in lab.get("notes") or []] or ["No notes were written."],
            versions=[(str(k), str(v)) for k, v in (lab.get("versions") or {}).items()],
        )
    )


def lab_table(directory: str | os.PathLike[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table per experiment for the terminal: (title, columns, rows)."""
    lab = read_lab(directory)
    tables = []
    for e in (_Experiment(lab, x) for x in lab.get("experiments") or []):
        columns, rows = e.table()
        tables.append((e.title, columns, rows))
    return tables


def lab_verdict(lab: Mapping[str, Any]) -> str:
    """One sentence: which arms are on the front of the first experiment."""
    experiments = [_Experiment(lab, e) for e in lab.get("experiments") or []]
    if not experiments:
        return "Nothing was run."
    e = experiments[0]
    names = [e.arms[i]["label"] for i in e.front]
    count = len({r["seed"] for a in e.arms for r in a["runs"]})
    seeds = f"{count} seeds" if count > 1 else ONE_SEED
    listed = "; ".join(names)
    return (
        f"On the front of English kept against {e.language} gained ({e.title}, means, {seeds}) "
        f"{'are' if len(names) > 1 else 'is'}: {listed}. Where intervals overlap, the order is not settled."
    )


class _Experiment:
    """One experiment: arms as points, tables and the comparison at equal gain."""

    def __init__(self, lab: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        self.title = str(data.get("title") or data.get("name"))
        self.language = numbers.language_name(str(data.get("language") or lab.get("language") or "und"))
        self.baseline = {**(lab.get("baseline") or {}), **(data.get("baseline") or {})}
        self.arms = [
            dict(a, label=str(a.get("label") or a.get("name"))) for a in data.get("arms") or [] if a.get("runs")
        ]
        self.missing = [str(a.get("label") or a.get("name")) for a in data.get("arms") or [] if not a.get("runs")]
        if not self.arms:
            raise AddlangError(f"experiment '{self.title}' of the lab has no runs", "run addlang lab again")
        runs = [r for a in self.arms for r in a["runs"]]
        if not all(isinstance(r.get("english"), int | float) for r in runs):
            raise AddlangError(
                f"experiment '{self.title}' of the lab has runs without English", "run addlang lab again"
            )
        # bits per byte of different texts are not comparable, so arms on different data are compared by what they can do
        own_text = len({a.get("data") for a in self.arms}) > 1
        have = [g for g in GAINS if all(isinstance(r.get(g.key), int | float) for r in runs)]
        have = [g for g in have if not (own_text and g.key == "target_bpb")]
        if not have:
            raise AddlangError(
                f"experiment '{self.title}' of the lab has no measure of the target language in every run"
            )
        self.gains = have
        self.gain = have[0]
        sign = 1 if self.gain.higher_is_better else -1
        points = [(sign * self._mean(a, self.gain.key).mean, self._mean(a, "english").mean) for a in self.arms]
        self.front = pareto_front(points)

    def _mean(self, arm: Mapping[str, Any], key: str) -> Interval:
        return t_interval([float(r[key]) for r in arm["runs"]])

    def _text(self, arm: Mapping[str, Any], key: str, unit: str) -> str:
        i = self._mean(arm, key)
        text = numbers.value(i.mean, unit)
        return text if i.n < 2 else f"{text} {numbers.interval(i.low, i.high, unit)}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Means with t intervals over seeds."""
        columns = ["arm", "learning rate", "English exact match"]
        columns += [f"{self.language} {g.label}" for g in self.gains] + ["seeds", "on the front"]
        rows = []
        for i, a in enumerate(self.arms):
            n = len(a["runs"])
            rate = a.get("learning_rate")
            cells = [
                a["label"],
                numbers.scientific(rate) if isinstance(rate, float) else "-",
                self._text(a, "english", "share"),
            ]
            cells += [self._text(a, g.key, g.unit) for g in self.gains]
            rows.append([*cells, str(n) if n > 1 else ONE_SEED, "yes" if i in self.front else "no"])
        return columns, rows

    def figure(self) -> Any:
        """The front."""
        percent = self.gain.unit == "share"
        arms = []
        for i, a in enumerate(self.arms):
            x, y = self._mean(a, self.gain.key), self._mean(a, "english")
            factor = 100 if percent else 1
            seeds = tuple((factor * float(r[self.gain.key]), 100 * float(r["english"])) for r in a["runs"])
            arms.append(Arm(a["label"], _scaled(x, factor), _scaled(y, 100), seeds, i in self.front))
        reference = None
        english = self.baseline.get("english")
        if isinstance(english, int | float):
            start = self.baseline.get(self.gain.key)
            short = f"source model: English {numbers.percent(english)}"
            known = (
                f", {self.language} {numbers.value(start, self.gain.unit)}" if isinstance(start, int | float) else ""
            )
            reference = (100 * english, short, short + known)
        return front_figure(
            arms,
            x_label=f"{self.language} {self.gain.label} ({'%' if percent else self.gain.unit})",
            y_label="English exact match (%)",
            x_higher_is_better=self.gain.higher_is_better,
            y_reference=reference,
        )

    def equal_gain(self) -> list[list[str]]:
        """Every arm against the reference arms at the arm's own gain, seed by seed.

        The reference is plain full fine-tuning at its learning rates (strategy and name ``full``; replay is not
        plain). It is read off linearly between its runs of the same seed; outside its range there is no statement.
        """
        reference = [a for a in self.arms if _is_reference(a)]
        if len(reference) < 2:
            return []
        rows = []
        for a in self.arms:
            if _is_reference(a):
                continue
            differences, levels = [], []
            for run in a["runs"]:
                same = [r for b in reference for r in b["runs"] if r["seed"] == run["seed"]]
                level = interpolate_at(
                    [r[self.gain.key] for r in same], [r["english"] for r in same], run[self.gain.key]
                )
                if level is not None:
                    levels.append(level)
                    differences.append(float(run["english"]) - level)
            rows.append([a["label"], *self._equal_cells(a, differences, levels)])
        return rows

    def _equal_cells(self, arm: Mapping[str, Any], differences: Sequence[float], levels: Sequence[float]) -> list[str]:
        total = len(arm["runs"])
        own = self._text(arm, "english", "share")
        if len(differences) < total:
            return [own, f"outside its range in {total - len(differences)} of {total} runs", "-", "no statement"]
        i, level = t_interval(differences), t_interval(levels)
        shown = numbers.difference(i.mean, i.low, i.high, "share")
        if i.low is None or i.high is None:
            word = ONE_SEED
        else:
            word = "better" if i.low > 0 else "worse" if i.high < 0 else "no difference shown"
        return [own, numbers.percent(level.mean), shown, word]

    def context(self) -> dict[str, Any]:
        """For the template."""
        columns, rows = self.table()
        seeds = {len(a["runs"]) for a in self.arms}
        bars = (
            ONE_SEED[0].upper() + ONE_SEED[1:]
            if seeds == {1}
            else "Crosses are 95 % t intervals over seeds, small dots single seeds"
        )
        if 1 in seeds and len(seeds) > 1:
            bars += "; hollow marks have one seed and no interval"
        line = (
            "The dashed line is the front: no arm beats these in both." if len(self.front) > 1 else "One arm beats all."
        )
        notes = [f"{a['label']}: {a['note']}" for a in self.arms if a.get("note")]
        notes += [f"{name}: not run" for name in self.missing]
        run_columns = [
            "arm",
            "seed",
            "English exact match",
            *[f"{self.language} {g.label}" for g in self.gains],
            "trained",
            "time",
            "proof",
        ]
        return {
            "title": self.title,
            "lead": f"Right and up is better. {bars}. {line}",
            "figure": self.figure(),
            "columns": columns,
            "rows": rows,
            "equal_rows": self.equal_gain(),
            "equal_columns": ["arm", "its English", "full fine-tuning there", "difference", "at equal gain"],
            "equal_lead": "English of full fine-tuning at the same gain as the arm, read off between its learning "
            "rates, seed by seed. This is the fair comparison: a lower learning rate alone keeps more and gains less.",
            "notes": notes,
            "run_columns": run_columns,
            "runs": [self._run(a, r) for a in self.arms for r in a["runs"]],
        }

    def _run(self, arm: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
        show: Callable[[Any, Callable[[float], str]], str] = lambda v, f: f(v) if isinstance(v, int | float) else "-"  # noqa: E731
        proof = run.get("proof_ok")
        return [
            arm["label"],
            str(run.get("seed")),
            numbers.percent(float(run["english"])),
            *[numbers.value(float(run[g.key]), g.unit) for g in self.gains],
            show(run.get("trainable_fraction"), numbers.percent),
            show(run.get("seconds"), duration),
            "not run" if proof is None else "holds" if proof else "FAILED",
        ]


def _is_reference(arm: Mapping[str, Any]) -> bool:
    return arm.get("strategy") == "full" and str(arm.get("name")).startswith("full")


def _scaled(i: Interval, factor: float) -> tuple[float, float | None, float | None]:
    return factor * i.mean, None if i.low is None else factor * i.low, None if i.high is None else factor * i.high


def _tiles(lab: Mapping[str, Any], experiments: Sequence[_Experiment], runs: int, broken: int) -> list[Tile]:
    baseline = lab.get("baseline") or {}
    english, bits = baseline.get("english"), baseline.get("target_bpb")
    language = numbers.language_name(str(lab.get("language") or "und"))
    more = f"{language}: {numbers.value(bits, 'bits/byte')}" if isinstance(bits, int | float) else ""
    start = numbers.percent(english) if isinstance(english, int | float) else "not run"
    checked = [
        r.get("proof_ok") for e in experiments for a in e.arms for r in a["runs"] if r.get("proof_ok") is not None
    ]
    tiles = [Tile("none", "Source model, English exact match", start, more, "before anything was learned")]
    arms = sum(len(e.arms) for e in experiments)
    counts = sorted({len(a["runs"]) for e in experiments for a in e.arms})
    seeds = "one seed per arm" if counts == [1] else f"{' or '.join(map(str, counts))} seeds per arm"
    tiles.append(
        Tile(
            "none",
            "Measured",
            f"{runs} runs",
            f"{arms} arms in {len(experiments)} experiments",
            seeds,
        )
    )
    if not checked:
        tiles.append(Tile("none", "Proof", "not run", "", "– not checked"))
    elif broken:
        tiles.append(
            Tile("bad", "Proof", f"failed in {broken}", f"of {len(checked)} runs", "✕ frozen elements changed")
        )
    else:
        tiles.append(
            Tile("good", "Proof", f"holds in {len(checked)}", f"of {runs} runs", "✓ frozen elements are bit-identical")
        )
    return tiles
