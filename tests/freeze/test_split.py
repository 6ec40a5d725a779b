"""Contract 3: the split execution equals the masked one, step for step, on every supported architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from addlang.errors import AddlangError
from addlang.freeze import split_linear
from addlang.freeze.execution import attach_plan
from addlang.freeze.overlay import Overlay
from addlang.freeze.plan import FreezePlan, Frozen
from addlang.freeze.split import SplitAttached, why_not_split
from addlang.freeze.split_linear import SplitLinear
from addlang.strategies.base import Attached

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1, "attn_implementation": "eager",
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-gqa": ("Mistral", {"num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8}),
}
FORMS = ("assemble", "resident")


def make(case: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model. transformers' norms compute in fp32 whatever the type; here they use the model's own."""
    family, extra = CASES[case]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))(**{**TINY, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model.to(dtype).train()


def make_plan(model: Any, kind: str = "columns", seed: int = 0) -> FreezePlan:
    """Half of every matrix's columns (or rows), half of every vector, three tokens' rows; one whole matrix each way."""
    g = torch.Generator().manual_seed(seed)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    entries = {}
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        if id(p) in outside:
            entries[name] = Frozen(shape, "rows", torch.tensor([0, 1, 2]))
        elif name.endswith("0.self_attn.o_proj.weight"):
            entries[name] = Frozen(shape, "all")
        elif name.endswith("1.self_attn.o_proj.weight"):
            entries[name] = Frozen(shape, "none")
        elif p.dim() == 1 and "input" in name:
            entries[name] = Frozen(shape, "elements", torch.rand(shape, generator=g) < 0.5)
        else:
            size = shape[0] if kind == "rows" else shape[-1]
            chosen = torch.randperm(size, generator=g)[: size // 2].sort().values
            entries[name] = Frozen(shape, kind if p.dim() == 2 else "columns", chosen)  # type: ignore[arg-type]
    return FreezePlan(entries)


def batches(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(3, 61, (2, 9), generator=g) for _ in range(count)]


def train(
    attached: Attached,
    steps: int = 10,
    accumulation: int = 2,
    autocast: bool = False,
    clip: bool = True,
    fused: bool = False,
) -> tuple[list[float], torch.optim.Optimizer]:
    """AdamW with decay and clipping, in the order of the training loop.

    Args:
        fused: the loop's own optimizer, which leaves ``_version`` of the weights alone; it rounds parts of a tensor
            differently, so that pieces and whole tensors are equal in float64 only.
    """
    optimizer = torch.optim.AdamW(attached.param_groups(0.1), lr=1e-2, fused=fused)
    data = batches(steps * accumulation)
    losses = []
    for step in range(steps):
        total = 0.0
        for ids in data[step * accumulation : (step + 1) * accumulation]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = attached.model(input_ids=ids, use_cache=False).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / accumulation
            loss.backward()
            total += loss.item()
        attached.before_clip(step)
        if clip:
            torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step(step)
        losses.append(total)
    return losses, optimizer


def dense(model: Any, attached: Attached) -> dict[str, Tensor]:
    found = {n: p.detach() for n, p in model.named_parameters()}
    found.update(attached.export())
    return {n: t for n, t in found.items() if n in attached.plan.entries}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in a)


def assert_frozen_intact(plan: FreezePlan, source: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    for name in plan:
        mask = plan[name].mask()
        assert torch.equal(source[name][mask], now[name].to(source[name].dtype)[mask]), name


def make_exact(patch: pytest.MonkeyPatch) -> None:
    """Norms, rotary angles and the softmax of transformers are hard-wired to fp32; let them follow the model's type."""
    to, floats, softmax = Tensor.to, Tensor.float, nn.functional.softmax

    def keep_double(self: Tensor, *args: Any, **kw: Any) -> Tensor:
        wanted = kw.get("dtype", args[0] if args else None)
        return self if self.dtype == torch.float64 and wanted == torch.float32 else to(self, *args, **kw)

    def keep_softmax(x: Tensor, *args: Any, **kw: Any) -> Tensor:
        if x.dtype == torch.float64:
            kw["dtype"] = torch.float64
        return softmax(x, *args, **kw)

    patch.setattr(Tensor, "to", keep_double)
    patch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else floats(self))
    patch.setattr(nn.functional, "softmax", keep_softmax)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    make_exact(monkeypatch)


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("exact_norms")
def test_equals_masked_in_float64(case: str, form: str, kind: str) -> None:
    model = make(case, torch.float64)
    source = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(model, kind)
    twin = copy.deepcopy(model)
    masked = attach_plan(twin, plan, "masked")
    split = attach_plan(model, plan, f"split_{form}")
    expected, _ = train(masked, fused=True)
    found, _ = train(split, fused=True)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)) <= 1e-12
    assert worst(dense(model, split), dense(twin, masked)) <= 1e-12
    assert_frozen_intact(plan, source, dense(model, split))
    moved = dense(model, split)
    for name in plan:  # contract 2: everything planned trainable can move
        free = ~plan[name].mask()
        assert not free.any() or (source[name] != moved[name])[free].float().mean() > 0.9, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_masked_in_float32(case: str, form: str) -> None:
    model = make(case)
    plan = make_plan(model)
    twin = copy.deepcopy(model)
    masked, split = attach_plan(twin, plan, "masked"), attach_plan(model, plan, f"split_{form}")
    expected, _ = train(masked)
    found, _ = train(split)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)) <= 1e-6
    assert worst(dense(model, split), dense(twin, masked)) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_bit_identical_to_masked_in_bf16(case: str, form: str, checkpointing: bool) -> None:
    """One product each for y and dx makes bf16 autocast with fp32 masters equal to the last bit, over 10 steps.

    Without clipping: the norm of all gradients is a sum over tensors of other shapes, equal only to fp32 rounding.
    """
    model = make(case, torch.bfloat16)
    source = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(model)
    twin = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        twin.gradient_checkpointing_enable({"use_reentrant": False})
    masked, split = attach_plan(twin, plan, "masked"), attach_plan(model, plan, f"split_{form}")
    assert all(p.dtype == torch.float32 for _, p in split.named_trainable())
    expected, _ = train(masked, autocast=True, clip=False)
    found, _ = train(split, autocast=True, clip=False)
    assert found == expected
    assert worst(dense(model, split), dense(twin, masked)) == 0.0
    assert_frozen_intact(plan, source, dense(model, split))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_with_clipping(form: str) -> None:
    model = make("llama-bias", torch.bfloat16)
    plan = make_plan(model)
    twin = copy.deepcopy(model)
    masked, split = attach_plan(twin, plan, "masked"), attach_plan(model, plan, f"split_{form}")
    expected, _ = train(masked, autocast=True)
    found, _ = train(split, autocast=True)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)) <= 2e-3


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_nothing(form: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = make("qwen2")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attached = attach_plan(model, make_plan(model), f"split_{form}")
        losses, _ = train(attached, steps=3)
        results.append((losses, dense(model, attached)))
    assert results[0][0] == results[1][0]
    assert worst(results[0][1], results[1][1]) == 0.0


def test_checkpoint_recomputation_keeps_the_dense_weight_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    import addlang.freeze.split_linear as module

    built = []
    assemble = module.assemble
    monkeypatch.setattr(module, "assemble", lambda *a: built.append(1) or assemble(*a))
    counts = {}
    for checkpointing in (False, True):
        model = make("llama-bias")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attach_plan(model, make_plan(model), "split_assemble")
        built.clear()
        model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
        counts[checkpointing] = len(built) / sum(isinstance(m, SplitLinear) for m in model.modules())
    assert counts == {False: 2.0, True: 2.0}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_in_inference_mode_does_not_spoil_training(
    form: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for inference in (False, True):
        monkeypatch.setattr(split_linear, "_spare", {})
        model = make("qwen2")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attached = attach_plan(model, make_plan(model), f"split_{form}")
        if inference:
            with torch.inference_mode():
                model(input_ids=batches(1)[0])
        losses.append(train(attached, steps=2)[0])
    assert losses[0] == losses[1]


def test_batches_of_many_lengths_hold_no_more_memory_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama-bias")
    attach_plan(model, make_plan(model), "split_assemble")

    def held(*lengths: int) -> list[tuple[int, ...]]:
        monkeypatch.setattr(split_linear, "_spare", {})
        for length in lengths:
            ids = torch.arange(3, 3 + length).view(1, -1)
            model(input_ids=ids, labels=ids).loss.backward()
        return sorted(tuple(t.shape) for tensors in split_linear._spare.values() for t in tensors)

    assert any(shape[0] == 20 for shape in held(20)), "the trained columns of 20 tokens"
    assert held(9, 15, 20) == held(20)


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_arithmetic_of_a_step(form: str, kind: str) -> None:
    """Against masked, only the products of the frozen part's dW are missing, with checkpointing as well as without."""
    from torch.utils.flop_counter import FlopCounterMode

    for checkpointing in (False, True):
        flops = {}
        for execution in ("masked", f"split_{form}"):
            model = make("llama-bias")
            plan = make_plan(model, kind)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            attach_plan(model, plan, execution)
            ids = batches(1)[0]
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids, labels=ids).loss.backward()
            flops[execution] = counter.get_total_flops()
        frozen = sum(plan[n].frozen_count for n in plan if "_proj.weight" in n and plan[n].kind != "all")
        assert flops["masked"] - flops[f"split_{form}"] == 2 * ids.numel() * frozen


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_dense_shape_has_a_gradient_or_state(form: str) -> None:
    model = make("llama-bias")
    plan = make_plan(model)
    attached = attach_plan(model, plan, f"split_{form}")
    _, optimizer = train(attached, steps=1)
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    trained = {id(p) for _, p in attached.named_trainable()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name
        assert p.requires_grad == (id(p) in trained), name
    for name, p in attached.named_trainable():
        if "proj.weight" in name and "1.self_attn.o_proj" not in name:
            assert p.numel() == plan[name].numel - plan[name].frozen_count
            assert optimizer.state[p]["exp_avg"].shape == p.shape
    assert {n for n, _ in attached.named_trainable()} == {n for n in plan if plan[n].kind != "all"}
    assert [n for n, _ in attached.named_trainable()] == [n for n in plan if plan[n].kind != "all"]


@pytest.mark.parametrize("form", FORMS)
def test_state_round_trip_continues_bit_for_bit(form: str) -> None:
    model = make("qwen3-tied")
    plan = make_plan(model)
    twin = copy.deepcopy(model)
    first = attach_plan(model, plan, f"split_{form}")
    _, optimizer = train(first, steps=2)
    state = {n: t.clone() for n, t in first.state_dict().items()}
    second = attach_plan(twin, plan, f"split_{form}")
    if form == "resident":
        twin(input_ids=batches(1)[0])  # resident weights exist before the state is loaded
    second.load_state_dict(state)
    assert worst(dense(twin, second), dense(model, first)) == 0.0
    ids = batches(1)[0]
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert optimizer.state
    with pytest.raises(AddlangError, match="does not fit"):
        second.load_state_dict({})


def test_forms_and_masters() -> None:
    model = make("llama-bias", torch.bfloat16)
    attached = SplitAttached(model, make_plan(model), form="auto", masters=False)
    assert attached.form in FORMS
    assert all(p.dtype == torch.bfloat16 for _, p in attached.named_trainable())
    model = make("llama-bias", torch.bfloat16)
    SplitAttached(model, make_plan(model), form="resident")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_frozen.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(batches(1)[0])
    assert layer.weight_frozen is None  # the resident weight holds the same bits
    assert layer.weight_dense.dtype == torch.bfloat16


def test_dense_weights_context_equals_and_leaves_no_trace() -> None:
    model = make("gemma2").eval()
    attached = attach_plan(model, make_plan(model), "split_assemble")
    assert isinstance(attached, SplitAttached)
    ids = batches(1)[0]
    before = model(ids).logits
    with attached.dense_weights(), torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        assert model.model.layers[0].mlp.up_proj.weight_dense is not None
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_dense is None
    assert layer.weight_frozen is not None
    assert layer.form == "assemble"


def test_detach_gives_plain_modules_back() -> None:
    for form in FORMS:
        model = make("llama-bias")
        kinds = {n: type(m) for n, m in model.named_modules()}
        attached = attach_plan(model, make_plan(model), f"split_{form}")
        assert isinstance(attached, SplitAttached)
        train(attached, steps=2)
        ids = batches(1)[0]
        before, tensors = model(ids).logits, dense(model, attached)
        attached.detach()
        assert {n: type(m) for n, m in model.named_modules()} == kinds
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)
        assert worst({n: p.detach() for n, p in model.named_parameters()}, tensors) == 0.0


def test_weight_is_readable_and_differentiable() -> None:
    model = make("llama-bias")
    source = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    attach_plan(model, make_plan(model), "split_assemble")
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, source)
    layer.weight.square().sum().backward()
    assert torch.equal(layer.weight_trainable.grad, 2 * layer.weight_trainable.detach())


