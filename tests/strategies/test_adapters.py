"""LoRA, DoRA, AdaLoRA: merged exports by hand, ties that stay, AdaLoRA's schedule, order and state."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, save_model

from addlang.errors import AddlangError
from addlang.export import export
from addlang.freeze.proof import prove
from addlang.models import Checkpoint, load_model, parameter_kinds
from addlang.strategies import PlanInputs, make_strategy

peft = pytest.importorskip("peft")
NAMES = ("lora", "dora", "adalora")
IDS = torch.arange(5, 60).view(1, -1)


def attach(name: str, model: Any, *, masters: bool = True, seed: int = 0, **options: Any) -> Any:
    strategy = make_strategy(name, options)
    return strategy.attach(model, strategy.plan(model, PlanInputs(seed=seed)), "auto", masters=masters)


def train(attached: Any, steps: int = 5, first: int = 1, optimizer: Any = None, total: int | None = None) -> Any:
    if optimizer is None:
        optimizer = torch.optim.AdamW(attached.param_groups(0.01), lr=1e-2)
        attached.bind(optimizer, total or steps)
    attached.model.train()
    for step in range(first, first + steps):
        torch.manual_seed(step)
        ids = torch.randint(6, 260, (2, 20))
        attached.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        term = attached.loss_term()
        if term is not None:
            term.backward()
        attached.before_clip(step)
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()
    attached.model.eval()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_merging_gives_the_trained_models_logits(name: str, architecture: str) -> None:
    attached = attach(name, make_model(architecture).double())
    train(attached)
    plain = make_model(architecture).double()
    with torch.no_grad():
        for n, tensor in attached.export():
            plain.get_parameter(n).copy_(tensor)
    assert torch.allclose(plain(IDS).logits, attached.model(IDS).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "qwen3"])
def test_merged_weights_are_those_of_pefts_own_merge(name: str, architecture: str) -> None:
    attached = attach(name, make_model(architecture))
    train(attached)
    ours = {n: attached.merged(n).clone() for n in attached.targets}
    for parameter, merged in ours.items():
        layer = attached.layer(parameter)
        source = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        theirs = layer.get_base_layer().weight.detach()
        assert not torch.equal(theirs, source), parameter
        assert float((merged - theirs).abs().max()) <= 1e-6, parameter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_export_is_the_source_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """DoRA's magnitudes must be the norms: peft rounds them to the type of the weights, 0.2 % off in bf16."""
    source = {n: p.detach().clone() for n, p in make_model("llama").to(dtype).named_parameters()}
    exported = dict(attach(name, make_model("llama").to(dtype)).export())
    assert len(exported) == 14 + 2
    for n, tensor in exported.items():
        assert torch.equal(tensor.to(dtype), source[n]), n


