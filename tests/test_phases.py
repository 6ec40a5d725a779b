"""Between phases: an evaluation decides whether the next one is carried out, and what it may not use is checked."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from addlang import phases as module
from addlang.errors import AddlangError, ProofError
from addlang.models import Checkpoint, load_model
from addlang.phases import condition_text, find_result, judge
from addlang.recipe import Phase, Recipe
from addlang.run import execute
from addlang.rundir import read_state
from addlang.schema import Condition
from addlang.verify import verify_run
from tinyrun import Killed, World, chat_rows, same, write_rows

pytestmark = pytest.mark.usefixtures("offline")
ROWS: list[dict[str, Any]] = [
    {"model": "before", "role": "source", "metric": "exact_match", "task": "lab tasks", "value": 0.8},
    {"model": "english", "role": "source", "metric": "exact_match", "task": "lab tasks", "value": 0.6},
    {"model": "english", "role": "target", "metric": "exact_match", "task": "lab tasks (sw)", "value": 0.1},
    {"model": "english", "role": "target", "metric": "accuracy", "task": "a", "value": 0.3},
    {"model": "english", "role": "target", "metric": "accuracy", "task": "b", "value": 0.4},
]
BITS = "target/bits_per_byte"


def two(world: World, out: Path, first: dict[str, Any] | None = None, **second: Any) -> Recipe:
    """Raw text, then conversations."""
    data = world.data(out)
    shared = {k: data.pop(k) for k in list(data) if k in Phase.model_fields}
    chat = write_rows(world.root / "phases.jsonl", chat_rows(60, 31))
    tune = {**shared, "datasets": [{"path": chat}], "strategy": "full", "sequence_length": 128}
    data["phases"] = [{"name": "read", **shared, **(first or {})}, {"name": "tune", **tune, **second}]
    return Recipe.parse(data)


# ---- conditions


def test_a_metric_is_found_by_role_metric_and_the_tasks_first_word() -> None:
    assert find_result(ROWS, "source/exact_match/lab", "english")["value"] == 0.6
    assert find_result(ROWS, "target/accuracy/b", "english")["value"] == 0.4
    with pytest.raises(AddlangError, match="names several results"):
        find_result(ROWS, "target/accuracy", "english")
    with pytest.raises(AddlangError, match=r"'source/exact/lab' is not measured in this run(.|\n)*source/exact_match"):
        find_result(ROWS, "source/exact/lab", "english")


@pytest.mark.parametrize(
    ("bounds", "holds"),
    [
        ({"at_least": 0.6}, True),
        ({"at_least": 0.61}, False),
        ({"at_most": 0.6}, True),
        ({"at_least": 0.1, "at_most": 0.5}, False),
        ({"at_least": 0.75, "relative_to": "before"}, True),  # 0.75 x 0.8
        ({"at_least": 0.76, "relative_to": "before"}, False),
    ],
)
def test_bounds_are_inclusive_and_may_be_relative(bounds: dict[str, Any], holds: bool) -> None:
    check = judge(ROWS, Condition(metric="source/exact_match/lab", **bounds), "english")
    assert check["holds"] is holds
    assert ("holds" if holds else "does not hold") in condition_text(check)


def test_a_condition_without_a_bound_is_refused() -> None:
    with pytest.raises(AddlangError, match="give at_least or at_most"):
        Recipe.parse({"phases": [{"continue_if": {"metric": "source/exact_match"}}]})


def test_a_metric_that_is_not_measured_is_an_error_before_anything_is_trained(world: World, tmp_path: Path) -> None:
    recipe = two(world, tmp_path / "out", continue_if={"metric": "source/accuracy/mmlu", "at_least": 0.5})
    with pytest.raises(AddlangError, match="continue_if of phase 'tune': 'source/accuracy/mmlu' is not measured"):
        execute(recipe)
    assert "train" not in read_state(tmp_path / "out")


def test_a_bound_relative_to_a_later_phase_is_an_error(world: World, tmp_path: Path) -> None:
    condition = {"metric": BITS, "at_most": 1, "relative_to": "reed"}
    with pytest.raises(AddlangError, match=r"'reed' is no earlier model(.|\n)*read"):
        execute(two(world, tmp_path / "out", continue_if=condition))


# ---- whether a phase is carried out


def test_where_the_condition_holds_the_run_is_as_without_it(world: World, tmp_path: Path) -> None:
    plain = execute(two(world, tmp_path / "plain"))
    held = execute(two(world, tmp_path / "held", continue_if={"metric": BITS, "at_most": 1.0, "relative_to": "before"}))
    assert same(plain, held)
    (check,) = read_state(held)["decisions"]["tune"]["conditions"]
    rows = [json.loads(line) for line in (held / "results.jsonl").read_text().splitlines()]
    values = {r["model"]: r["value"] for r in rows if f"{r['role']}/{r['metric']}" == BITS}
    assert (check["value"], check["reference"]) == (values["read"], values["before"])


def test_where_it_does_not_hold_the_run_ends_with_the_model_of_the_phase_before(world: World, tmp_path: Path) -> None:
    path = execute(two(world, tmp_path / "out", continue_if={"metric": BITS, "at_most": 0.0}))
    state = read_state(path)
    assert state["status"] == "finished"
    assert state["stopped"] == {"phase": "tune", "not_run": ["tune"], "result": "read"}
    assert list(state["train"]) == ["read"]
    assert same(path, path / "phases" / "read")
    assert load_model(path) is not None
    assert (path / "tokenizer.json").is_file()
    assert verify_run(path) == json.loads((path / "proof.json").read_text())
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    by_model = {m: [r["value"] for r in rows if r["model"] == m] for m in ("before", "read", "after")}
    assert by_model["after"] == by_model["read"] != by_model["before"]
    for name in ("report.html", "README.md"):
        assert "tune" in (path / name).read_text()
        assert "was not carried out" in " ".join((path / name).read_text().split())


def test_verify_sees_that_the_result_is_another_model(world: World, tmp_path: Path) -> None:
    path = execute(two(world, tmp_path / "out", continue_if={"metric": BITS, "at_most": 0.0}))
    for file in Checkpoint(Path(world.model)).files:
        (path / file).write_bytes((Path(world.model) / file).read_bytes())
    with pytest.raises(ProofError, match="is not that of 'read'"):
        verify_run(path)


def test_a_condition_on_the_first_phase_is_about_the_source_model(world: World, tmp_path: Path) -> None:
    path = execute(two(world, tmp_path / "out", first={"continue_if": {"metric": BITS, "at_least": 1000}}))
    assert read_state(path)["stopped"]["result"] == "source"
    assert read_state(path)["stopped"]["not_run"] == ["read", "tune"]
    assert same(path, Path(world.model))
    assert verify_run(path)["ok"]


@pytest.mark.parametrize("moment", ["decide", "end_early"])
def test_a_run_killed_around_the_decision_ends_the_same(
    moment: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = {"metric": BITS, "at_most": 0.0}
    original = getattr(module, moment)

    def dying(*args: Any) -> Any:
        result = original(*args)
        if args[1].name == "tune":
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, dying)
        with pytest.raises(Killed):
            execute(two(world, tmp_path / "out", first={}, continue_if=condition))
    with monkeypatch.context() as patch:  # what was decided is not decided again
        if moment == "decide":
            patch.setattr(module, "judge", lambda *_: pytest.fail("judged twice"))
        execute(two(world, tmp_path / "out", first={}, continue_if=condition))
    whole = execute(two(world, tmp_path / "whole", continue_if=condition))
    assert same(tmp_path / "out", whole)
    assert read_state(tmp_path / "out")["stopped"] == read_state(whole)["stopped"]


# ---- what a phase may not use


def test_a_row_of_an_earlier_phase_is_an_error_that_names_both_places(world: World, tmp_path: Path) -> None:
    rows = chat_rows(40, 41)
    changed = {"messages": [{**m, "content": m["content"].upper() + "!"} for m in rows[7]["messages"]]}
    first = write_rows(tmp_path / "first.jsonl", rows)
    second = write_rows(tmp_path / "second.jsonl", [*chat_rows(40, 42), changed])
    recipe = two(
        world, tmp_path / "out", first={"datasets": [{"path": first}], "sequence_length": 128}, datasets=[{"path": second}],
        no_previous_data=True,
    )  # fmt: skip
    with pytest.raises(AddlangError, match=rf"{second}, row 41, is {first}, row 8, of phase 'read'"):
        execute(recipe)
    assert not any(read_state(tmp_path / "out")["stages"].values())


def test_what_replay_is_drawn_from_counts_as_data(world: World, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", chat_rows(40, 41))
    recipe = two(
        world, tmp_path / "out", first={"datasets": [{"path": first}], "sequence_length": 128}, no_previous_data=True,
        replay={"kind": "english", "datasets": [{"path": first}]},
    )  # fmt: skip
    with pytest.raises(AddlangError, match="may use no previous data"):
        execute(recipe)


def test_what_was_checked_stands_in_the_state_and_the_report(world: World, tmp_path: Path) -> None:
    path = execute(two(world, tmp_path / "out", no_previous_data=True, no_previous_weights=True))
    promises = read_state(path)["promises"]["tune"]
    assert promises["data"] == {"rows": 60, "earlier_rows": 60, "earlier_phases": ["read"], "shared": 0}
    assert promises["weights"] == {"strategy": "full", "guards": []}
    text = " ".join(html.unescape((path / "report.html").read_text()).split())
    assert "none of the phase's 60 rows is among the 60 of read" in text
    assert "nothing held training to the weights or outputs it started from" in text


@pytest.mark.parametrize(
    ("guard", "refused"),
    [
        ("l2sp", True),
        ("ewc", True),
        ("kl", True),
        ("self_anchor", True),
        ({"name": "self_anchor", "mode": "replay"}, False),
    ],
)
def test_no_previous_weights_refuses_what_holds_training_to_its_start(
    guard: Any, refused: bool, world: World, tmp_path: Path
) -> None:
    data = world.data(tmp_path, guards=[guard], no_previous_weights=True)
    if refused:
        with pytest.raises(
            AddlangError, match=r"no_previous_weights: '.*' holds training to what the phase starts from"
        ):
            Recipe.parse(data)
    else:
        Recipe.parse(data)


def test_a_reference_that_is_used_for_planning_alone_is_allowed(world: World, tmp_path: Path) -> None:
    strategy = {"name": "lf_h2", "reference_model": world.model}
    recipe = Recipe.parse(world.data(tmp_path, strategy=strategy, no_previous_weights=True))
    assert recipe.phases[0].no_previous_weights
