"""The recipe: every problem at once, with the remedy; one meaning for every way to write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from addlang import strictyaml
from addlang.errors import AddlangError
from addlang.recipe import ALIASES, Phase, Recipe, parse_count

FLAT: dict[str, Any] = {
    "model_name_or_path": "lab", "output_dir": "out", "language": "sw", "datasets": [{"path": "text.jsonl"}], "strategy": "ssu",
}  # fmt: skip


def problems(data: dict[str, Any], **kw: Any) -> str:
    with pytest.raises(AddlangError) as caught:
        Recipe.parse(data, **kw)
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(FLAT))
    return file


def write(file: Path, text: str) -> Path:
    file.write_text(file.read_text() + text)
    return file


# ---- all problems at once


def test_all_problems_of_a_file_stand_in_one_message(recipe_file: Path) -> None:
    text = (
        "learning_rat: 1e-4\nseed: soon\ntokens: many\nlr_scheduler_type: cosin\nbatch_size: 32\nchat_template: no.jinja\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\nevaluation: {limit: 0, tasks: [gone.yaml]}\n"
        "calibration: {datasets: [{path: gone.jsonl}], sequnces: 4}\n"
    )
    with pytest.raises(AddlangError) as caught:
        Recipe.load(write(recipe_file, text))
    message = str(caught.value)
    for part in (
        "10 problem(s)",
        "learning_rat: unknown key. Did you mean 'learning_rate'?",
        "seed: Input should be a valid integer",
        "tokens: 'many' is not a count; write for example 200M",
        "lr_scheduler_type: Input should be 'cosine', 'linear'",
        "batch_size: 32 is not per_device_train_batch_size 4 x gradient_accumulation_steps 4; leave one of the three out",
        "evaluation.limit: Input should be greater than 0",
        "calibration.sequnces: unknown key. Did you mean 'sequences'?",
        f"calibration.datasets.0.path: {recipe_file.parent / 'gone.jsonl'}: the file does not exist",
        f"evaluation.tasks.0: task file '{recipe_file.parent / 'gone.yaml'}' does not exist",
        f"chat_template: {recipe_file.parent / 'no.jinja'}: the file does not exist",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("key", "meant"),
    [("base_model", "model_name_or_path"), ("micro_batch_size", "per_device_train_batch_size"), ("cutoff_len", "sequence_length")],
)  # fmt: skip
def test_names_of_other_tools_are_translated(key: str, meant: str) -> None:
    assert f"{key}: unknown key. addlang calls it '{meant}'" in problems({**FLAT, key: 1})


def test_every_alias_leads_to_a_key_that_exists() -> None:
    known = {*Recipe.model_fields, *Phase.model_fields, "--overwrite"}
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & known


def test_a_key_in_the_wrong_place_is_told_its_place() -> None:
    assert "limit: unknown key. It belongs to 'evaluation'" in problems({**FLAT, "limit": 5})
    phases = {k: FLAT[k] for k in ("model_name_or_path", "output_dir", "language")}
    phase = {"datasets": FLAT["datasets"], "strategy": "full", "seed": 3}
    message = problems({**phases, "phases": [phase], "datasets": FLAT["datasets"]})
    assert "datasets: unknown key. It belongs to a phase" in message
    assert "phases.0.seed: unknown key. It belongs to the top level" in message


def test_missing_keys_are_named() -> None:
    message = problems({})
    for key in ("model_name_or_path", "output_dir", "language", "datasets", "strategy"):
        assert f"  {key}: missing" in message


def test_a_broken_phase_is_not_also_called_absent() -> None:
    assert "1 problem(s)" in problems({**FLAT, "tokens": "many"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", True), ("batch_size", False), ("learning_rate", True), ("tokens", True), ("tokens", float("inf")), ("tokens", 1.5),
     ("seed", 1.5), ("learning_rate", "fast"), ("learning_rate", float("nan")), ("datasets", "text.jsonl"), ("datasets", []),
     ("language", 5), ("deterministic", "perhaps"), ("trust_remote_code", True), ("name", "a b")],
)  # fmt: skip
def test_a_wrong_type_or_value_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    assert f"  {key}: " in problems({**FLAT, key: value})


def test_batch_sizes_that_do_not_divide_are_refused_where_they_are_read() -> None:
    message = problems({**FLAT, "batch_size": 32, "per_device_train_batch_size": 5})
    assert "per_device_train_batch_size: batch_size 32 is not divisible by 5" in message
    message = problems({**FLAT, "batch_size": 32, "gradient_accumulation_steps": 3})
    assert "gradient_accumulation_steps: batch_size 32 is not divisible by 3" in message
    assert Recipe.parse({**FLAT, "batch_size": 32, "per_device_train_batch_size": 8})


def test_phase_names_differ_and_are_no_names_of_results() -> None:
    phases = {k: FLAT[k] for k in ("model_name_or_path", "output_dir", "language")}
    phase = {"datasets": FLAT["datasets"], "strategy": "full"}
    assert "'a' stands twice" in problems({**phases, "phases": [{**phase, "name": "a"}] * 2})
    assert "cannot be named 'before'" in problems({**phases, "phases": [{**phase, "name": "before"}]})


# ---- strategies


def test_options_of_the_strategy_are_checked_with_the_rest() -> None:
    message = problems({**FLAT, "strategy": {"name": "ssu", "ration": 0.5, "scorer": "wandy"}, "seed": -1})
    assert "strategy 'ssu': unknown option 'ration'. Did you mean 'ratio'?" in message
    assert "strategy 'ssu', option 'scorer': Input should be 'wanda'" in message
    assert "seed: Input should be greater than or equal to 0" in message


def test_an_unknown_strategy_names_the_nearest() -> None:
    assert "unknown strategy 'sssu'" in problems({**FLAT, "strategy": "sssu"})
    assert "Did you mean 'ssu'" in problems({**FLAT, "strategy": "sssu"})


def test_conflicting_options_of_a_strategy_are_refused() -> None:
    assert "sparsegpt with granularity row is undefined" in problems(
        {**FLAT, "strategy": {"name": "ssu", "scorer": "sparsegpt", "granularity": "row"}}
    )


# ---- files


def test_missing_files_name_the_nearest_one_and_stand_beside_the_recipe(recipe_file: Path) -> None:
    text = "evaluation: {source_datasets: [{path: tex.jsonl}], replies: {prompts: ask.txt}}\n"
    with pytest.raises(AddlangError) as caught:
        Recipe.load(write(recipe_file, text))
    assert f"did you mean '{recipe_file.parent / 'text.jsonl'}'?" in str(caught.value)
    assert f"evaluation.replies.prompts: {recipe_file.parent / 'ask.txt'}: the file does not exist" in str(caught.value)


def test_a_missing_recipe_names_the_nearest(recipe_file: Path) -> None:
    with pytest.raises(
        AddlangError, match=r"recipe '.*recip\.yaml' does not exist\n  fix: Did you mean 'recipe\.yaml'"
    ):
        Recipe.load(recipe_file.with_name("recip.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "is no valid YAML"), (b"- a\n- b\n", "must be a mapping"), (b"", "must be a mapping"), (b"\xff\xfe\x00", "cannot be read"),
     (b"seed: 1\nlanguage: sw\nseed: 2\n", "key 'seed' stands twice, in lines 1 and 3")],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_said_to_be_none(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(AddlangError, match=message):
        Recipe.load(file)


def test_norwegian_is_a_language_and_1e_4_a_number(recipe_file: Path) -> None:
    """YAML 1.1 reads ``no`` as false and ``1e-4`` as text."""
    recipe = Recipe.load(write(recipe_file, "source_language: no\nlearning_rate: 1e-4\nwarmup_steps: 5e-1\n"))
    assert recipe.source_language == "no"
    assert recipe.phases[0].learning_rate == 1e-4


def test_a_mapping_can_be_merged_into_another() -> None:
    """Own keys win over merged ones; a key that stands twice in one mapping is still an error."""
    text = "anchor: &half {conversations: 50, top_k: 4}\n"
    assert strictyaml.read(text + "other: {<<: *half, top_k: 8}")["other"] == {"conversations": 50, "top_k": 8}
    with pytest.raises(yaml.YAMLError, match="'top_k' stands twice"):
        strictyaml.read(text + "other: {<<: *half, top_k: 8, top_k: 9}")


# ---- meaning


@pytest.mark.parametrize(
    ("text", "count"),
    [("200M", 200_000_000), ("1.5B", 1_500_000_000), ("300k", 300_000), ("1e6", 1_000_000), ("2_000", 2000), ("1,000", 1000),
     (512, 512), (2e3, 2000), ("2G", 2_000_000_000)],
)  # fmt: skip
def test_counts_can_be_written_short(text: Any, count: int) -> None:
    assert parse_count(text) == count
    assert Recipe.parse({**FLAT, "tokens": text}).phases[0].tokens == count


def test_flat_and_phases_form_are_the_same_run() -> None:
    flat = {**FLAT, "tokens": "1M", "learning_rate": 1e-4, "seed": 3}
    phase = {k: flat[k] for k in ("datasets", "strategy", "tokens", "learning_rate")}
    top = {k: flat[k] for k in ("model_name_or_path", "output_dir", "language", "seed")}
    assert Recipe.parse(flat) == Recipe.parse({**top, "phases": [phase]})
    assert Recipe.parse(flat).fingerprint == Recipe.parse({**top, "phases": [phase]}).fingerprint


def test_the_resolved_recipe_is_a_recipe_of_the_same_run(recipe_file: Path) -> None:
    options = "strategy: {name: ssu, ratio: 0.25, scorer: random}\nevaluation: {tasks: 'lab, ifeval', replies: null}\ntokens: 3M\n"
    recipe_file.write_text(recipe_file.read_text().replace("strategy: ssu\n", "") + options)
    recipe = Recipe.load(recipe_file)
    resolved = recipe_file.with_name("resolved.yaml")
    resolved.write_text(yaml.safe_dump(recipe.resolved()))
    again = Recipe.load(resolved)
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert again.resolved() == recipe.resolved()
    assert recipe.evaluation.tasks == ("lab", "ifeval")


def test_the_fingerprint_is_of_what_determines_the_result() -> None:
    same = Recipe.parse(FLAT).fingerprint
    for change in ({"output_dir": "elsewhere"}, {"save_steps": 7}, {"logging_steps": 3}, {"report_to": "tensorboard"}):
        assert Recipe.parse({**FLAT, **change}).fingerprint == same, change
    for change in (
        {"learning_rate": 1e-4}, {"seed": 1}, {"tokens": "5k"}, {"strategy": "full"}, {"strategy": {"name": "ssu", "ratio": 0.4}},
        {"model_name_or_path": "other"}, {"datasets": [{"path": "other.jsonl"}]}, {"evaluation": {"limit": 3}},
    ):  # fmt: skip
        assert Recipe.parse({**FLAT, **change}).fingerprint != same, change


# ---- overrides


def load(file: Path, *pairs: tuple[str, Any]) -> Recipe:
    return Recipe.load(file, pairs)


def test_overrides_replace_values_of_the_file(recipe_file: Path) -> None:
    recipe = load(
        recipe_file, ("learning_rate", 1e-4), ("strategy.ratio", 0.25), ("evaluation.replies.limit", 3), ("output-dir", "o")
    )  # fmt: skip
    phase = recipe.phases[0]
    assert (phase.learning_rate, phase.strategy.ratio, recipe.output_dir) == (1e-4, 0.25, "o")
    assert recipe.evaluation.replies is not None
    assert recipe.evaluation.replies.limit == 3


def test_overrides_reach_a_phase_by_number_and_a_data_set_by_number(recipe_file: Path) -> None:
    recipe_file.write_text(yaml.safe_dump(Recipe.load(recipe_file).resolved()))
    recipe = load(recipe_file, ("phases.0.tokens", "1M"), ("phases.0.datasets.0.limit", 5), ("save_steps", 9))
    assert (recipe.phases[0].tokens, recipe.phases[0].datasets[0].limit, recipe.phases[0].save_steps) == (10**6, 5, 9)


def test_an_override_that_leads_nowhere_is_an_error(recipe_file: Path) -> None:
    with pytest.raises(AddlangError, match="is no item of a list of 1"):
        load(recipe_file, ("datasets.3.limit", 1))
    with pytest.raises(AddlangError, match="'seed' is a plain value"):
        load(write(recipe_file, "seed: 1\n"), ("seed.x", 1))
    with pytest.raises(AddlangError, match="Did you mean 'learning_rate'"):
        load(recipe_file, ("learning_rat", 1))


def test_an_override_of_the_strategy_keeps_no_options_of_the_old_one(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("strategy: ssu", "strategy: {name: ssu, ratio: 0.25}"))
    assert load(recipe_file, ("strategy", "full")).phases[0].strategy.name == "full"


def test_an_empty_section_can_be_filled_by_an_override(recipe_file: Path) -> None:
    assert load(write(recipe_file, "evaluation:\n"), ("evaluation.limit", 4)).evaluation.limit == 4
