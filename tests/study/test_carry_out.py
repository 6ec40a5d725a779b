"""A whole study through the command line: runs, tables, report, resume, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from addlang.cli import app
from addlang.errors import AddlangError
from addlang.run import execute
from addlang.study import carry_out
from addlang.study.numbers import tokens_before
from addlang.study.spec import load_study
from tinyrun import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def write(world: World, path: Path, **changes: Any) -> Path:
    recipe = world.data(path, strategy=None, seed=None, tokens=512)
    recipe.pop("output_dir", None)
    recipe["evaluation"]["scale_back"] = [0.5]
    data = {
        "output_dir": str(path / "out"), "recipe": recipe, "arms": {"full": {"strategy": "full"}, "SSU": {"strategy": "ssu"}},
        "learning_rates": [1e-3, 1e-2], "seeds": [0, 1], "keep_weights": False, **changes,
    }  # fmt: skip
    file = path / "study.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same runs without a pool of processes."""

    def sweep(todo: Any, *, on_error: Any, base_dir: Path, **_: Any) -> Any:
        from addlang.recipe import Recipe

        for key, data in todo:
            try:
                yield key, execute(Recipe.parse(data), base_dir=base_dir)
            except AddlangError as error:
                on_error(key, error)

    monkeypatch.setattr("addlang.sweep.sweep", sweep)
    monkeypatch.setenv("ADDLANG_CACHE", str(tmp_path / "cache"))


def test_a_study_runs_reports_and_continues(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(world, tmp_path)
    done = CliRunner().invoke(app, ["sweep", str(file), "--json"])
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    result = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (setting,) = result["settings"]
    assert [(r["arm"], r["learning_rate"], r["seeds"]) for r in setting["rows"]] == [
        (arm, rate, 2) for arm in ("full", "full x 0.5", "SSU", "SSU x 0.5") for rate in (1e-3, 1e-2)
    ]
    rows = {(r["arm"], r["learning_rate"]): r for r in setting["rows"]}
    for row in rows.values():
        assert len(row["points"]) == row["seeds"]
        gained, kept = (sum(values) / row["seeds"] for values in zip(*row["points"], strict=True))
        assert (gained, kept) == pytest.approx((row["gained"][0], row["kept"][0]))
    assert 0 < rows["full x 0.5", 1e-2]["gained"][0] < rows["full", 1e-2]["gained"][0]
    assert {r["tokens"] <= 512 for r in setting["rows"]} == {True}
    assert all(r["proof_ok"] for r in result["runs"])
    assert {row["arm"] for row in setting["equal_gain"]} == {"SSU", "full x 0.5", "SSU x 0.5"}
    assert not list(out.rglob("model*.safetensors"))
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "At equal gain" in html
    assert "SSU x 0.5" in html
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| SSU | 1e-2 |" in table
    assert "addlang sweep study.yaml" in table

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr("addlang.sweep.sweep", never)
    again = CliRunner().invoke(app, ["sweep", str(file), "--only", "SSU", "--only", "seed=1"])
    assert again.exit_code == 0, again.output
    assert "at equal gain" not in again.output.lower()  # the reference was not chosen
    assert "SSU x 0.5" in again.output
    assert "addlang sweep study.yaml --only SSU --only seed=1" in (out / "table.md").read_text(encoding="utf-8")


def test_what_arms_read_beside_their_budget_is_told(world: World, tmp_path: Path) -> None:
    arms = {
        "full": {"strategy": "full"},
        "SSU": {"strategy": "ssu"},
        "LoTA": {"strategy": {"name": "lota", "warmup_steps": 2}},
        "SSU + KL": {"strategy": "ssu", "guards": ["kl"]},
        "EWC": {"strategy": "full", "guards": ["ewc"]},
    }
    done = CliRunner().invoke(app, ["sweep", str(write(world, tmp_path, arms=arms, learning_rates=1e-3, seeds=0))])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    read = {run["arm"]: run["tokens_before"] for run in result["runs"]}
    conversations, cut = 12 * 64, 12 * 32  # KL cuts them to the length of the target's sequences
    assert read.pop("LoTA") == pytest.approx(2 * 4 * 31, abs=8)
    assert read == {"full": 0, "SSU": conversations, "SSU + KL": conversations + cut, "EWC": conversations}
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Read before the first step, for scores, a warm-up or a guard, and in no budget:" in html
    assert f"SSU, EWC {conversations:,}; SSU + KL {conversations + cut:,}." in html
    assert tokens_before({"plan": {}, "guards": {"adapt": [{"guard": "kl"}]}}) is None  # of an older version


def test_a_run_that_fails_is_named_and_the_others_go_on(world: World, tmp_path: Path) -> None:
    long = {"strategy": "full", "sequence_length": 4096}
    file = write(world, tmp_path, arms={"long": long, "full": {"strategy": "full"}}, learning_rates=1e-3, seeds=0)
    done = CliRunner().invoke(app, ["sweep", str(file)])
    assert done.exit_code == 1
    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [f["run"] for f in result["failed"]] == ["long-lr0.001-s0"]
    assert "longer than the model's context" in result["failed"][0]["error"]
    assert [r["arm"] for r in result["settings"][0]["rows"]] == ["full", "full x 0.5"]
    assert "long-lr0.001-s0 failed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_labels_that_are_not_there_and_studies_without_results_are_errors(world: World, tmp_path: Path) -> None:
    study = load_study(write(world, tmp_path))
    with pytest.raises(AddlangError, match=r"--only ful: no arm, setting or seed.*\n.*Did you mean 'full'"):
        carry_out.run_study(study, base_dir=tmp_path, command="", only=["ful"])
    with pytest.raises(AddlangError, match="no run of this study is finished"):
        carry_out.run_study(study, base_dir=tmp_path, command="", finished=True)


def test_files_of_runs_that_were_not_chosen_need_not_be_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"strategy": "full", "datasets": [{"path": "nowhere.jsonl"}]}
    file = write(world, tmp_path, arms={"missing": missing, "full": {"strategy": "full"}}, learning_rates=1e-3, seeds=0)
    all_of_it = CliRunner().invoke(app, ["sweep", str(file)])
    assert "nowhere.jsonl: the file does not exist" in str(all_of_it.exception)
    listed = CliRunner().invoke(app, ["sweep", str(file), "--dry-run", "--only", "full"])
    assert listed.exit_code == 0
    assert "full-lr0.001-s0" in listed.output
    started: list[str] = []

    def started_only(todo: Any, **_: Any) -> Any:
        started.extend(cell.folder for cell, _ in todo)
        return iter(())

    monkeypatch.setattr("addlang.sweep.sweep", started_only)
    with pytest.raises(AddlangError, match="no run of this study is finished"):
        carry_out.run_study(load_study(file), base_dir=tmp_path, command="", only=["full"])
    assert started == ["full-lr0.001-s0"]


