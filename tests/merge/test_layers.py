"""Which model gives a layer, and factors by layer and module type."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_model

from addlang.errors import AddlangError
from addlang.merge.layers import Factors, Ranges, assign, auto_ranges, parse_layers
from addlang.merge.layout import Layout, layout_of
from addlang.models import ParamInfo


def layout(depth: int, tied: bool = False) -> Layout:
    kinds = {"embed": ParamInfo("embedding", "embed", "embed_tokens", None)}
    kinds |= {f"layers.{i}.up": ParamInfo("linear", f"layers.{i}.up", "up_proj", i) for i in range(depth)}
    kinds["norm"] = ParamInfo("norm", "norm", "norm", None)
    if not tied:
        kinds["head"] = ParamInfo("head", "head", "lm_head", None)
    return Layout({}, kinds, dict.fromkeys(kinds, (1,)), "embed", "embed" if tied else "head", depth)


def given(depth: int, ranges: Ranges, tied: bool = False) -> list[str]:
    own = layout(depth, tied)
    return [assign(n, i, own, ranges)[0] for n, i in own.kinds.items()]


def test_the_guides_ranges_on_32_layers() -> None:
    """Bottom 5, top 2, transition 1; embeddings with the bottom, final norm and head with the top."""
    expected = "l" + "l" * 5 + "m" + "t" * 23 + "m" + "l" * 2 + "ll"
    assert "".join(given(32, Ranges(5, 2, 1))) == expected


def test_without_a_top_the_head_is_the_task_models() -> None:
    assert "".join(given(4, Ranges(1, 0, 1))) == "l" + "lmtt" + "tt"
    assert "".join(given(4, Ranges(0, 1, 1))) == "t" + "ttml" + "ll"


def test_a_tied_head_goes_with_the_embedding() -> None:
    assert "".join(given(3, Ranges(1, 1, 0), tied=True)) == "l" + "ltl" + "l"


def test_auto_takes_the_ends_where_the_language_model_changed_relatively_more() -> None:
    language = [0.9, 0.8, 0.2, 0.1, 0.2, 0.7]
    task = [0.01, 0.02, 0.05, 0.06, 0.05, 0.02]  # smaller changes, but relative to their own mean in the middle
    assert auto_ranges(task, language) == (2, 1)
    with pytest.raises(AddlangError, match="task model's layers are those of base_model"):
        auto_ranges([0.0, 0.0], [0.1, 0.2])


def test_factors_of_module_and_layer_multiply_and_unknown_names_are_errors(tmp_path: Path) -> None:
    own = layout_of(save_model(tmp_path / "m"))
    factors = Factors({"up_proj": 0.5}, {"0": 0.2}, own)
    values = {n: factors(own.kinds[n]) for n in own.kinds}
    assert values["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.1)
    assert values["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert values["model.layers.0.mlp.down_proj.weight"] == 0.2
    assert values["lm_head.weight"] == 1
    with pytest.raises(AddlangError, match="Did you mean 'up_proj'"):
        Factors({"upproj": 0.5}, {}, own)
    with pytest.raises(AddlangError, match="two ranges"):
        Factors({}, {"0-1": 0.5, "1": 0.1}, own)


@pytest.mark.parametrize("text", ["9", "1-9", "2-1", "a", "-1", ""])
def test_a_range_outside_the_model_is_an_error(text: str) -> None:
    assert parse_layers("1-3", 4) == range(1, 4)
    with pytest.raises(AddlangError, match="layers"):
        parse_layers(text, 4)
