"""What every strategy must do, on every architecture: contracts 1 to 6 and 9; 8 is in tests/train.

A strategy that is ``dynamic`` is not a hard freeze: its plan freezes nothing but what the options of every strategy
freeze, and what stands still at one step may move at the next. All other contracts hold for it too.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, calibration, make_model, make_tokenizer, save_model

from addlang.errors import AddlangError
from addlang.export import export
from addlang.freeze.plan import FreezePlan
from addlang.freeze.proof import bits, prove
from addlang.freeze.split import why_not_split
from addlang.models import Checkpoint, embedding_names, load_model
from addlang.strategies import PlanInputs, available, load_strategy, make_strategy

STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "self_anchor": [{}],
    "ssu": [
        {},
        {"granularity": "row"},
        {"granularity": "element"},
        {"scorer": "magnitude", "ratio": 0.875},
        {"scorer": "random"},
        {"scorer": "sparsegpt"},
        {"scorer": "fisher"},
        {"reference_code": True},
        {"share_columns": True},
        {"freeze_special_tokens": True},
        {"train_embeddings": False, "train_lm_head": False},
    ],
    "hft": [{}, {"ratio": 0.25}, {"ratio": 0.375, "rounding": "spread"}],
    "layers": [{"freeze": "0"}, {"train": [-1]}, {"freeze": "mlp|norm"}],
    "s2ft": [{}, {"d_ratio": 0.11, "o_ratio": 0.25}, {"freeze_special_tokens": True}],
    "lf_h1": [{}],
    "lota": [{"warmup_steps": 2}, {"warmup_steps": 2, "sparsity": 0.5, "include_norms": True}],
    "lf_h2": [{"reference_model": "@reference", **o} for o in ({}, {"unit": "head"}, {"unit": "layer"})],
    "lora": [
        {"rank": 4},
        {"rank": 4, "freeze_special_tokens": True},
        {"rank": 2, "target_modules": ["q_proj", "up_proj"]},
    ],
    "dora": [{"rank": 4}],
    "adalora": [{}, {"initial_rank": 8, "target_rank": 6, "orthogonal": 0}, {"reference_code": True}],
    "gmt": [{}, {"ratio": 0.875, "include_embeddings": True}, {"freeze_special_tokens": True}],
    "lisa": [{"active_layers": 1, "interval": 1}, {"active_layers": 2}, {"freeze_special_tokens": True}],
    "spectrum": [{}, {"mode": "train_top"}],
}
ADAPTERS = ("lora", "dora", "adalora")
CASES = [(n, o) for n, many in STRATEGIES.items() for o in many]
IDS = [f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def reference(architecture: str) -> str:
    """A model of that architecture with other weights: what a phase has started from."""
    directory = Path(tempfile.mkdtemp()) / architecture
    return str(save_model(directory, architecture, "float32", seed=1))


def make(name: str, options: dict[str, Any] | None = None, architecture: str = "llama") -> Any:
    """The strategy, with a reference model that fits the architecture where one is asked for."""
    given = STRATEGIES[name][0] if options is None else options
    return make_strategy(name, {k: reference(architecture) if v == "@reference" else v for k, v in given.items()})


def inputs(seed: int = 0, model_hash: str = "") -> PlanInputs:
    return PlanInputs(
        seed=seed, model_hash=model_hash, special_token_ids=(0, 1, 2), calibration=calibration, target=target_batches
    )


def target_batches() -> Any:
    """Two optimizer steps' worth of target text."""
    for step in (1, 2):
        ids = torch.randint(6, 260, (2, 24), generator=torch.Generator().manual_seed(step))
        yield [{"input_ids": ids, "labels": ids, "position_ids": torch.arange(24).expand(2, -1)}]


def adamw_steps(attached: Any, steps: int = 4) -> None:
    """Momentum, decoupled decay and clipping, in the loop's order; every token of the vocabulary occurs."""
    torch.manual_seed(0)  # adapters drop inputs at random, and AdaLoRA may then cut a matrix to no rank at all
    optimizer = torch.optim.AdamW(attached.param_groups(0.1), lr=1e-2, fused=True)
    attached.bind(optimizer, steps)
    vocabulary = attached.model.config.vocab_size
    for step in range(1, steps + 1):
        ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(step)).view(1, -1)[:, :250]
        rest = torch.arange(vocabulary).view(1, -1)[:, -250:]
        for batch in (ids, rest):
            attached.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        term = attached.loss_term()
        if term is not None:
            term.backward()
        attached.before_clip(step)
        torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 1.0)
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()


def execution(name: str) -> str:
    """Adapters have no execution to choose; all others run with the one that defines the semantics."""
    return "auto" if name in ADAPTERS else "masked"


def test_every_strategy_stands_in_this_contract() -> None:
    assert set(STRATEGIES) == set(available())


@pytest.mark.parametrize("name", available())
def test_every_strategy_names_its_paper_and_what_it_does(name: str) -> None:
    strategy = load_strategy(name)
    assert strategy.name == name
    assert strategy.paper
    assert strategy.summary