def test_a_dry_run_lists_the_runs_that_only_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from addlang import cli

    recipes = Path(__file__).parents[2] / "recipes" / "ssu"
    arguments = [
        "addlang",
        "sweep",
        str(recipes / "table3-granularity.yaml"),
        "--dry-run",
        "--only",
        "13B",
        "--only",
        "ha",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == [f"13B/ha/{unit}-wise-s0" for unit in ("column", "row", "element")]


def finished_run(path: Path, text: Path, value: float, started: float) -> dict[str, Any]:
    """A directory as a finished run leaves it, with one result; its recipe."""
    from addlang.inputs import digests
    from addlang.recipe import Recipe

    data = {
        "model_name_or_path": "lab", "output_dir": str(path), "language": "sw", "strategy": "full", "tokens": 1000,
        "datasets": [{"path": str(text)}],
    }  # fmt: skip
    recipe = Recipe.parse(data)
    path.mkdir(exist_ok=True)
    state = {
        "status": "finished", "fingerprint": recipe.fingerprint, "started": started, "seconds": 1.0, "stages": {},
        "inputs": digests(recipe, None), "train": {}, "plan": {},
    }  # fmt: skip
    row = {"role": "target", "metric": "bits_per_byte", "task": "t", "unit": "", "higher_is_better": False}
    rows = [json.dumps({**row, "model": label, "value": value}) for label in ("before", "after")]
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (path / "results.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (path / "proof.json").write_text('{"ok": true}', encoding="utf-8")
    return data


def value_of(numbers: Any) -> float:
    return float(numbers["results"]["target/bits_per_byte/t"]["after"])


def test_numbers_of_the_run_that_was_in_a_directory_before_are_not_taken(tmp_path: Path) -> None:
    from addlang.rundir import OWN

    text = tmp_path / "text.jsonl"
    text.write_text("one", encoding="utf-8")
    run = tmp_path / "run"
    data = finished_run(run, text, 1.0, started=10.0)
    kept = carry_out._keep(run, weights=True)
    assert carry_out._known(run, data, tmp_path) == kept
    finished_run(run, text, 2.0, started=20.0)
    assert (run / "numbers.json").is_file()
    assert value_of(carry_out._known(run, data, tmp_path)) == 2.0
    assert "numbers.json" in OWN  # --overwrite removes it
    earlier = {**kept, "results": {}}  # of a version that did not note whose they are
    (run / "numbers.json").write_text(json.dumps(earlier), encoding="utf-8")
    assert carry_out._known(run, data, tmp_path) == earlier


@pytest.mark.parametrize("finished", [False, True])
def test_finished_runs_of_data_that_changed_stop_a_study_before_it_starts(
    finished: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("one", encoding="utf-8")
    study = load_study(write(world, tmp_path, learning_rates=[], seeds=0))
    runs = {arm: finished_run(tmp_path / arm, text, 1.0, started=10.0) for arm in ("full", "SSU")}
    grid = {cell: runs[cell.arm] for cell in carry_out.cells(study, tmp_path)}
    monkeypatch.setattr(carry_out, "cells", lambda *_, **__: grid)
    monkeypatch.setattr("addlang.sweep.sweep", lambda *_, **__: pytest.fail("a run was started"))
    text.write_text("another", encoding="utf-8")
    with pytest.raises(
        AddlangError, match=r"(?s)2 of 2 runs.*'.*full' holds a finished run of other files.*text.jsonl"
    ):
        carry_out.run_study(study, base_dir=tmp_path, command="", finished=finished)
