"""Layers: what every form of selector names, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import make_model

from addlang.errors import AddlangError
from addlang.strategies import PlanInputs, make_strategy


def frozen(layers: int = 4, **options: Any) -> set[str]:
    model = make_model("mistral", num_hidden_layers=layers)
    plan = make_strategy("layers", options).plan(model, PlanInputs())
    assert all(plan[n].kind in ("all", "none") for n in plan)
    return {n for n in plan if plan[n].kind == "all"}


def layers_of(names: set[str]) -> set[int]:
    return {int(n.split(".")[2]) for n in names if ".layers." in n}


@pytest.mark.parametrize(
    ("given", "layers"),
    [("0", {0}), (2, {2}), ("-1", {3}), ("0-2", {0, 1, 2}), ("0,2-3", {0, 2, 3}), ([0, "2-3"], {0, 2, 3}), ("-4", {0})],
)
def test_layers_by_index_and_inclusive_range(given: Any, layers: set[int]) -> None:
    found = frozen(freeze=given)
    assert layers_of(found) == layers
    assert len(found) == 9 * len(layers)  # seven matrices and two norms; the rest of the model is trained


def test_train_freezes_the_rest_but_not_embedding_and_head() -> None:
    found = frozen(train="1-2")
    assert layers_of(found) == {0, 3}
    assert found - {n for n in found if ".layers." in n} == {"model.norm.weight"}


def test_a_pattern_is_searched_in_parameter_names() -> None:
    found = frozen(freeze=r"layers\.[01]\.mlp")
    assert found == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")}
    assert frozen(freeze=[r"q_proj", "3"]) == frozen(freeze="q_proj") | frozen(freeze="3")


def test_embedding_and_head_follow_the_options_of_every_strategy() -> None:
    found = frozen(freeze="0", train_embeddings=False)
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "qproj"}, r"pattern 'qproj' matches no parameter\n.*Did you mean 'q_proj'"),
        ({"freeze": "self_atn"}, "Did you mean 'self_attn'"),
        ({"freeze": "."}, "selects every layer"),
        ({"train": "model"}, r"selects every layer\n.*strategy: full"),
        ({"train": "lm_head"}, r"matches only 'lm_head\.weight'\n.*train_lm_head"),
        ({"freeze": "4"}, "layers '4': the model has layers 0-3"),
        ({"freeze": "0-31"}, "layers '0-31': the model has layers 0-3"),
        ({"freeze": "-5"}, "layers '-5': the model has layers 0-3"),
        ({"freeze": "3-1"}, r"empty range\n.*write 1-3"),
        ({"freeze": "mlp("}, "no regular expression"),
        ({}, "give freeze or train"),
        ({"freeze": "0", "train": "1"}, "not both"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AddlangError, match=message):
        frozen(**options)


def test_freezing_all_numbered_layers_leaves_the_final_norm() -> None:
    model = make_model("mistral")
    plan = make_strategy("layers", {"freeze": "0-1"}).plan(model, PlanInputs())
    assert plan["model.norm.weight"].kind == "none"