@architectures
@cases
def test_frozen_is_bit_identical_and_trainable_can_move(architecture: str, name: str, options: dict[str, Any]) -> None:
    model = make_model(architecture)
    strategy = make(name, options, architecture)
    plan = strategy.plan(model, inputs())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attached = strategy.attach(model, plan, execution(name))
    adamw_steps(attached)
    after = dict(attached.export())
    for parameter, old in before.items():
        entry = plan[parameter]
        new = after.get(parameter, old)
        moved = bits(new) != bits(old)
        assert not bool((moved & entry.mask()).any()), f"{parameter}: frozen elements moved"
        free = ~entry.mask()
        if bool(free.any()):
            assert bool(moved[free].any()), f"{parameter}: nothing trainable moved"


@cases
def test_split_equals_masked_or_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    strategy = make(name, options, "qwen2")
    if name in ADAPTERS:
        for how in ("masked", "split"):
            with pytest.raises(AddlangError, match=f"strategy '{name}' trains adapters.*no execution to choose"):
                strategy.attach(make_model("qwen2"), strategy.plan(make_model("qwen2"), inputs()), how)
        return
    results = []
    for how in ("masked", "split"):
        model = make_model("qwen2").double()
        plan = strategy.plan(model, inputs())
        if why_not_split(model, plan):
            with pytest.raises(AddlangError, match="split execution cannot run this plan: '"):
                strategy.attach(model, plan, "split")
            return
        attached = strategy.attach(model, plan, how)
        adamw_steps(attached, 3)
        results.append(dict(attached.export()))
    for parameter, a in results[0].items():
        b = results[1].get(parameter)
        assert b is not None, parameter
        assert float((a - b).norm() / a.norm()) <= 1e-12, parameter


@pytest.mark.parametrize("name", available())
def test_a_dynamic_strategy_freezes_nothing_for_good(name: str) -> None:
    model = make_model("llama")
    plan = make(name).plan(model, inputs())
    if load_strategy(name).dynamic:
        assert all(entry.kind == "none" for entry in plan.entries.values())


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("architecture", ["olmo2", "qwen3"])
def test_the_export_of_every_strategy_is_an_ordinary_checkpoint(name: str, architecture: str, tmp_path: Path) -> None:
    source = Checkpoint(save_model(tmp_path / "source", architecture))
    model = load_model(source.directory, dtype=torch.float32)
    strategy = make(name, None, architecture)
    plan = strategy.plan(model, inputs(model_hash=source.hash))
    attached = strategy.attach(model, plan, execution(name))
    adamw_steps(attached, 3)
    trained = {n: t.clone() for n, t in attached.export()}
    export(source, attached, plan, tmp_path / "out")
    adapted = Checkpoint(tmp_path / "out")
    assert adapted.header == source.header
    assert prove(source, adapted, plan)["ok"]
    assert prove(source, adapted, plan)["trainable_moved"] > 0
    want = load_model(source.directory, dtype=torch.float32)
    with torch.no_grad():
        for n, p in want.named_parameters():
            if n in trained:
                p.copy_(trained[n].to(torch.bfloat16))
    ids = torch.arange(5, 60).view(1, -1)
    assert torch.equal(load_model(adapted.directory, dtype=torch.float32)(ids).logits, want(ids).logits)


class Killed(BaseException):
    pass


