"""What liger-kernel does to a model, with a stand-in for the package, which needs a GPU."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model, save_model
from torch import nn
from transformers.models.llama import modeling_llama

from addlang.errors import AddlangError, AddlangWarning
from addlang.liger import apply_liger
from addlang.models import load_model

IDS = torch.tensor([[7, 8, 9, 10]])


class FusedMLP(nn.Module):
    """What liger-kernel puts in the place of the architecture's class: it has no biases."""


@pytest.fixture
def rotated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A liger-kernel that replaces what the real one replaces in transformers' module; the calls of its rotation."""
    calls: list[Any] = []
    plain = modeling_llama.apply_rotary_pos_emb

    def rotate(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
        calls.append(q.shape)  # with one default more than the function that it replaces, as liger-kernel's
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    def patch(**_: Any) -> None:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
        monkeypatch.setattr(modeling_llama, "LlamaMLP", FusedMLP)

    names = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    liger = SimpleNamespace(monkey_patch=names, _apply_liger_kernel_to_instance=patch)
    monkeypatch.setattr("addlang.liger.import_liger", lambda: liger)
    return calls


def test_only_the_model_that_liger_is_applied_to_runs_on_its_kernels(rotated: list[Any]) -> None:
    plain, mlp = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP
    older, model = make_model("llama"), make_model("llama")
    with torch.no_grad():
        expected = model(IDS).logits
        apply_liger(model)
        assert torch.equal(model(IDS).logits, expected)
    layers = model.config.num_hidden_layers
    assert len(rotated) == layers
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP) == (plain, mlp)
    later = make_model("llama")
    assert isinstance(later.model.layers[0].mlp, mlp)
    for other in (older, later):
        other(IDS)
    assert len(rotated) == layers
    copy.deepcopy(model)(IDS)
    assert len(rotated) == 2 * layers


def test_recomputation_runs_on_the_kernels_too(rotated: list[Any]) -> None:
    model = make_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    apply_liger(model)
    model(IDS, use_cache=False).logits.sum().backward()
    assert len(rotated) == 2 * model.config.num_hidden_layers


def test_a_compiled_layer_runs_on_the_kernels_too(rotated: list[Any]) -> None:
    model = make_model("llama")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        apply_liger(model)
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        assert torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-6)
    assert len(rotated) == model.config.num_hidden_layers


def test_a_kernel_that_no_layer_can_be_given_is_left_out_with_a_warning(
    rotated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self, *a, **kw: forward(self, *a, **kw))
    model = make_model("llama")
    with pytest.warns(AddlangWarning, match="LlamaForCausalLM does not use liger-kernel's apply_rotary_pos_emb"):
        apply_liger(model)
    model(IDS)
    assert rotated == []


def test_liger_gets_the_norms_of_queries_and_keys_that_it_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[Any] = []
    patch = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"olmo2": None, "llama": None},
        _patch_rms_norm_module=lambda norm, in_place: fused.append((norm, in_place)),
    )
    liger = SimpleNamespace(monkey_patch=patch, _apply_liger_kernel_to_instance=lambda **_: None)
    monkeypatch.setattr("addlang.liger.import_liger", lambda: liger)
    model = make_model("olmo2")
    apply_liger(model)
    attention = [layer.self_attn for layer in model.model.layers]
    assert fused == [(norm, False) for a in attention for norm in (a.q_norm, a.k_norm)]
    fused.clear()
    apply_liger(make_model("llama"))
    assert fused == []


def test_liger_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(AddlangError, match="use_liger_kernel: liger-kernel cannot be used"):
        apply_liger(make_model("llama"))


def test_a_model_on_the_kernels_is_gone_when_the_next_one_is_loaded_for_a_gpu(
    rotated: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bound methods make it a cycle, whose memory a GPU would keep."""
    model = make_model("llama")
    apply_liger(model)
    gone = weakref.ref(model.model.layers[0].self_attn)
    source = save_model(tmp_path / "source")
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # there is no GPU
    gc.disable()
    try:
        del model
        load_model(source)
        assert gone() is not None
        load_model(source, device="cuda")
        assert gone() is None
    finally:
        gc.enable()