def test_a_shared_input_is_cast_once() -> None:
    model = make("llama-bias")
    attach_plan(model, make_plan(model), "split_assemble")
    seen = []

    def pack(t: Tensor) -> Tensor:
        if t.dtype == torch.bfloat16 and t.shape == (2, 9, 32):
            seen.append(t.data_ptr())
        return t

    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 9, 32, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer(x)
        x.data.add_(0)
        assert len(set(seen)) == 1
        with torch.no_grad():
            x.add_(1.0)  # written to: the copy is stale
        attention.q_proj(x)
    assert len(set(seen)) == 2


def test_refusals_name_parameter_and_reason() -> None:
    model = make("llama-bias")
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(model.get_parameter(name).shape)
    base = make_plan(model)

    def reason(**changes: Frozen) -> str:
        plan = FreezePlan({**base.entries, **{k.replace("__", "."): v for k, v in changes.items()}})
        return why_not_split(model, plan) or ""

    assert reason() == ""
    elements = Frozen(shape, "elements", torch.rand(shape) < 0.5)
    plan = FreezePlan({**base.entries, name: elements})
    assert name in str(why_not_split(model, plan))
    assert "element by element" in str(why_not_split(model, plan))
    with pytest.raises(AddlangError, match="element by element"):
        SplitAttached(model, plan)
    for outside in ("model.embed_tokens.weight", "lm_head.weight"):
        plan = FreezePlan({**base.entries, outside: Frozen((61, 32), "columns", torch.tensor([1]))})
        assert "never split" in str(why_not_split(model, plan))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    entries = {n: e for n, e in base.entries.items() if n != "model.layers.1.mlp.up_proj.weight"}
    assert "tied to another layer" in str(why_not_split(model, FreezePlan(entries)))