class Data:
    """Random sequences; ``kill_at`` raises when that step's batch is asked for."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at

    def batch(self, first: int, count: int) -> dict[str, Any]:
        import numpy as np

        if self.kill_at is not None and first == self.kill_at * count:
            raise Killed
        ids = np.stack([np.random.default_rng(k).integers(6, 260, 24) for k in range(first, first + count)])
        return {"input_ids": ids, "labels": ids, "position_ids": np.broadcast_to(np.arange(24), ids.shape).copy()}

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        return [{"sequence": k} for k in range(first, first + count)]


@pytest.mark.parametrize("name", available())
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    from addlang.recipe import Phase
    from addlang.train.loop import Schedule, train

    phase = Phase(
        datasets=[{"path": "x"}], strategy="full", sequence_length=24, learning_rate=1e-2, weight_decay=0.1,
        save_steps=3, warmup_steps=1,
    )  # fmt: skip

    def run(directory: Path, data: Data) -> dict[str, torch.Tensor]:
        directory.mkdir(exist_ok=True)
        model = make_model("llama")
        strategy = make(name)
        attached = strategy.attach(model, strategy.plan(model, inputs()), execution(name))
        train(attached, data, phase, directory, device=torch.device("cpu"), schedule=Schedule(7, 2, 1), seed=0)
        return {n: t.clone() for n, t in attached.export()}

    want = run(tmp_path / "whole", Data())
    with pytest.raises(Killed):
        run(tmp_path / "killed", Data(kill_at=5))
    got = run(tmp_path / "killed", Data())
    assert all(torch.equal(bits(want[n]), bits(got[n])) for n in want)


@cases
def test_the_plan_leaves_the_weights_bit_identical(name: str, options: dict[str, Any]) -> None:
    model = make_model("qwen3")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make(name, options, "qwen3").plan(model, inputs())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@cases
def test_the_plan_is_deterministic_for_a_seed_and_survives_saving(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    strategy = make(name, options)
    a = strategy.plan(make_model("llama"), inputs(3))
    b = strategy.plan(make_model("llama"), inputs(3))
    assert a.equal(b)
    a.save(tmp_path / "plan.safetensors")
    assert FreezePlan.load(tmp_path / "plan.safetensors").equal(a)


def test_another_seed_gives_another_random_plan() -> None:
    strategy = make_strategy("ssu", {"scorer": "random"})
    assert not strategy.plan(make_model("llama"), inputs(1)).equal(strategy.plan(make_model("llama"), inputs(2)))


@architectures
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_export_is_the_trained_model_in_the_sources_layout(architecture: str, dtype: str, tmp_path: Path) -> None:
    source = Checkpoint(save_model(tmp_path / "source", architecture, dtype))
    model = load_model(source.directory, dtype=torch.float32)
    strategy = make_strategy("ssu", {})
    plan = strategy.plan(model, inputs(model_hash=source.hash))
    attached = strategy.attach(model, plan, "masked")
    adamw_steps(attached, 2)
    export(source, attached, plan, tmp_path / "out")
    adapted = Checkpoint(tmp_path / "out")
    assert adapted.header == source.header
    assert {p.name for p in adapted.directory.iterdir()} == {p.name for p in source.directory.iterdir()}
    assert prove(source, adapted, plan)["ok"]
    loaded = load_model(adapted.directory, dtype=torch.float32)
    for p in model.parameters():  # what the checkpoint can hold of the fp32 masters
        p.data = p.data.to(source.dtype).float()
    ids = torch.arange(5, 60).view(1, -1)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@architectures
def test_embedding_and_head_are_treated_alike_in_all_arms(architecture: str) -> None:
    model = make_model(architecture)
    embedding, head, _ = embedding_names(model)
    for options in ({}, {"freeze_special_tokens": True}, {"train_embeddings": False, "train_lm_head": False}):
        plans = [make(n, {**STRATEGIES[n][0], **options}, architecture).plan(model, inputs()) for n in available()]
        for name in {embedding, head}:
            assert len({(p[name].kind, p[name].frozen_count) for p in plans}) == 1


def test_tied_weights_with_contradicting_options_are_refused() -> None:
    with pytest.raises(AddlangError, match="ties its head to its embedding"):
        make_strategy("full", {"train_lm_head": False}).plan(make_model("qwen3"), inputs())


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.5, 0.875, 0.95])
def test_ratio_freezes_the_floor_of_each_tensors_columns(ratio: float) -> None:
    plan = make_strategy("ssu", {"ratio": ratio}).plan(make_model("llama"), inputs())
    entry = plan["model.layers.0.mlp.down_proj.weight"]  # 48 input features
    assert entry.frozen_count == int(48 * ratio) * 32
    assert plan["model.norm.weight"].frozen_count == int(32 * ratio)


def test_unknown_strategy_and_option_name_the_nearest() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'ssu'"):
        make_strategy("sssu", {})
    with pytest.raises(AddlangError, match="Did you mean 'ratio'"):
        make_strategy("ssu", {"ration": 0.5})
    with pytest.raises(AddlangError, match=r"less than or equal to 0\.95"):
        make_strategy("ssu", {"ratio": 1.5})


def test_an_architecture_without_linear_layers_is_refused_by_name() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(AddlangError, match=r"parameter 'transformer\.wpe\.weight'.*not of a linear layer"):
        make_strategy("ssu", {"scorer": "magnitude"}).plan(transformers.GPT2LMHeadModel(config), inputs())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(AddlangError, match="only pickled weights"):
        Checkpoint(tmp_path / "m")


def test_a_torn_weight_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AddlangError, match=r"model\.safetensors is torn"):
        Checkpoint(tmp_path / "m")


def test_the_proof_sees_a_single_flipped_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Checkpoint(save_model(tmp_path / "source"))
    save_model(tmp_path / "other")
    plan = make_strategy("ssu", {}).plan(
        load_model(source.directory, dtype=torch.float32), inputs(model_hash=source.hash)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    index = plan[name].index
    assert index is not None
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    raw = tensors[name].view(torch.int16)
    raw[3, int(index[0])] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    proof = prove(source, Checkpoint(tmp_path / "other"), plan)
    assert not proof["ok"]
    assert proof["frozen_changed"] == 1
    assert [t["name"] for t in proof["tensors"] if t["frozen_changed"]] == [name]


def test_the_tokenizer_is_what_the_model_was_made_with() -> None:
    assert make_model("llama").config.vocab_size == len(make_tokenizer())


@pytest.mark.parametrize("name", available())
def test_every_strategy_has_a_page_that_names_its_options(name: str) -> None:
    from addlang.strategies import Strategy

    page = Path(__file__).parents[2] / "docs" / "methods" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    for heading in ("## What it does", "## When to use it", "## Footguns"):
        assert heading in text
    for option in set(load_strategy(name).model_fields) - set(Strategy.model_fields):
        assert f"`{option}" in text or f"{option}`" in text or name in ("self_anchor", "dora"), option
