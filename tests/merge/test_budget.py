"""Scaling an update back to a budget: on a run of a tiny model for what is written, on synthetic answers for the search."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from addlang.errors import AddlangError, BudgetError
from addlang.evaluate.measurement import Item, Measurement, Outcome
from addlang.evaluate.suite import evaluate_model
from addlang.merge.bench import Bench
from addlang.merge.budget import By, Search, find, parts_of
from addlang.merge.methods import Revert
from addlang.merge.to_budget import Wanted, revert_to_budget, suite_of
from addlang.merge.verify import verify_merge
from addlang.merge.write import merge_models, open_models
from addlang.models import Checkpoint, load_model
from addlang.recipe import Recipe
from addlang.report.verdict import of_text
from addlang.run import execute
from tinyrun import World, listing, weights

pytestmark = pytest.mark.usefixtures("offline")
Shares = Mapping[str, float]


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A finished run that is measured on source text (graded items, so that few suffice)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDLANG_CACHE", str(shared_cache))
        return execute(world.recipe(tmp_path_factory.mktemp("run") / "out", learning_rate=3e-2, strategy="full"))


class Answers:
    """In place of a bench: item i of 400 is right until the lossy parts' share passes a threshold of its own."""

    def __init__(self, lossy: str = "scale", worst: float = 1.0) -> None:
        self.spec = Revert(model="tuned", source_model="source")
        self.lossy, self.worst = lossy, worst
        self.measured: list[Revert] = []

    def measure(self, spec: Revert, suite: Any) -> Outcome:
        self.measured.append(spec)
        p = spec.parameters
        scale = float(p.scale)  # type: ignore[arg-type]
        cost = scale * p.modules.get(self.lossy, 1.0)
        gain = scale * p.modules.get("useful", 1.0)
        right = [i % 5 != 0 and (i * 0.618) % 1 >= self.worst * 0.3 * cost**2 for i in range(400)]
        items = tuple(Item(str(i), float(r)) for i, r in enumerate(right))
        source = Measurement("tasks", "1", "source", "en", "exact_match", True, items, {}, "share")
        bits = 2.0 - gain
        text = Measurement("text", "1", "target", "sw", "bits_per_byte", False, (Item("t", bits),), {}, "bits/byte")
        return Outcome([source, text])


def search(bench: Answers, keep: float = 0.9, by: By = "overall") -> Search:
    return Search(bench, None, by, keep, resamples=300)  # type: ignore[arg-type]


def test_the_largest_share_above_the_bound_is_chosen_and_every_point_is_told() -> None:
    bench = Answers()
    result = find(search(bench), {"useful": 1.0})
    share = result.parameters.scale
    assert result.chosen.kept.low >= 0.9
    assert [p.u for p in result.points] == [round(k / 20, 4) for k in range(1, round(float(share) * 20) + 2)]  # type: ignore[arg-type]
    assert result.points[-1].kept.low < 0.9
    assert result.chosen.gained == pytest.approx(float(share) / 2)  # type: ignore[arg-type]
    assert result.share == pytest.approx(float(share))  # type: ignore[arg-type]


def test_an_update_that_costs_nothing_is_kept_whole() -> None:
    assert find(search(Answers(worst=0.0)), {"useful": 1.0}).parameters.scale == 1.0


def test_the_module_that_costs_is_scaled_back_and_the_one_that_gains_is_not() -> None:
    bench = Answers(lossy="costly")
    result = find(search(bench, by="module"), {"useful": 1.0, "costly": 1.0, "untouched": 0.0})
    shares = result.parameters.modules
    assert set(shares) == {"useful", "costly"}  # nothing is measured for a module without update
    assert shares["useful"] > 2 * shares["costly"]
    assert result.chosen.which == "confirm"
    assert all(
        p.kept.low >= 0.9
        for p in result.points
        if p.u == result.chosen.u and p.parts == "module" and p.which != "choose"
    )
    overall = find(search(Answers(lossy="costly")), {"useful": 1.0, "costly": 1.0})
    assert (result.chosen.gained or 0) > (overall.chosen.gained or 0)