def test_empty_and_full_indices_are_no_partial_freeze() -> None:
    model = make("llama-bias")
    entries = dict(make_plan(model).entries)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    entries[up] = Frozen((48, 32), "columns", torch.arange(0))
    entries[down] = Frozen((32, 48), "columns", torch.arange(48))
    attached = attach_plan(model, FreezePlan(entries), "split")
    assert not isinstance(model.get_submodule(up.removesuffix(".weight")), SplitLinear)
    assert not model.get_parameter(down).requires_grad
    assert down not in dict(attached.named_trainable())


def test_overlay_is_exact_without_any_hook() -> None:
    """Decay moves covered elements of the stored parameter; what is used and what is saved never does."""
    model = make("qwen3-tied")
    source = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(model)
    attach_plan(model, plan, "split_assemble")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for ids in batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Overlay)
    assert torch.equal(embedding.weight[:3], source["model.embed_tokens.weight"][:3])
    assert torch.equal(model.lm_head.weight[:3], source["model.embed_tokens.weight"][:3])
    state = model.state_dict()
    assert_frozen_intact(plan, source, {n: state[n] for n in plan})
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_backward_inside_autocast() -> None:
    model = make("llama-bias")
    attach_plan(model, make_plan(model), "split_assemble")
    ids = batches(1)[0]
    loss = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    name = "model.layers.0.mlp.up_proj.weight_trainable"
    found = model.get_parameter(name).grad.clone()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(found, model.get_parameter(name).grad, rtol=0.05, atol=1e-4)


def test_types_that_do_not_fit_are_refused() -> None:
    model = make("llama-bias", torch.bfloat16)
    attach_plan(model, make_plan(model), "split")
    with pytest.raises(AddlangError, match=r"torch\.autocast"):
        model.model.layers[0].mlp.up_proj(torch.randn(2, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", ["olmo2", "llama-bias"])
def test_a_checkpoint_keeps_no_copy_of_a_block_s_input(case: str) -> None:
    """OLMo 2 has no norm before attention: q, k and v read the very tensor that the checkpoint keeps."""
    model = make(case, torch.bfloat16)
    SplitAttached(model, make_plan(model), form="assemble")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batches(1)[0], use_cache=False).logits.float().sum()
    kept = [x for x in inputs if hasattr(x, "_addlang_cast")]
    loss.backward()
    assert len(inputs) >= len(model.model.layers)
    assert inputs[0].dtype == torch.float32  # it would have to be cast
    assert not kept
