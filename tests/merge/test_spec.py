"""Merge files: mergekit's form is understood, and mistakes are all named at once, each with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from addlang.errors import AddlangError
from addlang.merge.methods import Ties
from addlang.merge.settings import value_at
from addlang.merge.spec import load, parse

MERGEKIT = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: org/b
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
parameters: {normalize: true}
dtype: float16
"""


def test_a_file_of_mergekit_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(MERGEKIT)
    spec = load(file)
    assert isinstance(spec, Ties)
    assert spec.names() == ["org/base", "org/a", "org/b"]  # the base among the models is no update
    assert parse(spec.resolved()) == spec


def test_all_problems_are_named_at_once_with_remedies() -> None:
    data = {
        "merge_method": "ties", "base_model": "x", "int8_mask": True, "sede": 1,
        "models": [{"model": "a", "parameters": {"density": 1.5, "wieght": 1}}],
    }  # fmt: skip
    with pytest.raises(AddlangError) as caught:
        parse(data)
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "models.0.parameters.density: a density lies above 0" in text
    assert "int8_mask: unknown key. leave it out" in text
    assert "Did you mean 'seed'" in text
    assert "models.0.parameters.wieght: unknown key. Did you mean 'weight'" in text


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"merge_method": "tise"}, "Did you mean 'ties'"),
        ({"merge_method": "passthrough"}, "layer_swap"),
        ({}, "no merge_method"),
        ({"merge_method": "linear", "slices": []}, "whole models are merged"),
        ({"merge_method": "slerp", "base_model": "a", "models": ["b", "c"]}, "one other model"),
        ({"merge_method": "dare_ties", "base_model": "a", "models": ["b"]}, "density: missing"),
        ({"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 1.5}}, "above 0"),
        ({"merge_method": "ties", "base_model": "a", "models": ["a"]}, "besides base_model"),
        ({"merge_method": "linear", "models": ["a", "b"], "config_from": "c"}, "none of the models"),
        ({"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": True}}, "not a boolean"),
        ({"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": []}}, "must not be empty"),
        ({"merge_method": "layer_swap", "task_model": "a", "language_model": "b", "parameters": {"auto": True}}, "give base_model"),
        ({"merge_method": "special_tokens", "model": "a"}, "restore_special_tokens: missing"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(data: dict[str, object], part: str) -> None:
    with pytest.raises(AddlangError, match=part):
        parse(data)


def test_a_setting_may_be_a_number_a_gradient_or_filtered() -> None:
    assert value_at(0.3, "x", 1.0) == 0.3
    assert value_at((0.0, 1.0, 0.0), "x", 0.25) == 0.5
    assert value_at((0.0, 1.0, 0.0), "x", 1.0) == 0.0
    spec = parse(yaml.safe_load(MERGEKIT))
    assert isinstance(spec, Ties)
    weight = spec.models[2].parameters.weight
    assert weight is not None
    assert value_at(weight, "model.layers.0.mlp.up_proj.weight", 0) == 0.5
    assert value_at(weight, "model.norm.weight", 0) == 0.0


def test_ties_says_which_density_it_takes() -> None:
    spec = parse({"merge_method": "ties", "base_model": "a", "models": ["b"]})
    assert "density 0.2" in spec.notes()[0]
    assert (
        parse({"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 0.5}}).notes()
        == []
    )


def test_mergekits_rescale_is_the_l1_norm() -> None:
    def rescale(value: object) -> object:
        data = {
            "merge_method": "dare_linear",
            "base_model": "a",
            "models": ["b"],
            "parameters": {"density": 0.5, "rescale": value},
        }
        return parse(data).resolved()["parameters"]["rescale"]

    assert [rescale(True), rescale(False), rescale("density")] == ["l1", "none", "density"]