def test_an_update_that_cannot_be_kept_fails_with_the_number_of_items_it_would_need() -> None:
    with pytest.raises(BudgetError, match=r"no share of the update is shown to keep 0\.9: even at 0\.05") as caught:
        find(search(Answers(worst=400.0)), {"useful": 1.0})
    assert "lower --keep, or adapt with a lower learning rate" in str(caught.value)
    with pytest.raises(BudgetError, match=r"evaluate on about [\d,]+ items") as caught:
        find(search(Answers(worst=4.0), keep=0.988), {"useful": 1.0})
    assert caught.value.exit_code == 3


def test_too_few_items_for_the_bound_are_refused_before_anything_is_searched() -> None:
    bench = Answers()
    message = r"400 items cannot show that 0\.99 is kept: .* a loss of 1\.1% would not be excluded"
    with pytest.raises(AddlangError, match=message) as caught:
        search(bench, keep=0.99)
    assert "at least 460 items" in str(caught.value)
    assert len(bench.measured) == 1
    with pytest.raises(AddlangError, match="half of them choose, half confirm"):
        search(bench, keep=0.98, by="layer")


def test_the_bench_measures_what_is_written_to_disk(run: Path, world: World, tmp_path: Path) -> None:
    spec = Revert(model=str(run), source_model=world.model)
    models = open_models(spec)
    bench = Bench(spec, models, torch.device("cpu"))
    half = spec.model_copy(update={"parameters": spec.parameters.model_copy(update={"scale": 0.5})})
    bench._apply(half)
    merge_models(half, tmp_path / "out")
    written = load_model(tmp_path / "out", dtype=torch.float32)
    for name, p in written.named_parameters():
        assert torch.equal(p, bench.model.get_parameter(name))
    assert bench.key(spec) == Checkpoint(run).hash  # so that the run's own measurements are found in the cache
    none = spec.model_copy(update={"parameters": spec.parameters.model_copy(update={"scale": 0.0})})
    assert bench.key(none) == Checkpoint(Path(world.model)).hash
    assert bench.key(half) not in (bench.key(spec), bench.key(none))


def test_a_run_needs_no_more_than_its_directory_and_a_bound(run: Path, tmp_path: Path) -> None:
    """The text that it held out is read again, and its own measurements are used."""
    budget = revert_to_budget(str(run), tmp_path / "out", keep=0.9, steps=3)["budget"]
    assert budget["watched"] == ["text (en) (bits_per_byte)"]
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    after = next(r for r in rows if r["model"] == "after" and r["role"] == "target")
    assert budget["points"][-1]["share"] == 1  # of a random model, training on any text improves any other
    assert budget["points"][-1]["target"] == {f"{after['task']}, {after['metric']}": after["value"]}


@pytest.mark.parametrize("by", ["overall", "layer"])
def test_an_update_that_loses_is_scaled_back_and_the_result_says_how(
    run: Path, world: World, tmp_path: Path, by: str
) -> None:
    """The way back from the trained to the random model: it must lose."""
    out = tmp_path / "kept"
    wanted = Wanted(language="sw", text=(world.more,), source_text=(world.english,))
    record = revert_to_budget(world.model, out, keep=0.9, by=by, source=str(run), wanted=wanted, steps=8)
    budget = record["budget"]
    assert budget["chosen"]["low"] >= 0.9
    assert 0 < budget["share_of_update"] < 1
    assert budget == json.loads((out / "merge.json").read_text())["budget"]
    card = (out / "README.md").read_text()
    assert "Scaled back to a budget" in card
    assert "subject to the error of one test" in card
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"{p['share']:.3f}" in page for p in budget["points"])
    tested = sum(
        p["items_used"] == budget["chosen"]["items_used"] and p["parts"] == budget["chosen"]["parts"]
        for p in budget["points"]
    )
    assert page.count("<circle") == 2 * tested  # wide and narrow
    assert "bound 90" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert verify_merge(out)["ok"]
    for end in (Path(world.model), run):
        assert any(not torch.equal(weights(out)[n], t) for n, t in weights(end).items())


