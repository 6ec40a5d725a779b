"""What only a GPU can show: the contracts there, and the paths that exist for it. ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import make_model
from torch import Tensor

from addlang.errors import AddlangError
from addlang.freeze import gpu
from addlang.freeze.execution import attach_plan
from addlang.freeze.plan import FreezePlan, Frozen
from addlang.liger import apply_liger
from addlang.models import load_model
from addlang.run import execute
from addlang.scoring import gpu as scoring_gpu
from addlang.scoring.activations import InputStatistics, sum_of_squares
from addlang.strategies import available
from addlang.train.loop import Schedule, train
from tinyrun import World, dying_at, metrics, same
from training import Data, make_exact, phase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def half_of_everything(model: Any, kind: str = "columns") -> FreezePlan:
    g = torch.Generator().manual_seed(0)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    entries = {}
    for name, p in model.named_parameters():
        size = p.shape[0] if kind == "rows" else p.shape[-1]
        index = torch.randperm(size, generator=g)[: size // 2].sort().values
        entries[name] = (
            Frozen(tuple(p.shape), "none")
            if id(p) in outside
            else Frozen(tuple(p.shape), kind if p.dim() == 2 else "columns", index)  # type: ignore[arg-type]
        )
    return FreezePlan(entries)


def trained(
    directory: Path, execution: str, dtype: torch.dtype = torch.float32, kind: str = "columns", **settings: Any
) -> tuple[dict[str, Tensor], list[float], FreezePlan, dict[str, Tensor]]:
    """Weights, losses, plan and the source's weights of eight steps of the real loop on the GPU."""
    model = make_model("olmo2").to(CUDA, dtype)
    source = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = half_of_everything(model, kind)
    attached = attach_plan(model, plan, execution, masters=settings.get("master_weights") != "model")
    directory.mkdir(parents=True)
    train(
        attached, Data(), phase(save_steps=100, **settings), directory, device=CUDA, schedule=Schedule(8, 4, 2), seed=0
    )
    losses = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {n: t.clone() for n, t in attached.export()}, losses, plan, source


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in a)


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["split_assemble", "split_resident"])
def test_split_equals_masked_in_fp64(
    form: str, checkpointing: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_exact(monkeypatch)
    monkeypatch.setattr(gpu, "SMALLEST", 0)
    settings: dict[str, Any] = {"precision": "fp32", "activation_checkpointing": checkpointing}
    split, split_losses, *_ = trained(tmp_path / "split", form, torch.float64, kind, **settings)
    masked, masked_losses, *_ = trained(tmp_path / "masked", "masked", torch.float64, kind, **settings)
    assert furthest(split, masked) <= 1e-12
    assert split_losses == pytest.approx(masked_losses, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_kernels_copy_and_round_as_torch_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SMALLEST", 0)
    assert gpu._works(CUDA)
    x = torch.randn(37, 5003, device=CUDA).to(dtype)
    index = torch.randperm(5003, device=CUDA)[:2051]
    assert torch.equal(gpu.take_columns(x, index), x[:, index])
    rows = torch.randperm(90, device=CUDA)[:37]
    for to in {dtype, torch.float32, *([torch.bfloat16] if dtype != torch.float64 else [])}:
        out, expected = (torch.zeros(90, 5003, device=CUDA, dtype=to) for _ in range(2))
        gpu.scatter_rows(x, rows, out)
        assert torch.equal(out, expected.index_copy_(0, rows, x.to(to))), to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_squares_are_summed_as_without_the_kernel(
    padded: bool, normed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_gpu, "SMALLEST", 0)
    assert scoring_gpu._works(CUDA)
    norm = next(m for n, m in make_model("llama").named_modules() if n.endswith("input_layernorm")) if normed else None
    rows = torch.arange(70, device=CUDA) < torch.tensor([[70], [33], [1]], device=CUDA) if padded else None
    for width in (128, 300, 5003):
        statistics = InputStatistics()
        statistics._rows, statistics._weights = rows, None if rows is None else rows.flatten().float()
        expected = torch.zeros(width, dtype=torch.float64, device=CUDA)
        for _ in range(2):  # the second is added to the first
            x = torch.randn(3, 70, width, device=CUDA).to(dtype)
            assert scoring_gpu.usable(x.view(-1, width))
            statistics._count("x", x, norm)
            expected += sum_of_squares(x, rows, norm)
        assert torch.allclose(statistics._tables["x"].sum(0), expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["masked", "split_assemble", "split_resident"])
def test_what_is_frozen_keeps_its_bits_under_bf16_autocast(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SMALLEST", 0)
    after, _, plan, source = trained(tmp_path / "run", form, torch.bfloat16)
    moved = 0
    for name, entry in plan.entries.items():
        if name in after:
            mask = entry.mask().to(CUDA)
            now = after[name].to(source[name].dtype)
            assert torch.equal(now[mask].view(torch.int16), source[name][mask].view(torch.int16)), name
            moved += int((now != source[name])[~mask].sum())
    assert moved > 1000


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bf16_sr"])
def test_low_memory_optimizers_train_and_keep_what_is_frozen(optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    settings: dict[str, Any] = {"optimizer": optimizer}
    if optimizer == "adamw_bf16_sr":
        settings["master_weights"] = "model"
    after, losses, plan, source = trained(tmp_path / "run", "split_assemble", torch.bfloat16, **settings)
    assert losses[-1] < losses[0]
    for name, entry in plan.entries.items():
        if name in after:
            mask = entry.mask().to(CUDA)
            assert torch.equal(after[name].to(torch.bfloat16)[mask], source[name][mask]), name


def test_compiled_layers_give_the_same_losses(tmp_path: Path) -> None:
    _, plain, *_ = trained(tmp_path / "plain", "split_assemble", precision="fp32")
    _, compiled, *_ = trained(tmp_path / "compiled", "split_assemble", precision="fp32", torch_compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)


def recipe(world: World, directory: Path, **changes: Any) -> Any:
    return world.recipe(directory, **{"device": "cuda", **changes})


def test_a_run_proves_itself_and_continues_with_the_same_bits(
    world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import addlang.train.checkpoint

    whole = execute(recipe(world, tmp_path / "whole"))
    assert json.loads((whole / "proof.json").read_text())["ok"]
    save = addlang.train.checkpoint.Writer.save
    with monkeypatch.context() as patch:
        patch.setattr(addlang.train.checkpoint.Writer, "save", dying_at(2, save, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            execute(recipe(world, tmp_path / "killed"))
    killed = execute(recipe(world, tmp_path / "killed"))
    assert same(killed, whole)
    assert metrics(killed) == metrics(whole)


def test_training_twice_gives_the_same_bits_also_with_long_packed_documents(
    world: World, tmp_path: Path, offline: None
) -> None:
    settings = {"sequence_length": 64, "batch_size": 8, "precision": "bf16", "tokens": 4096}
    first, second = (execute(recipe(world, tmp_path / name, **settings)) for name in ("first", "second"))
    assert same(first, second)


@pytest.mark.parametrize("name", sorted(set(available()) - {"self_anchor", "lf_h2"}))
def test_strategies_run_on_a_gpu(name: str, world: World, tmp_path: Path, offline: None) -> None:
    needed = {"lota": {"warmup_steps": 4}, "layers": {"freeze": "0"}}
    strategy = {"name": name, **needed.get(name, {})}
    out = execute(recipe(world, tmp_path / name, strategy=strategy))
    assert json.loads((out / "proof.json").read_text())["ok"]


@pytest.mark.parametrize("guard", ["kl", "l2sp", "ewc"])
def test_guards_run_on_a_gpu(guard: str, world: World, tmp_path: Path, offline: None) -> None:
    out = execute(recipe(world, tmp_path / guard, strategy="ssu", guards=[guard]))
    assert json.loads((out / "proof.json").read_text())["ok"]


def test_liger_kernels_change_the_loss_by_rounding_only(world: World, tmp_path: Path, offline: None) -> None:
    pytest.importorskip("liger_kernel")
    plain = metrics(execute(recipe(world, tmp_path / "plain")))
    fused = metrics(execute(recipe(world, tmp_path / "liger", use_liger_kernel=True)))
    assert [row["loss"] for row in fused] == pytest.approx([row["loss"] for row in plain], rel=2e-2)


def test_liger_kernels_in_compiled_layers_change_the_loss_by_rounding_only(
    world: World, tmp_path: Path, offline: None
) -> None:
    pytest.importorskip("liger_kernel")
    plain = metrics(execute(recipe(world, tmp_path / "plain")))
    fused = metrics(execute(recipe(world, tmp_path / "both", use_liger_kernel=True, torch_compile=True)))
    assert [row["loss"] for row in fused] == pytest.approx([row["loss"] for row in plain], rel=2e-2)


def test_a_model_with_liger_kernels_is_gone_when_the_next_one_is_loaded(
    world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    trained_models: list[weakref.ref[Any]] = []

    def watched(model: Any) -> None:
        apply_liger(model)
        trained_models.append(weakref.ref(model.model.layers[0].self_attn))

    monkeypatch.setattr("addlang.liger.apply_liger", watched)
    execute(recipe(world, tmp_path / "liger", use_liger_kernel=True))
    load_model(Path(world.model), device=CUDA)
    assert [ref() for ref in trained_models] == [None]


def test_liger_fuses_every_norm_of_olmo2() -> None:
    pytest.importorskip("liger_kernel")
    model = make_model("olmo2").to(CUDA).eval()
    ids = torch.randint(6, 260, (2, 16), device=CUDA)
    with torch.no_grad():
        plain = model(ids).logits
        apply_liger(model)
        assert torch.allclose(model(ids).logits, plain, atol=1e-3)
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert {m.forward.__qualname__ for m in norms} == {"LigerRMSNorm.forward"}


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_without_its_package_is_an_error_with_the_fix(
    world: World, tmp_path: Path, offline: None
) -> None:
    with pytest.raises(AddlangError, match="attn_implementation: sdpa"):
        execute(recipe(world, tmp_path / "out", attn_implementation="flash_attention_2", per_device_train_batch_size=1))


def test_packed_documents_do_not_see_each_other(world: World) -> None:
    model = copy.deepcopy(make_model("llama")).to(CUDA, torch.bfloat16)
    ids = torch.randint(6, 260, (1, 48), device=CUDA)
    other = ids.clone()
    other[:, :24] = torch.randint(6, 260, (1, 24), device=CUDA)
    positions = torch.arange(24, device=CUDA).repeat(1, 2)
    with torch.no_grad():
        a, b = (model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 24:] for x in (ids, other))
    assert torch.equal(a, b)


def test_out_of_memory_ends_with_the_estimate_and_settings_that_fit(
    world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import addlang.run
    import addlang.train.loop

    def hungry(*_: Any, **__: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr(addlang.train.loop, "train", hungry)
    with pytest.raises(AddlangError, match=r"memory ran out in phase(.|\n)*GiB per device"):
        execute(recipe(world, tmp_path / "out"))


def test_fsdp_over_nccl_equals_no_sharding(offline: None) -> None:
    """One process: what one GPU can show is that sharded parameters and nccl work, not how they scale."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(environment)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    try:
        results = []
        for sharded in (False, True):
            model = make_model("olmo2").to(CUDA)
            attached = attach_plan(model, half_of_everything(model), "split_assemble")
            if sharded:
                mesh = init_device_mesh("cuda", (1,))
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                assert all(isinstance(p, DTensor) for p in model.parameters())
            optimizer = torch.optim.AdamW(attached.param_groups(0.1), lr=1e-2)
            g = torch.Generator().manual_seed(1)
            for _ in range(5):
                ids = torch.randint(6, 260, (2, 24), generator=g).to(CUDA)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 1.0)
                optimizer.step()
                optimizer.zero_grad()
                attached.after_step(0)
            results.append({n: t.clone() for n, t in attached.export()})
        assert furthest(results[1], results[0]) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()
        for name in environment:
            os.environ.pop(name)


def test_the_command_plans_on_the_gpu(world: World, tmp_path: Path, offline: None) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world.data(tmp_path / "out", device="cuda")))
    done = subprocess.run(
        [sys.executable, "-m", "addlang", "plan", str(file), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"].startswith("cuda")
