from __future__ import annotations

import builtins
import copy
import dataclasses
import json
import logging
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate import lm_eval as harness
from addlang.evaluate.compare import compare
from addlang.evaluate.exact_match import Question, exact_match
from addlang.evaluate.harness_results import items_of, measurements, warn_of_empty_replies
from addlang.evaluate.lm_eval import run_tasks
from addlang.evaluate.measurement import Measurement, NotMeasuredError
from addlang.evaluate.statistics import paired_difference

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: data.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - {metric: acc}
metadata: {version: 2.0}
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs:
  data_files: {test: data.jsonl}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{reply}}"
generation_kwargs: {until: ["<|end|>"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf}
metadata: {version: 1.0}
"""
ROWS = [
    {"question": f"the {a} sat on the", "choices": ["mat", "hat", "other rat"], "answer": i % 3, "reply": "the mat"}
    for i, a in enumerate(["cat", "rat", "hat", "mat", "cat and rat", "x", "other"])
]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(CHOICE)
    (tmp_path / "tasks" / "write.yaml").write_text(WRITE)
    (tmp_path / "tasks" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "tasks"


def run(model: Any, tokenizer: Any, tasks: list[str], **changes: Any) -> list[Measurement]:
    settings: dict[str, Any] = {
        "num_fewshot": None,
        "limit": None,
        "batch_size": 4,
        "seed": 0,
        "apply_chat_template": False,
    }
    return run_tasks(model, tokenizer, tasks, **{**settings, **changes})


def test_accuracy_of_a_local_task_equals_our_own(model: Any, tokenizer: Any, folder: Path) -> None:
    (m,) = run(model, tokenizer, ["choice.yaml"], base_dir=folder, roles={"choice.yaml": "target"})
    assert (m.task, m.metric, m.role, m.n, m.version, m.unit) == ("choice", "acc", "target", 7, "2.0", "share")
    for row, item in zip(ROWS, m.items, strict=True):
        context = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            tail = tokenizer(f"{row['question']} {choice}")["input_ids"][len(context) :]
            with torch.no_grad():
                logs = model(torch.tensor([context + tail])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[len(context) - 1 + k, token]) for k, token in enumerate(tail)))
        assert item.detail["scores"] == pytest.approx(scores, abs=1e-3)
        assert item.numerator == float(int(np.argmax(scores)) == row["answer"])


def test_replies_of_a_local_task_equal_our_own(model: Any, tokenizer: Any, folder: Path) -> None:
    exact, chrf = run(model, tokenizer, [str(folder / "write.yaml")], apply_chat_template=True)
    own = exact_match(
        model,
        tokenizer,
        [Question(str(i), row["question"], row["reply"]) for i, row in enumerate(ROWS)],
        max_new_tokens=6,
        batch_size=3,
        task="t",
        role="source",
        language="en",
    )
    assert [i.detail["reply"].strip() for i in exact.items] == [i.detail["reply"].strip() for i in own.items]
    assert chrf.metric == "chrf"
    assert chrf.aggregate is not None
    assert chrf.stderr is not None
    assert chrf.stderr > 0
    assert chrf.higher_is_better
    assert [i.id for i in chrf.items] == [i.id for i in exact.items]
    assert chrf.settings["generation"]["tiny_write"]["max_gen_toks"] == 6
    assert Measurement.from_json(exact.to_json()) == exact


def test_a_task_is_asked_alike_on_every_day(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%A') }}" + tokenizer.chat_template
    scores = []
    for day in (1, 2):
        today = type("Day", (datetime,), {"now": classmethod(lambda cls, day=day: cls(2026, 11, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        (m,) = run(model, dated, ["choice.yaml"], base_dir=folder, apply_chat_template=True)
        scores.append([item.detail["scores"] for item in m.items])
    assert scores[0] == scores[1]


def test_two_runs_pair_item_by_item(model: Any, tokenizer: Any, new_model: Any, folder: Path) -> None:
    task = [str(folder / "choice.yaml")]
    before, after = run(model, tokenizer, task)[0], run(new_model(tokenizer, seed=5), tokenizer, task)[0]
    d = paired_difference(before, after, resamples=100)
    assert d.difference == pytest.approx(after.value - before.value)
    assert "McNemar" in d.method


def test_other_data_are_another_task(model: Any, tokenizer: Any, folder: Path) -> None:
    task = [str(folder / "choice.yaml")]
    before = run(model, tokenizer, task)[0]
    rows = [{**ROWS[0], "question": "the new cat sat on the"}, *ROWS[1:]]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = run(model, tokenizer, task)[0]
    assert [a.id == b.id for a, b in zip(after.items, before.items, strict=True)] == [False] + [True] * 6
    with pytest.raises(AddlangError, match="setting 'content'"):
        paired_difference(before, after)


def test_a_task_of_ones_own_does_not_wait_for_those_of_the_harness(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_manager", lambda: pytest.fail("14,000 task files were read"))
    assert len(run(model, tokenizer, [str(folder / "choice.yaml")])) == 1


def test_a_group_is_one_measurement_over_all_items(model: Any, tokenizer: Any, folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(CHOICE.replace("tiny_choice", name))
    (folder / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    (m,) = run(model, tokenizer, [str(folder / "group.yaml")])
    assert (m.task, m.n) == ("group", 14)
    assert {item.id.split("/")[0] for item in m.items} == {"one", "two"}


def test_limit_examples_and_file_stand_in_the_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    (m,) = run(model, tokenizer, [str(folder / "choice.yaml")], limit=3)
    assert m.n == 3
    assert m.settings["limit"] == 3
    assert m.settings["num_fewshot"] == {"tiny_choice": 0}
    assert m.settings["content"] == harness.content(folder / "choice.yaml")


def test_content_is_that_of_configuration_and_data_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    first = harness.content(folder / "choice.yaml")
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("choice.yaml", "data.jsonl"):
        (copy / name).write_text((folder / name).read_text())
    assert harness.content(copy / "choice.yaml") == first
    (copy / "choice.yaml").write_text(CHOICE.replace("{{question}}", "{{question}} "))
    assert harness.content(copy / "choice.yaml") != first
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("hat", "rat"))
    assert harness.content(folder / "choice.yaml") != first


def test_the_process_is_left_as_it_was(
    model: Any, tokenizer: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    side, states = tokenizer.padding_side, (random.getstate(), torch.get_rng_state())
    numpy_state = np.random.get_state()[1].tolist()
    here = Path.cwd()
    steps: list[tuple[int, int]] = []
    run(model, tokenizer, [str(folder / "write.yaml")], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(4, 7), (7, 7)]
    assert tokenizer.padding_side == side
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == numpy_state
    assert Path.cwd() == here
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_a_missing_file_is_named_with_its_neighbour(model: Any, tokenizer: Any, folder: Path) -> None:
    with pytest.raises(AddlangError, match=r"does not exist\n  fix: Did you mean 'choice.yaml'"):
        run(model, tokenizer, [str(folder / "choise.yaml")])


def test_missing_data_are_named_with_the_task(model: Any, tokenizer: Any, folder: Path) -> None:
    (folder / "data.jsonl").unlink()
    with pytest.raises(AddlangError, match=r"choice.yaml' cannot be loaded .*\n  fix: data_files are looked up beside"):
        run(model, tokenizer, [str(folder / "choice.yaml")])


def test_an_unknown_task_gets_the_nearest_names(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        all_tasks = ("hellaswag", "ifeval", "mmlu")

    monkeypatch.setattr(harness, "_manager", lambda: Manager())
    with pytest.raises(AddlangError, match=r"'helaswag' is no task .*\n  fix: Did you mean 'hellaswag'"):
        run(model, tokenizer, ["helaswag"])


def test_an_unreachable_hub_is_said_with_the_task(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        all_tasks = ("ifeval",)

        def load(self, names: list[str]) -> None:
            raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(harness, "_manager", lambda: Manager())
    with pytest.raises(
        AddlangError, match=r"task 'ifeval' cannot be loaded .*\n  fix: its data come from the Hugging Face"
    ):
        run(model, tokenizer, ["ifeval"])


def test_without_the_harness_the_extra_is_named(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AddlangError, match=r"pip install 'addlang\[lm-eval\]'"):
        run(model, tokenizer, ["ifeval"])


def test_a_chat_template_that_is_not_there_is_no_silent_plain_prompt(model: Any, new_tokenizer: Any) -> None:
    with pytest.raises(NotMeasuredError, match="no chat template"):
        run(model, new_tokenizer(None), ["ifeval"], apply_chat_template=True)


def test_replies_that_end_before_they_begin_are_warned_of() -> None:
    samples = [{"resps": [[text]]} for text in ("", " \n", "a", "b")]
    with pytest.warns(AddlangWarning, match="task: 2 of 4 replies are empty"):
        warn_of_empty_replies(samples, "task")
    warn_of_empty_replies(samples[2:], "task")


def test_a_list_of_yes_and_no_becomes_a_share_of_its_parts() -> None:
    rest = {"filter": "none", "metrics": ["inst"], "doc_hash": "0" * 16, "target": "", "filtered_resps": ["r"]}
    samples = [{**rest, "doc_id": i, "inst": v} for i, v in enumerate([[True, False, True], [False]])]
    results = {"samples": {"t": samples}, "results": {"t": {"inst,none": 0.5}}}
    items = items_of(results, "t", "inst", "none", "")
    assert items is not None
    assert [(i.numerator, i.denominator) for i in items] == [(2, 3), (0, 1)]
    results["results"]["t"]["inst,none"] = 1 / 3  # the mean of shares: not a ratio of sums
    assert items_of(results, "t", "inst", "none", "") is None


def scored(metric: str, values: list[Any]) -> Measurement:
    numbers = [v if isinstance(v, list) else [v] for v in values]
    mean = sum(map(sum, numbers)) / sum(map(len, numbers))
    common = {"filter": "none", "metrics": [metric], "resps": [["x"]], "filtered_resps": ["x"], "target": "y"}
    samples = [{"doc_id": i, "doc_hash": "abcdefgh", metric: v, **common} for i, v in enumerate(values)]
    results = {
        "samples": {"t": samples}, "results": {"t": {f"{metric},none": mean}}, "versions": {"t": 1},
        "higher_is_better": {"t": {metric: True}},
    }  # fmt: skip
    return measurements("t", results, ["t"], {}, role="source", language="en")[0]


def test_a_unit_is_that_of_the_metric_and_not_of_its_values() -> None:
    poor, good = scored("bleu_max", [0.0, 0.4, 0.9]), scored("bleu_max", [0.0, 12.4, 3.9])
    assert poor.unit == good.unit == "bleu_max"
    assert compare([poor], [good], resamples=50)[0]["after"] == pytest.approx(16.3 / 3)
    for metric in (
        "acc",
        "acc_norm",
        "exact_match",
        "prompt_level_strict_acc",
        "rouge1_acc",
        "em",
        "accuracy_amb",
        "math_verify",
    ):
        assert scored(metric, [0.0, 1.0]).unit == "share", metric
    assert scored("says_yes", [True, False]).unit == scored("says_yes", [[True, False], [True]]).unit == "share"
    assert [scored(metric, [0, 1]).unit for metric in ("accent", "f1", "score")] == ["accent", "f1", "score"]


def test_samples_whose_unit_was_told_by_their_values_are_still_comparable() -> None:
    poor, good = scored("bleu_max", [0.0, 0.4, 0.9]), scored("bleu_max", [0.0, 12.4, 3.9])
    stored = dataclasses.replace(poor, unit="share")
    assert compare([stored], [good], resamples=50)[0]["unit"] == "bleu_max"
    assert compare([good], [stored], resamples=50)[0]["unit"] == "bleu_max"
    with pytest.raises(AddlangError, match="unit is 'bits/byte' before and 'bleu_max' after"):
        compare([dataclasses.replace(poor, unit="bits/byte")], [good])


def test_decoding_and_examples_of_a_task_are_those_of_the_recipe(model: Any, tokenizer: Any, folder: Path) -> None:
    """Table 9 of the SSU paper decodes by sampling, where the harness's own files are greedy."""
    file = str(folder / "write.yaml")
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_gen_toks": 5}
    greedy, again, drawn = (
        run(model, tokenizer, [file], generation=g, num_fewshot=n)[0]
        for g, n in ((None, None), ({}, None), (sampling, 0))
    )
    assert greedy.settings["generation"]["tiny_write"]["do_sample"] is False
    assert [i.detail for i in greedy.items] == [i.detail for i in again.items]
    assert drawn.settings["generation"]["tiny_write"] == {"until": ["<|end|>"], **sampling}
    assert [i.detail for i in drawn.items] != [i.detail for i in greedy.items]
    with pytest.raises(AddlangError, match="'tiny_choice' generates nothing"):
        run(model, tokenizer, [str(folder / "choice.yaml")], generation=sampling)


def test_settings_by_task_name_tasks_that_are_run() -> None:
    from addlang.recipe import Evaluation

    evaluation = Evaluation(tasks=("ifeval", "mmlu"), num_fewshot={"mmlu": 5})
    assert (evaluation.shots("mmlu"), evaluation.shots("ifeval")) == (5, None)
    assert Evaluation(tasks=("mmlu",), num_fewshot=3).shots("mmlu") == 3
    for key in ("num_fewshot", "generation_kwargs"):
        with pytest.raises(ValueError, match=f"{key}: 'mmul' is none of the tasks"):
            Evaluation.model_validate({"tasks": ["mmlu"], key: {"mmul": 5 if key == "num_fewshot" else {}}})
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Evaluation.model_validate({"tasks": ["mmlu"], "num_fewshot": {"mmlu": -1}})
