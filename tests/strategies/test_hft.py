"""HFT: the rule of one half by hand, other ratios, and every norm of every architecture."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tiny import ARCHITECTURES, make_model

from addlang.errors import AddlangError
from addlang.models import parameter_kinds
from addlang.strategies import PlanInputs, make_strategy

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "gate_proj", "down_proj")


def frozen_modules(architecture: str, seed: int = 0, layers: int = 5, **options: Any) -> dict[int, dict[str, set[str]]]:
    """layer -> attention | mlp | norms -> names of frozen modules; nothing may be frozen in part."""
    model = make_model(architecture, num_hidden_layers=layers)
    plan = make_strategy("hft", options).plan(model, PlanInputs(seed=seed))
    found: dict[int, dict[str, set[str]]] = {
        i: {"attention": set(), "mlp": set(), "norms": set()} for i in range(layers)
    }
    for name, info in parameter_kinds(model).items():
        assert plan[name].kind in ("all", "none")
        if info.layer is None:
            assert plan[name].kind == "none", name
        elif plan[name].kind == "all":
            group = "attention" if info.group in ATTENTION else "mlp" if info.group in MLP else "norms"
            found[info.layer][group].add(info.module)
    return found


def test_one_half_by_hand() -> None:
    """Five layers: 2 of 4 attention matrices and 1 of 2 norms in each; 2 of 3 in two layers' MLP, 1 in the other three's."""
    found = frozen_modules("llama")
    assert [len(g["attention"]) for g in found.values()] == [2] * 5
    assert [len(g["norms"]) for g in found.values()] == [1] * 5
    assert Counter(len(g["mlp"]) for g in found.values()) == {2: 2, 1: 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_of_every_layers_norms_whatever_they_are_called(architecture: str) -> None:
    """The public code knows input_layernorm and post_attention_layernorm only: of OLMo 2's four norms a layer (the other
    is post_feedforward_layernorm, and q_norm and k_norm) it always freezes the same one, of Gemma 3's six one of two."""
    model = make_model(architecture)
    norms = {n for n, m in model.model.layers[0].named_modules() if "norm" in type(m).__name__.lower()}
    assert len(norms) in (2, 4, 6)
    chosen: set[str] = set()
    for seed in range(12):
        layer = frozen_modules(architecture, seed=seed, layers=2)[0]
        assert len(layer["norms"]) == len(norms) / 2
        chosen |= {n.removeprefix("model.layers.0.") for n in layer["norms"]}
    assert chosen == norms  # each of them is frozen by some seed


def test_public_code_never_freezes_three_of_olmo_2s_norms() -> None:
    """Its two name lists, applied to OLMo 2: what the test above guards against."""
    known = (
        "input_layernorm",
        "ln_1",
        "norm1",
        "attention_norm",
        "post_attention_layernorm",
        "ln_2",
        "norm2",
        "ffn_norm",
    )
    layer = make_model("olmo2").model.layers[0]
    norms = {n for n, m in layer.named_modules() if "norm" in type(m).__name__.lower()}
    assert {n for n in norms if any(k in n for k in known)} == {"post_attention_layernorm"}
    assert len(norms) == 4


def test_a_bias_is_frozen_with_its_matrix() -> None:
    model = make_model("llama")
    plan = make_strategy("hft", {}).plan(model, PlanInputs())
    for name in plan:
        if name.endswith("proj.bias"):
            assert plan[name].kind == plan[name.removesuffix("bias") + "weight"].kind


@pytest.mark.parametrize(
    ("ratio", "attention", "mlp", "norms"),
    [
        (0.0, 0, 0, 0),
        (0.125, 1, 0, 0),
        (0.25, 1, 1, 1),
        (0.375, 2, 1, 1),
        (0.625, 3, 2, 1),
        (0.75, 3, 2, 2),
        (0.875, 4, 3, 2),
    ],
)
def test_other_ratios_freeze_the_rounded_share_of_each_group(
    ratio: float, attention: int, mlp: int, norms: int
) -> None:
    for groups in frozen_modules("llama", ratio=ratio).values():
        assert (len(groups["attention"]), len(groups["mlp"]), len(groups["norms"])) == (attention, mlp, norms)


def test_spread_meets_the_ratio_over_the_whole_model() -> None:
    """0.375 of 3 is 1.125: of eight layers one freezes 2 MLP matrices, seven freeze 1; 0.375 of 4 is 1.5."""
    found = frozen_modules("llama", layers=8, ratio=0.375, rounding="spread")
    assert Counter(len(g["mlp"]) for g in found.values()) == {1: 7, 2: 1}
    assert Counter(len(g["attention"]) for g in found.values()) == {1: 4, 2: 4}


def test_another_seed_gives_another_choice_and_the_same_seed_the_same() -> None:
    assert frozen_modules("llama", seed=1) == frozen_modules("llama", seed=1)
    assert frozen_modules("llama", seed=1) != frozen_modules("llama", seed=2)


def test_a_layer_with_other_matrices_is_refused_by_name() -> None:
    import transformers

    config = transformers.Phi3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    with pytest.raises(AddlangError, match=r"'model\.layers\.0\.self_attn\.qkv_proj\.weight' is none of them"):
        make_strategy("hft", {}).plan(transformers.Phi3ForCausalLM(config), PlanInputs())
