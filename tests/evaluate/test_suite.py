from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate import suite as module
from addlang.evaluate.compare import compare
from addlang.evaluate.measurement import Item, Measurement, NotMeasuredError, NotRun, Outcome
from addlang.evaluate.suite import Suite, Task, build_suite, cached_evaluate, evaluate_model
from addlang.recipe import Evaluation, RepliesEvaluation

HELDOUT = [("a", "paka aliketi juu ya mkeka"), ("b", "panya alikimbia")]


@pytest.fixture
def recipe(tmp_path: Path) -> Evaluation:
    (tmp_path / "en.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "the rat ran to the hat"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the mat"}\n{"prompt": "the hat"}\n')
    return Evaluation.model_validate(
        {
            "source_datasets": [{"path": "en.jsonl"}],
            "tasks": ["lab"],
            "limit": 16,
            "replies": {"prompts": "prompts.jsonl", "max_new_tokens": 5},
        }
    )


def build(evaluation: Evaluation, tokenizer: Any, base_dir: Path, **changes: Any) -> Suite:
    settings: dict[str, Any] = {
        "heldout_target": HELDOUT,
        "heldout_chats": (),
        "source_language": "en",
        "target_language": "sw",
        "sequence_length": 64,
    }
    return build_suite(evaluation, tokenizer=tokenizer, base_dir=base_dir, **{**settings, **changes})


