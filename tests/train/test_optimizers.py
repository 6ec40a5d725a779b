"""Optimizers, their groups, exact resume of each state, and what replaces parts of the model for speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from addlang.errors import AddlangError
from addlang.freeze.proof import bits
from addlang.models import load_model
from addlang.train.optimizers import build_optimizer, check_types, parameter_groups, require_compiler, state_parts
from training import Data, Killed, attach, phase, run, weights

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # tensors large enough for 8-bit state
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name: (how the model is attached, settings)
    "8bit": ({}, {"optimizer": "adamw_8bit"}),
    "8bit-bf16": (
        {"dtype": torch.bfloat16, "masters": False},
        {"optimizer": "adamw_8bit", "master_weights": "model"},
    ),
    "stochastic": (
        {"dtype": torch.bfloat16, "masters": False},
        {"optimizer": "adamw_bf16_sr", "master_weights": "model"},
    ),
    "pure-bf16": ({"dtype": torch.bfloat16, "masters": False}, {"master_weights": "model"}),
    "masters": ({"dtype": torch.bfloat16}, {"precision": "bf16"}),
    "embedding": ({}, {"embedding_learning_rate": 1e-4, "optimizer": "adamw_8bit"}),
}


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes minutes here and changes no contract."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("execution", ["masked", "split"])
@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed_is_bit_exact_for_every_optimizer(mode: str, execution: str, tmp_path: Path) -> None:
    how, settings = MODES[mode]

    def fresh() -> Any:
        return attach(execution=execution, changes=WIDE, **how)

    def kill(first: int) -> None:
        if first == 5 * 4:
            raise Killed

    want = weights(run(tmp_path / "whole", fresh(), **settings))
    with pytest.raises(Killed):
        run(tmp_path / "killed", fresh(), data=Data(kill), **settings)
    got = weights(run(tmp_path / "killed", fresh(), **settings))
    assert all(torch.equal(bits(want[n]), bits(got[n])) for n in want)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_elements_survive_every_optimizer(mode: str, tmp_path: Path) -> None:
    how, settings = MODES[mode]
    attached = attach(changes=WIDE, **how)
    source = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    run(tmp_path, attached, steps=3, **settings)
    for name, new in attached.export():
        mask = attached.plan[name].mask()
        assert torch.equal(bits(new)[mask], bits(source[name])[mask]), name
        assert not torch.equal(new[~mask], source[name][~mask]), name


def test_eight_bit_state_is_eight_bit() -> None:
    attached = attach("full", changes=WIDE)
    optimizer = build_optimizer(attached, phase(optimizer="adamw_8bit"))
    for _, p in attached.named_trainable():
        p.grad = torch.randn_like(p)
    optimizer.step()
    embedding = optimizer.state[attached.model.model.embed_tokens.weight]["exp_avg_sq"]
    assert state_parts(embedding) is None
    assert embedding.dtype == torch.float32
    for name, p in attached.named_trainable():  # torchao leaves small and odd tensors as they are
        if "embed_tokens" in name:
            continue
        assert (state_parts(optimizer.state[p]["exp_avg"]) is not None) == (
            p.numel() >= 4096 and p.numel() % 256 == 0
        ), name
    parts = state_parts(optimizer.state[attached.model.model.layers[0].self_attn.q_proj.weight]["exp_avg_sq"])
    assert parts is not None
    assert parts["codes"].dtype == torch.uint8


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses() -> None:
    moved = {}
    for name in ("adamw", "adamw_bf16_sr"):
        attached = attach("full", torch.bfloat16, masters=False)
        p = attached.model.lm_head.weight
        with torch.no_grad():
            p.fill_(1.0)
        settings = phase(optimizer=name, master_weights="model", learning_rate=1e-4, weight_decay=0.0)
        optimizer = build_optimizer(attached, settings)
        torch.manual_seed(0)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = float((p.detach().float() - 1).mean())
        if name == "adamw_bf16_sr":
            assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    assert moved["adamw"] == 0.0  # one step is 1e-4, the distance to the next bf16 number is 4e-3
    assert moved["adamw_bf16_sr"] == pytest.approx(-20e-4, rel=0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("execution", ["masked", "split"])
def test_embedding_and_head_have_a_rate_of_their_own(architecture: str, execution: str, tmp_path: Path) -> None:
    """The first step of Adam without decay moves every element that has a gradient by the learning rate."""
    attached = attach(architecture=architecture, execution=execution, freeze_special_tokens=True)
    before = weights(attached)
    settings = {"embedding_learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    run(tmp_path, attached, steps=1, warmup_steps=0, max_grad_norm=0.0, **settings)
    for name, new in attached.export():
        rate = 1e-4 if "embed_tokens" in name or "lm_head" in name else 1e-2
        assert float((new - before[name]).abs().max()) == pytest.approx(rate, rel=0.02), name


def test_the_schedule_scales_all_groups_alike(tmp_path: Path) -> None:
    attached = attach()
    groups = parameter_groups(attached, phase(embedding_learning_rate=1e-3))
    assert [g.get("lr") for g in groups] == [None, None, 1e-3]  # norms and biases are a group of their own
    counted = [p for g in groups for p in g["params"]]
    assert len(counted) == len({id(p) for p in counted}) == len(attached.named_trainable())


def test_an_embedding_rate_without_embedding_is_refused() -> None:
    attached = attach(train_embeddings=False, train_lm_head=False)
    with pytest.raises(AddlangError, match="neither the embedding nor the head is trained"):
        parameter_groups(attached, phase(embedding_learning_rate=1e-3))
    frozen = {"name": "full", "train_embeddings": False, "train_lm_head": False}
    with pytest.raises(ValueError, match="neither the embedding nor the head is trained"):
        phase(strategy=frozen, embedding_learning_rate=1e-3)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16_sr"])
def test_without_its_library_an_optimizer_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = attach("full", torch.bfloat16, masters=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(AddlangError, match=r"pip install 'addlang\[optimizers\]'"):
        build_optimizer(attached, phase(optimizer=name, master_weights="model"))


def test_stochastic_rounding_refuses_wide_weights() -> None:
    with pytest.raises(AddlangError, match="stored in bf16; this one is stored in float32"):
        check_types(phase(optimizer="adamw_bf16_sr", master_weights="model"), torch.float32)
    check_types(phase(optimizer="adamw_bf16_sr", master_weights="model"), torch.bfloat16)
    with pytest.raises(ValueError, match="needs master_weights: model"):
        phase(optimizer="adamw_bf16_sr")


@pytest.mark.parametrize(("precision", "stored"), [("bf16", torch.float32), ("fp32", torch.bfloat16)])
def test_a_precision_that_pure_weights_would_ignore_is_refused(precision: str, stored: torch.dtype) -> None:
    with pytest.raises(AddlangError, match=f"precision: {precision} contradicts master_weights: model"):
        check_types(phase(precision=precision, master_weights="model"), stored)
    check_types(phase(precision=precision), stored)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_training_in_fp16_is_refused_for_its_second_moments_would_be_zero(optimizer: str) -> None:
    assert float(torch.tensor(1e-4, dtype=torch.float16).square() * 0.001) == 0, (
        "of an ordinary gradient, at beta2 0.999"
    )
    with pytest.raises(AddlangError, match=r"would train in float16(.|\n)*use master_weights: fp32"):
        check_types(phase(optimizer=optimizer, master_weights="model"), torch.float16)
    check_types(phase(optimizer=optimizer), torch.float16)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(AddlangError, match=r"torch_compile needs a C\+\+ compiler"):
        require_compiler("torch_compile")


def test_flash_attention_with_isolated_documents_needs_single_sequences() -> None:
    with pytest.raises(ValueError, match="isolates packed documents only with per_device_train_batch_size: 1"):
        phase(attn_implementation="flash_attention_2")
    assert phase(attn_implementation="flash_attention_2", per_device_train_batch_size=1).isolate_documents


def test_attention_implementation_reaches_the_model(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert load_model(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(AddlangError, match="attn_implementation 'flash_attention_2' cannot be used"):
        load_model(tmp_path, attn_implementation="flash_attention_2")