def test_what_was_measured_is_not_measured_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = revert_to_budget(str(run), tmp_path / "a", keep=0.97, steps=4)

    def apply(self: Bench, spec: Revert) -> None:
        raise AssertionError("mixed again")

    monkeypatch.setattr(Bench, "_apply", apply)
    second = revert_to_budget(str(run), tmp_path / "b", keep=0.97, steps=4)
    assert first["budget"]["points"] == second["budget"]["points"]
    assert {k: v for k, v in listing(tmp_path / "a").items() if k.endswith(".safetensors")} == {
        k: v for k, v in listing(tmp_path / "b").items() if k.endswith(".safetensors")
    }


Call = Callable[[], Any]


def test_mistakes_are_explained_and_nothing_is_written(run: Path, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, no_run = str(run), str(tmp_path / "copy")
    (tmp_path / "copy").symlink_to(Path(world.model))
    calls: list[tuple[str, Call]] = [
        ("--keep 97 is no share", lambda: revert_to_budget(model, out, keep=97)),
        ("Did you mean 'module'", lambda: revert_to_budget(model, out, keep=0.9, by="modul")),
        ("no run of addlang", lambda: revert_to_budget(no_run, out, keep=0.9)),
        ("has the weights of", lambda: revert_to_budget(model, out, keep=0.9, source=model)),
        ("its language is not known", lambda: revert_to_budget(no_run, out, keep=0.9, source=model)),
        ("no task of the source language is named", lambda: revert_to_budget(model, out, keep=0.9, watch=["ifeval"])),
        ("does not exist", lambda: revert_to_budget(model, out, keep=0.9, wanted=Wanted(text=("nosuch.jsonl",)))),
    ]
    for message, call in calls:
        with pytest.raises(AddlangError, match=message):
            call()
    assert not out.exists()


def test_two_models_without_a_run_need_only_what_is_measured(run: Path, world: World, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.iterdir():
        if file.suffix in (".safetensors", ".json", ".jinja") and file.name != "state.json":
            (copy / file.name).symlink_to(file)
    wanted = Wanted(language="sw", text=(world.more,), source_text=(world.english,))
    record = revert_to_budget(str(copy), tmp_path / "out", keep=0.97, source=world.model, wanted=wanted, steps=4)
    assert record["budget"]["chosen"]["target_gained"] is not None


def test_held_out_conversations_are_measured_by_their_answers(run: Path, world: World, tmp_path: Path) -> None:
    """As the run itself measures them: without the answers, the gain would be that of the conversations as plain text."""
    spec = Revert(model=str(run), source_model=world.model)
    settings = world.data(run, datasets=[{"path": world.chat}], sequence_length=128)
    evaluation = {**settings["evaluation"], "target_datasets": [{"path": world.chat}]}
    for changes in ({}, {"evaluation": evaluation}):  # what the run held out, and what it was given
        suite = suite_of(Recipe.parse({**settings, **changes}), open_models(spec), spec)
        assert [t.name for t in suite.tasks][-2:] == ["held-out text (sw)", "held-out answers (sw)"]
        found = evaluate_model(load_model(run), suite)
        (chosen,) = of_text([m for m in found if m.role == "target"])
        assert chosen.metric == "answer_bits_per_byte", "so this is what 'target gained' is about"


def test_norms_are_those_of_the_update(run: Path, world: World) -> None:
    spec = Revert(model=str(run), source_model=world.model)
    models = open_models(spec)
    pairs = zip(load_model(Path(world.model)).parameters(), load_model(run).parameters(), strict=True)
    total = sum(float((a.detach().double() - b.detach().double()).square().sum()) for a, b in pairs)
    for by in ("module", "layer"):
        assert sum(parts_of(models, spec, by).values()) == pytest.approx(total)  # type: ignore[arg-type]
    assert {"layer 0", "layer 1", "embed_tokens"} <= parts_of(models, spec, "layer").keys()