def test_lora_by_hand() -> None:
    model = make_model("llama")
    source = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    attached = attach("lora", model, rank=4, alpha=6)
    train(attached)
    layer = model.model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 48)
    merged = dict(attached.export())["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(merged, source + 6 / 4 * b @ a, atol=1e-6)
    assert int(torch.linalg.matrix_rank((merged - source).double(), rtol=1e-4)) <= 4


def test_dora_by_hand() -> None:
    """Rows of the merged matrix have the trained magnitudes, and the direction of W + s B A."""
    model = make_model("llama")
    source = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    attached = attach("dora", model, rank=4, alpha=8)
    train(attached)
    layer = model.model.layers[0].mlp.down_proj
    direction = source + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    merged = dict(attached.export())["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(merged.norm(dim=1), magnitude.abs(), rtol=1e-5)
    assert torch.allclose(
        merged / merged.norm(dim=1, keepdim=True), direction / direction.norm(dim=1, keepdim=True), atol=1e-5
    )
    assert not torch.allclose(magnitude, source.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_embedding_and_head_train_in_place_and_stay_tied(name: str) -> None:
    """peft's modules_to_save trains copies of both, and a tied head comes loose."""
    model = make_model("qwen3")
    attached = attach(name, model)
    before = model.lm_head.weight.detach().clone()
    train(attached)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_to_save_unties_a_tied_head() -> None:
    """The configuration of the SSU paper's public code, on a tied model: two copies that part at the first step."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(make_model("qwen3"), config)
    copies = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert len(copies) == 2
    assert torch.equal(*copies)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(*copies)


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_embedding_and_head_are_trained(name: str) -> None:
    model = make_model("olmo2")
    norms = [n for n, i in parameter_kinds(model).items() if i.kind == "norm"]
    attached = attach(name, model)
    trained = [n for n, _ in attached.named_trainable()]
    assert all("lora_" in n or n in ("model.embed_tokens.weight", "lm_head.weight") for n in trained)
    assert all(attached.plan[n].kind == "all" for n in norms)
    counted = sum(p.numel() for n, p in attached.named_trainable() if "lora_" in n)
    assert counted == attached.plan.provenance["adapter_parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_holds_after_merging_with_frozen_token_rows(name: str, tmp_path: Path) -> None:
    source = Checkpoint(save_model(tmp_path / "source", "olmo2"))
    model = load_model(source.directory, dtype=torch.float32)
    strategy = make_strategy(name, {"freeze_special_tokens": True, "target_modules": "q_proj,down_proj"})
    plan = strategy.plan(model, PlanInputs(model_hash=source.hash, special_token_ids=(0, 1, 2)))
    attached = strategy.attach(model, plan, "auto")
    train(attached)
    export(source, attached, plan, tmp_path / "out")
    proof = prove(source, Checkpoint(tmp_path / "out"), plan)
    assert proof["ok"]
    moved = {t["group"] for t in proof["tensors"] if t["moved"]}
    assert moved == {"q_proj", "down_proj", "embed_tokens", "lm_head"}


def test_the_start_depends_on_the_seed_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(100, ())))
        return attach("lora", make_model("llama"), seed=seed).model.model.layers[0].mlp.up_proj.lora_A["default"].weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("name", NAMES)
def test_16_bit_models_get_fp32_adapters_and_keep_16_bit_matrices(name: str) -> None:
    model = make_model("llama").to(torch.bfloat16)
    attached = attach(name, model)
    assert {p.dtype for _, p in attached.named_trainable()} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.get_base_layer().weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert {
        p.dtype for _, p in attach(name, make_model("llama").to(torch.bfloat16), masters=False).named_trainable()
    } == {torch.bfloat16}


def test_an_unknown_module_names_the_nearest_one() -> None:
    with pytest.raises(AddlangError, match=r"no linear layer 'q_projs'\n.*Did you mean 'q_proj'"):
        make_strategy("lora", {"target_modules": ["q_projs"]}).plan(make_model("llama"), PlanInputs())


def test_without_peft_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AddlangError, match=r"needs the package peft.*\n.*pip install 'addlang\[peft\]'"):
        attach("lora", make_model("llama"))


# AdaLoRA


def test_the_papers_schedule_for_the_papers_budget_and_its_shares_for_others() -> None:
    adalora: Any = make_strategy("adalora", {})
    assert adalora.schedule(12_208) == (1000, 8546, 20)
    assert adalora.schedule(1_221) == (100, 855, 2)
    assert adalora.schedule(4) == (0, 2, 1)
    options: Any = make_strategy("adalora", {"tinit": 0.1, "tfinal": 30, "interval": 5})
    assert options.schedule(200) == (20, 30, 5)


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (1000, {}), (100, {"tinit": 50, "tfinal": 0.5})])
def test_a_schedule_that_never_cuts_is_an_error(steps: int, options: dict[str, Any]) -> None:
    adalora: Any = make_strategy("adalora", options)
    if (steps, options) == (1000, {}):
        assert adalora.schedule(steps) == (82, 700, 2)
        return
    with pytest.raises(AddlangError, match="leave none to cut ranks in"):
        adalora.schedule(steps)


def test_ranks_shrink_to_the_target_and_stay() -> None:
    attached = attach("adalora", make_model("llama"), tinit=2, tfinal=6, interval=1)
    optimizer = train(attached, 2, total=14)
    assert set(attached.ranks.values()) == {12}
    train(attached, 4, 3, optimizer)
    half = sum(attached.ranks.values())
    assert 14 * 8 < half < 14 * 12
    train(attached, 2, 7, optimizer)
    at_target = dict(attached.ranks)
    assert sum(at_target.values()) == 14 * 8
    assert len(set(at_target.values())) > 1  # not alike: the budget goes where it matters
    train(attached, 6, 9, optimizer)
    assert attached.ranks == at_target
    for name, rank in at_target.items():  # momentum does not bring back what is cut
        assert int((attached.layer(name).lora_E["default"] != 0).sum()) == rank


def test_public_code_never_cuts() -> None:
    """It configures the schedule but calls no allocator; transformers' Trainer does not either."""
    attached = attach("adalora", make_model("llama"), tinit=1, tfinal=2, interval=1, reference_code=True)
    train(attached, 8)
    assert set(attached.ranks.values()) == {12}


def test_the_penalty_is_the_mean_over_factors_once_per_step() -> None:
    model = make_model("llama")
    attached = attach("adalora", model, target_modules=["q_proj"], orthogonal=0.5)
    by_hand = []
    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        a, b = q.lora_A["default"], q.lora_B["default"]
        by_hand += [(a @ a.T - torch.eye(12)).norm(), (b.T @ b - torch.eye(12)).norm()]
    assert attached.loss_term().item() == pytest.approx(0.5 * sum(by_hand).item() / 4, rel=1e-6)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert torch.allclose(loss, make_model("llama")(input_ids=IDS, labels=IDS).loss)  # none inside the forward pass
    assert attach("adalora", make_model("llama"), orthogonal=0).loss_term() is None


def test_the_allocators_memory_is_part_of_the_checkpoint() -> None:
    """peft saves neither its averages nor its masks: resumed without them, other ranks are cut."""
    options: dict[str, Any] = {"tinit": 1, "tfinal": 4, "interval": 1}
    whole = attach("adalora", make_model("llama"), **options)
    optimizer = train(whole, 5, total=12)
    state = {n: t.clone() for n, t in whole.state_dict().items()}
    resumed = attach("adalora", make_model("llama"), seed=9, **options)
    again = torch.optim.AdamW(resumed.param_groups(0.01), lr=1e-2)
    resumed.bind(again, 12)
    assert {n: t.shape for n, t in resumed.state_dict().items()} == {n: t.shape for n, t in state.items()}
    resumed.load_state_dict(state)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, 4, 6, optimizer)
    train(resumed, 4, 6, again)
    assert whole.ranks == resumed.ranks
    for (n, a), (m, b) in zip(whole.export(), resumed.export(), strict=True):
        assert n == m
        assert torch.equal(a, b), n


def test_the_initial_rank_must_be_larger_than_the_target() -> None:
    with pytest.raises(AddlangError, match="initial_rank 8 must be larger than target_rank 8"):
        make_strategy("adalora", {"initial_rank": 8})


def test_memory_counts_the_adapters_and_not_the_matrices_that_they_change() -> None:
    model = make_model("llama")
    strategy = make_strategy("lora", {"rank": 4})
    plan = strategy.outline(model)
    kept, besides = strategy.footprint(model, plan)
    attached = strategy.attach(model, plan, "auto")
    assert kept.trainable_count + besides == sum(p.numel() for _, p in attached.named_trainable())
    assert kept.trainable_count < plan.trainable_count