def test_source_text_and_prompts_in_directories_of_several_files_are_measured(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(f'{{"text": "the cat {name}"}}\n')
    evaluation = Evaluation.model_validate(
        {"source_datasets": [{"path": "rows"}], "replies": {"prompts": "rows", "max_new_tokens": 2}}
    )
    outcome = evaluate_model(model, build(evaluation, tokenizer, tmp_path))
    ids = {m.metric: [item.id for item in m.items] for m in outcome if m.role == "source"}
    assert ids["bits_per_byte"] == ["0:a.jsonl:1", "0:b.jsonl:1"]
    assert ids["degenerate_replies"] == ["rows:a.jsonl:1", "rows:b.jsonl:1"]


def test_a_suite_measures_source_and_target_side_by_side(
    model: Any, tokenizer: Any, recipe: Evaluation, tmp_path: Path
) -> None:
    suite = build(recipe, tokenizer, tmp_path)
    steps: list[float] = []
    model.train()
    outcome = evaluate_model(model, suite, progress=steps.append)
    assert model.training
    model.eval()
    rows = {(m.task, m.metric): (m.role, m.language) for m in outcome}
    assert rows[("text (en)", "bits_per_byte")] == ("source", "en")
    assert rows[("held-out text (sw)", "bits_per_byte")] == ("target", "sw")
    assert rows[("lab tasks", "exact_match")] == ("source", "en")
    assert rows[("lab facts (sw)", "accuracy")] == ("target", "sw")
    assert ("replies", "degenerate_replies") in rows
    assert {m.n for m in outcome if m.task.startswith("lab")} == {16}
    assert steps == sorted(steps)
    assert steps[-1] == len(suite.tasks)


def test_a_task_file_is_found_beside_the_recipe_and_takes_the_role_it_is_given(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "q.jsonl").write_text('{"q": "the cat sat on the", "c": ["mat", "hat"], "a": 0}\n' * 3)
    (tmp_path / "tasks" / "facts.yaml").write_text(
        "task: facts\ndataset_path: json\ndataset_kwargs: {data_files: {test: q.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    spec = {"tasks": ["tasks/facts.yaml"], "task_roles": {"tasks/facts.yaml": "target"}, "limit": 2, "replies": None}
    (tmp_path / "en.jsonl").write_text('{"text": "the cat"}\n')
    spec["source_datasets"] = [{"path": "en.jsonl"}]
    suite = build(Evaluation.model_validate(spec), tokenizer, tmp_path)
    m = evaluate_model(model, suite)[-1]
    assert (m.task, m.metric, m.role, m.language, m.n) == ("facts", "acc", "target", "sw", 2)
    assert m.settings["chat_template"]
    with pytest.raises(AddlangError, match=r"facs\.yaml' does not exist\n  fix: Did you mean 'facts\.yaml'"):
        build(Evaluation.model_validate({**spec, "tasks": ["tasks/facs.yaml"]}), tokenizer, tmp_path)


def test_the_lab_has_no_facts_in_another_language(tokenizer: Any, recipe: Evaluation, tmp_path: Path) -> None:
    names = [t.name for t in build(recipe, tokenizer, tmp_path, target_language="ig").tasks]
    assert "lab tasks" in names
    assert not any("facts" in name for name in names)


def test_the_lab_tasks_can_be_asked_in_the_target_language(tokenizer: Any, recipe: Evaluation, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"tasks": ("lab-target",)})
    assert "lab tasks (sw)" in [t.name for t in build(recipe, tokenizer, tmp_path, target_language="sw").tasks]


def test_a_model_without_chat_template_is_not_asked_and_the_reason_is_kept(
    model: Any, new_tokenizer: Any, recipe: Evaluation, tmp_path: Path
) -> None:
    outcome = evaluate_model(model, build(recipe, new_tokenizer(None), tmp_path))
    assert {name for name, _ in outcome.not_run} == {"lab tasks", "replies"}
    assert all("no chat template" in reason for _, reason in outcome.not_run)
    assert {m.metric for m in outcome} == {"bits_per_byte", "accuracy"}


def test_built_in_english_does_not_stand_in_for_another_source_language(tokenizer: Any, tmp_path: Path) -> None:
    suite = build(Evaluation(), tokenizer, tmp_path, source_language="fr")
    assert [name for name, _ in suite.not_run] == ["text (fr)", "replies"]
    assert [t.name for t in suite.tasks] == ["held-out text (sw)"]


def test_without_a_recipe_english_is_measured_on_the_built_in_set(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    suite = build(Evaluation(replies=None), tokenizer, tmp_path, heldout_target=[])
    assert suite.not_run == (("held-out text (sw)", "no held-out target text was given"),)
    (m,) = evaluate_model(model, suite)
    assert (m.task, m.role, m.language) == ("built-in text (en)", "source", "en")
    assert m.n >= 50
    prompts = module.reply_prompts(RepliesEvaluation(limit=7), None)
    assert len(prompts) == 7


def test_a_fingerprint_covers_items_settings_and_tokenizer(
    tokenizer: Any, new_tokenizer: Any, recipe: Evaluation, tmp_path: Path
) -> None:
    def prints(*args: Any, **kwargs: Any) -> dict[str, str]:
        return {t.name: t.fingerprint for t in build(*args, **kwargs).tasks}

    first = prints(recipe, tokenizer, tmp_path)
    assert first == prints(recipe, new_tokenizer(), tmp_path)
    other = prints(recipe, tokenizer, tmp_path, heldout_target=HELDOUT[:1])
    assert {n for n in first if first[n] != other[n]} == {"held-out text (sw)"}
    other = prints(recipe, tokenizer, tmp_path, sequence_length=32)
    assert {n for n in first if first[n] != other[n]} == {"held-out text (sw)", "text (en)"}
    template = new_tokenizer("{{ messages[0]['content'] }}")
    other = prints(recipe, template, tmp_path)
    assert all(first[n] != other[n] for n in first)


def counting(calls: list[int], outcome: Outcome) -> Suite:
    def run(model: Any, tokenizer: Any, progress: Any) -> Outcome:
        calls.append(1)
        warnings.warn("something to know", AddlangWarning, stacklevel=2)
        return outcome

    return Suite(None, (Task("t", "print", run),))


def measurement(task: str = "t", values: tuple[float, ...] = (1.0, 0.0, 1.0)) -> Measurement:
    return Measurement(
        task=task,
        version="1",
        role="source",
        language="en",
        metric="accuracy",
        higher_is_better=True,
        items=tuple(Item(str(i), v) for i, v in enumerate(values)),
        settings={},
        unit="share",
    )


def test_a_cached_result_is_equal_with_its_warnings_and_is_not_measured_again(model: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    outcome = Outcome([measurement()], [NotRun("t (x)", "why")])
    suite = counting(calls, outcome)
    for _ in range(2):
        with pytest.warns(AddlangWarning, match="something to know"):
            assert cached_evaluate(model, "hash", suite, tmp_path) == outcome
    assert len(calls) == 1
    with pytest.warns(AddlangWarning):
        cached_evaluate(model, "other weights", suite, tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("size", [0, 30, -3])
def test_a_torn_cache_is_measured_again(model: Any, tmp_path: Path, size: int) -> None:
    calls: list[int] = []
    outcome = Outcome([measurement()])
    suite = counting(calls, outcome)
    with pytest.warns(AddlangWarning):
        cached_evaluate(model, "hash", suite, tmp_path)
    (file,) = (tmp_path / "hash").iterdir()
    file.write_text(file.read_text()[:size])
    with pytest.warns(AddlangWarning):
        assert cached_evaluate(model, "hash", suite, tmp_path) == outcome
    assert len(calls) == 2
    assert json.loads(file.read_text())["measurements"]
    assert len(list((tmp_path / "hash").iterdir())) == 1, "no temporary files are left"


def test_another_dtype_is_another_result(new_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    suite = counting(calls, Outcome([measurement()]))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.warns(AddlangWarning):
            cached_evaluate(new_model(tokenizer).to(dtype), "hash", suite, tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("config", "rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("generation_config", "eos_token_id", 3),
    ],
)
def test_another_configuration_is_another_result_of_the_same_weights(
    part: str, key: str, value: Any, new_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    calls: list[int] = []
    suite = counting(calls, Outcome([measurement()]))
    model = new_model(tokenizer)
    for _ in range(2):
        with pytest.warns(AddlangWarning):
            cached_evaluate(model, "hash", suite, tmp_path)
    assert len(calls) == 1
    assert getattr(getattr(model, part), key) != value
    setattr(getattr(model, part), key, value)
    with pytest.warns(AddlangWarning):
        cached_evaluate(model, "hash", suite, tmp_path)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_an_error(model: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AddlangError, match="cannot be written"):
        cached_evaluate(model, "hash", counting([], Outcome([measurement()])), tmp_path / "cache")


def test_an_error_of_one_task_is_not_hidden(model: Any) -> None:
    def broken(model: Any, tokenizer: Any, progress: Any) -> Outcome:
        raise AddlangError("broken")

    def impossible(model: Any, tokenizer: Any, progress: Any) -> Outcome:
        raise NotMeasuredError("impossible", "do this")

    with pytest.raises(AddlangError, match="broken"):
        evaluate_model(model, Suite(None, (Task("t", "", broken),)))
    assert evaluate_model(model, Suite(None, (Task("t", "", impossible),))).not_run == [("t", "impossible (do this)")]


def test_the_real_cache_gives_the_same_measurements(
    model: Any, tokenizer: Any, recipe: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = build(recipe, tokenizer, tmp_path)
    first = cached_evaluate(model, "hash", suite, tmp_path / "cache")
    monkeypatch.setattr(module, "_run", None)
    assert cached_evaluate(model, "hash", suite, tmp_path / "cache") == first


def test_prompts_may_stand_in_a_text_column_and_a_bad_file_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "the cat"}\n')
    spec = Evaluation.model_validate({"replies": {"prompts": "p.jsonl"}, "source_datasets": [{"path": "p.jsonl"}]})
    assert len(build(spec, tokenizer, tmp_path).tasks) == 3
    (tmp_path / "p.jsonl").write_text('{"question": "the cat"}\n')
    assert spec.replies is not None
    with pytest.raises(AddlangError, match=r"p\.jsonl.*'prompt'"):
        module.reply_prompts(spec.replies, tmp_path)


def test_compare_makes_flat_rows_and_says_what_is_missing() -> None:
    before = [measurement("a"), measurement("b")]
    after = [measurement("a", (0.0, 0.0, 1.0))]
    with pytest.warns(AddlangWarning, match=r"not compared: b \(accuracy\)"):
        (row,) = compare(before, after, resamples=200)
    assert (row["task"], row["n"], row["p"]) == ("a", 3, 1.0)
    assert row["items_id"] == before[0].items_id, "metrics of the same items can be told"
    assert row["difference"] == pytest.approx(-1 / 3)
    assert row["relative"] == pytest.approx(-0.5)
    assert row["low"] <= row["difference"] <= row["high"]
    assert json.loads(json.dumps(row)) == row
