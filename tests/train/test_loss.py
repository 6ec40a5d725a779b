"""The chunked loss equals the plain cross-entropy of the model's own logits, in value and in every gradient."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from addlang.errors import AddlangWarning
from addlang.train.loss import linear_cross_entropy, token_loss

TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "olmo2": ("Olmo2", {}),
    "gemma2-softcap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"head_dim": 8}),
    "granite-scaled": ("Granite", {"logits_scaling": 3.0}),
    "cohere-scaled": ("Cohere", {"logit_scale": 0.0625}),
}


def make(case: str, **changes: Any) -> Any:
    family, extra = CASES[case]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**TINY, **extra, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


def make_batch(vocabulary: int = 97, shape: tuple[int, int] = (3, 17)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, shape, generator=g)
    labels = ids.masked_fill(torch.rand(shape, generator=g) < 0.3, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(shape[1]).repeat(shape[0], 1)}


def plain(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    flat, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return nn.functional.cross_entropy(flat, labels, ignore_index=-100, reduction="sum")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The norms of transformers compute in fp32 whatever the model's type, so only the head is exact to 1e-12."""
    for name, g in found.items():
        tolerance = 1e-12 if "lm_head" in name else 1e-5
        error = float((g - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9))
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("chunk", [None, 7, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_cross_entropy(case: str, chunk: int | None) -> None:
    model, batch = make(case), make_batch()
    wanted = plain(model, batch)
    expected = gradients(model, wanted)
    loss, tokens = token_loss(model, batch, chunk_tokens=chunk)
    assert tokens == int((batch["labels"][:, 1:] != -100).sum())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, wanted.double(), rtol=1e-12, atol=0)
    found = gradients(model, loss)
    assert set(found) == set(expected)
    assert_same(found, expected)


def test_frozen_head_gets_no_gradient() -> None:
    model, batch = make("llama"), make_batch()
    model.lm_head.weight.requires_grad_(False)
    expected = gradients(model, plain(model, batch))
    found = gradients(model, token_loss(model, batch, chunk_tokens=5)[0])
    assert model.lm_head.weight.grad is None
    assert_same(found, expected)


def test_checkpointing_and_training_mode() -> None:
    model, batch = make("llama"), make_batch()
    expected = gradients(model, plain(model, batch))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, token_loss(model, batch)[0])
    assert_same(found, expected)


def test_fp32_and_bf16_are_summed_in_fp32() -> None:
    batch = make_batch()
    model = make("llama").float()
    torch.testing.assert_close(token_loss(model, batch)[0], plain(model, batch), rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(model, batch)[0]
        wanted = plain(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    found, expected = gradients(model, loss), gradients(model, wanted)
    for name, g in found.items():
        assert g.dtype == torch.float32
        assert float((g - expected[name]).abs().max()) <= 0.05 * float(expected[name].abs().max()), name
    model = model.bfloat16()
    assert token_loss(model, batch, chunk_tokens=5)[0].dtype == torch.float32
    assert gradients(model, token_loss(model, batch, chunk_tokens=5)[0])["lm_head.weight"].dtype == torch.bfloat16


class LargestProduct(TorchDispatchMode):
    """Elements of the largest 16-bit matrix product."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and out.dtype == torch.bfloat16:
            self.numel = max(self.numel, out.numel())
        return out


def test_16_bit_products_for_the_heads_gradient_are_added_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(40, 8, generator=g).requires_grad_(), torch.randn(60, 8, generator=g).requires_grad_()
    targets = torch.randint(60, (40,), generator=g)

    def gradient(block: int) -> tuple[Tensor, int]:
        monkeypatch.setattr("addlang.train.loss.CHUNK_ELEMENTS", block)
        weight.grad = None
        with LargestProduct() as largest, torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(hidden, weight, None, targets, chunk_tokens=10).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return weight.grad, largest.numel

    whole, product = gradient(1 << 20)
    assert product == 40 * 60 // 4  # a chunk's logits, by far not the head
    blocks, product = gradient(56)
    assert product == 10 * 60
    torch.testing.assert_close(blocks, whole, rtol=1e-2, atol=1e-2)


def test_without_labels_the_loss_is_zero_and_backward_runs() -> None:
    model, batch = make("llama"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, tokens = token_loss(model, batch)
    assert (loss.item(), tokens) == (0.0, 0)
    assert all(not g.any() for g in gradients(model, loss).values())


def test_leaves_the_model_as_it_was() -> None:
    model, batch = make("gemma2-softcap"), make_batch()
    before = model(batch["input_ids"]).logits
    token_loss(model, batch)
    assert "forward" not in model.lm_head.__dict__
    assert "_loss_function" not in model.__dict__
    assert torch.equal(model(batch["input_ids"]).logits, before)
    with torch.no_grad():
        assert not token_loss(model, batch)[0].requires_grad


def test_second_backward_is_refused() -> None:
    model = make("llama")
    loss, _ = token_loss(model, make_batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class OddHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_unknown_head_takes_the_full_path_and_says_so() -> None:
    model, batch = make("llama"), make_batch()
    head = OddHead(32, 97, bias=False).double()
    model.set_output_embeddings(head)
    with pytest.warns(AddlangWarning, match="not a plain linear layer"):
        loss, _ = token_loss(model, batch)
    torch.testing.assert_close(loss, plain(model, batch), rtol=1e-12, atol=0)
    token_loss(model, batch)  # said once


def test_unknown_processing_of_logits_takes_the_full_path() -> None:
    model, batch = make("llama"), make_batch()
    forward = type(model).forward

    def odd(self: Any, *args: Any, **kw: Any) -> Any:
        out = forward(self, *args, **kw)
        out.logits = out.logits.sin()
        return out

    model.__class__ = type("Odd", (type(model),), {"forward": odd})
    with pytest.warns(AddlangWarning, match="in a way that is not known"):
        loss, _ = token_loss(model, batch)
    torch.testing.assert_close(loss, plain(model, batch), rtol=1e-12, atol=0)


def test_peft_with_a_trained_head() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make("llama"), config).double()
    batch = make_batch()
    expected = gradients(model, plain(model, batch))
    found = gradients(model, token_loss(model, batch)[0])
    assert any("lm_head" in n for n in found)
    assert_same(found, expected)


def test_softcap_scale_and_bias_by_hand() -> None:
    h = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(h, w, b, torch.tensor([1]), softcap=2.0, scale=0.5)
    z = 0.5 * 2.0 * torch.tanh(torch.tensor([1.5, 2.0, 2.5], dtype=torch.float64) / 2.0)
    torch.testing.assert_close(loss, z.exp().sum().log() - z[1], rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, (h, b))
    logits = 0.5 * 2.0 * torch.tanh(nn.functional.linear(h, w, b) / 2.0)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([1])), (h, b))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_not_slower_than_the_plain_path_for_a_tiny_model() -> None:
    config = {"vocab_size": 900, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
    model = make("llama", **config).float()
    batch = make_batch(900, (8, 128))
    batch["labels"] = batch["input_ids"]
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(12):
        for name, f in (("plain", plain), ("chunked", lambda m, b: token_loss(m, b)[0])):
            start = time.perf_counter()
            f(model, copy.copy(batch)).backward()
            times[name].append(time.perf_counter() - start)
    assert min(times["chunked"]) <= 1.05 * min(times["plain"]), times
