"""Contract 7: several processes train what one trains, and a run can go on with another number of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import make_model
from torch import Tensor

from addlang.data.calibration import CalibrationSet
from addlang.errors import AddlangError, PreemptedError
from addlang.freeze.plan import FreezePlan
from addlang.freeze.proof import bits
from addlang.guards import ActiveGuard, make_guard
from addlang.train.loop import label_mass, own_rows
from addlang.train.monitor import Trackers
from addlang.train.shard import ALONE, World, check_sharding, join_world, sharding_of
from training import Data, Killed, attach, make_exact, phase, run, weights

STEPS = 4


class Halt:
    """Ends the run in a step (of 4 sequences, from 1): by an exception, or by SIGTERM to one process."""

    def __init__(self, step: int, rank: int, term: bool) -> None:
        self.step, self.rank, self.term = step, rank, term

    def __call__(self, first: int) -> None:
        if first // 4 + 1 >= self.step:
            if not self.term:
                raise Killed
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)


class Pull(ActiveGuard):
    """A guard that needs a forward pass of its own."""

    def backward(self, attached: Any, step: int) -> float:
        ids = torch.arange(6, 30).view(1, -1) + step
        term = attached.model(input_ids=ids, use_cache=False).logits.square().mean() * 0.1
        term.backward()
        return float(term.detach())


def penalty(name: str) -> ActiveGuard:
    """One of ours, on four conversations."""
    ids = tuple(tuple(range(6 + k, 22 + 3 * k)) for k in range(4))
    about: Any = SimpleNamespace(
        calibration=lambda: CalibrationSet(ids, 2, 0, "drawn", "f"), device=torch.device("cpu"),
        autocast=contextlib.nullcontext, progress=lambda *_: None,
    )  # fmt: skip
    return make_guard(name, {"weight": 10.0}).start(about)


def scenario(directory: Path, world: World, case: dict[str, Any]) -> Any:
    """One sitting of training; ``case`` is plain data."""
    case = dict(case)
    attached = attach(
        case.pop("strategy", "ssu"),
        getattr(torch, case.pop("dtype", "float64")),
        case.pop("architecture", "llama"),
        case.pop("execution", "masked"),
        changes=case.pop("changes", None),
        **case.pop("options", {}),
    )
    halt = case.pop("halt", None)
    data = Data(None if halt is None else Halt(halt, world.rank, case.pop("term", False)))
    guards = [Pull() if name == "pull" else penalty(name) for name in case.pop("guards", ())]
    case.setdefault("micro", 1)
    case.setdefault("steps", STEPS)
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "compile", lambda function, **_: function)  # of torchao's optimizers
    if attached.model.lm_head.weight.dtype == torch.float64:
        make_exact(patch)  # a loss scaled by 3 rounds differently in fp32
    try:
        run(directory, attached, data=data, world=world, guards=guards, **case)
    except (Killed, PreemptedError, SystemExit) as error:
        if halt is None:
            raise
        attached.ended = getattr(error, "exit_code", getattr(error, "code", None))
    finally:
        patch.undo()
    return attached


def worker(rank: int, size: int, store: str, cases: list[tuple[str, dict[str, Any]]], out: str) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    from torch.distributed.tensor import DTensor

    results = []
    with join_world("cpu") as world:
        for name, case in cases:
            attached = scenario(Path(out, name), world, case)
            for parameter, p in attached.model.named_parameters():
                assert isinstance(p, DTensor) == (case.get("sharding", "auto") != "ddp"), parameter
            results.append({"weights": weights(attached), "ended": getattr(attached, "ended", None)})
            dist.barrier()
    if rank == 0:
        torch.save(results, Path(out, "results.pt"))
    Path(out, f"ended-{rank}").write_text(json.dumps([r["ended"] for r in results]))
    dist.destroy_process_group()


def spawn(size: int, folder: Path, cases: list[dict[str, Any]], names: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the cases one after another on ``size`` processes."""
    folder.mkdir(exist_ok=True)
    names = names or [f"case{i}" for i in range(len(cases))]
    with tempfile.TemporaryDirectory() as place:
        args = (size, str(Path(place, "store")), list(zip(names, cases, strict=True)), str(folder))
        torch.multiprocessing.spawn(worker, args, nprocs=size)
    found: list[dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return found


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def frozen_intact(plan: FreezePlan, result: dict[str, Tensor], architecture: str = "llama") -> None:
    source = dict(make_model(architecture).double().named_parameters())
    for name, new in result.items():
        mask = plan[name].mask()
        assert torch.equal(bits(new)[mask], bits(source[name].detach())[mask]), name


def equal_to_one(folder: Path, size: int, cases: list[dict[str, Any]]) -> None:
    found = spawn(size, folder / "many", cases)
    for i, case in enumerate(cases):
        alone = scenario(folder / f"alone{i}", ALONE, {**case, "sharding": "none"})
        expected = weights(alone)
        assert worst(found[i]["weights"], expected) <= 1e-10, case
        frozen_intact(alone.plan, found[i]["weights"], case.get("architecture", "llama"))
        log = [folder / "many" / f"case{i}" / "metrics.jsonl", folder / f"alone{i}" / "metrics.jsonl"]
        rows = [[json.loads(line) for line in f.read_text().splitlines()] for f in log]
        for column in ("loss", "guards") if case.get("guards") else ("loss",):
            assert [r[column] for r in rows[0]] == pytest.approx([r[column] for r in rows[1]], rel=1e-12), column


def test_two_sharded_processes_equal_one(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"execution": "masked", "guards": ["ewc", "l2sp"]}, {"execution": "split", "activation_checkpointing": True},
    ]  # fmt: skip
    equal_to_one(tmp_path, 2, cases)


@pytest.mark.slow
def test_two_sharded_processes_equal_one_for_every_kind_of_plan(tmp_path: Path) -> None:
    equal_to_one(
        tmp_path,
        2,
        [
            {"strategy": "full"},
            {"strategy": "full", "architecture": "qwen3", "activation_checkpointing": True},
            {"execution": "masked", "architecture": "qwen3", "activation_checkpointing": True},
            {"execution": "masked", "options": {"granularity": "row"}},
            {"execution": "masked", "options": {"granularity": "element"}, "architecture": "olmo2"},
            {"execution": "masked", "options": {"freeze_special_tokens": True}},
            {"execution": "split", "options": {"granularity": "row", "freeze_special_tokens": True}},
            {"execution": "split", "architecture": "gemma3"},
            {"execution": "split", "options": {"train_embeddings": False, "train_lm_head": False}},
            {"execution": "split", "guards": ["pull"]},
            {"execution": "split", "embedding_learning_rate": 1e-3, "max_grad_norm": 0.1},
        ],
    )


@pytest.mark.slow
def test_three_uneven_processes_equal_one(tmp_path: Path) -> None:
    """4 sequences over 3 processes: one of them makes a forward pass without labels; 32 rows are 11, 11 and 10."""
    equal_to_one(
        tmp_path,
        3,
        [
            {"strategy": "full"},
            {"execution": "masked", "options": {"granularity": "element"}},
            {"execution": "split", "activation_checkpointing": True},
            {"execution": "split", "batch": 2},
        ],
    )


@pytest.mark.slow
def test_two_replicas_equal_one_process(tmp_path: Path) -> None:
    equal_to_one(
        tmp_path,
        2,
        [
            {"sharding": "ddp", "strategy": "full"},
            {"sharding": "ddp", "execution": "masked", "guards": ["pull"]},
            {"sharding": "ddp", "execution": "split", "activation_checkpointing": True, "guards": ["ewc", "l2sp"]},
            {"sharding": "ddp", "execution": "split_resident"},
            {"sharding": "ddp", "strategy": "gmt"},
        ],
    )


@pytest.mark.slow
def test_two_replicas_train_the_adapters_that_one_process_trains(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    about = {"sharding": "ddp", "execution": "auto", "options": {"dropout": 0.0}}
    equal_to_one(tmp_path, 2, [{**about, "strategy": name} for name in ("lora", "dora", "adalora")])


@pytest.mark.slow
def test_penalties_act_on_shards_as_on_the_whole(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"execution": "split", "guards": ["ewc"]}, {"strategy": "full", "guards": ["ewc", "l2sp"]},
        {"execution": "masked", "guards": ["l2sp"]},
    ]  # fmt: skip
    equal_to_one(tmp_path, 2, cases)
    case = {**cases[1], "dtype": "float32"}  # norms are kept in 16 bits then, and Fisher information
    found = spawn(2, tmp_path / "single", [case])[0]["weights"]
    alone = weights(scenario(tmp_path / "alone", ALONE, {**case, "sharding": "none"}))
    assert worst(found, alone) <= 1e-4
    free = weights(scenario(tmp_path / "free", ALONE, {"strategy": "full", "dtype": "float32", "sharding": "none"}))
    assert worst(free, alone) > 1e-3, "the penalties did something"


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["masked", "split"])
def test_a_sharded_run_is_resumed_bit_for_bit(execution: str, tmp_path: Path) -> None:
    case = {"execution": execution, "dtype": "float32", "save_steps": 2}
    found = spawn(2, tmp_path, [case, {**case, "halt": 4}, case], ["whole", "killed", "killed"])
    assert all(torch.equal(found[0]["weights"][n], found[2]["weights"][n]) for n in found[0]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 3, 1)])
def test_a_run_goes_on_with_another_number_of_processes(sizes: tuple[int, ...], tmp_path: Path) -> None:
    case: dict[str, Any] = {"execution": "masked", "save_steps": 2, "steps": 6}
    for number, size in enumerate(sizes):
        halt = {"halt": 2 * number + 3} if number < 2 else {}
        if size == 1:
            last = weights(scenario(tmp_path / "run", ALONE, {**case, **halt}))
        else:
            last = spawn(size, tmp_path, [{**case, **halt}], ["run"])[0]["weights"]
    assert worst(last, weights(scenario(tmp_path / "whole", ALONE, case))) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_eight_bit_state_is_resumed_exactly_and_by_another_number_of_processes(size: int, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}  # parts of it large enough
    case: dict[str, Any] = {
        "execution": "split",
        "dtype": "float32",
        "save_steps": 2,
        "optimizer": "adamw_8bit",
        "changes": wide,
    }
    found = spawn(size, tmp_path, [case, {**case, "halt": 4}, {**case, "halt": 4}, case], ["whole", "a", "b", "a"])
    want = found[0]["weights"]
    assert all(torch.equal(want[n], found[3]["weights"][n]) for n in want)
    alone = weights(scenario(tmp_path / "b", ALONE, case))
    first = weights(scenario(tmp_path / "first", ALONE, {**case, "steps": 1}))
    apart = sum(float((alone[n] - want[n]).square().sum()) for n in want)
    moved = sum(float((first[n] - want[n]).square().sum()) for n in want)
    assert apart < 0.1**2 * moved  # state is quantised anew in other blocks: close and no more


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(tmp_path: Path) -> None:
    case: dict[str, Any] = {"execution": "split", "dtype": "float32", "save_steps": 100}
    found = spawn(2, tmp_path, [{**case, "halt": 2, "term": True}, case, case], ["run", "run", "whole"])
    ended = [json.loads((tmp_path / f"ended-{rank}").read_text()) for rank in range(2)]
    assert ended == [[75, None, None], [75, None, None]]
    assert all(torch.equal(found[1]["weights"][n], found[2]["weights"][n]) for n in found[1]["weights"])


def test_sharding_must_fit_the_number_of_processes() -> None:
    assert sharding_of(phase(), ALONE) == "none"
    assert sharding_of(phase(), World(1, 2)) == "fsdp"
    assert sharding_of(phase(sharding="ddp"), World(1, 2)) == "ddp"
    with pytest.raises(AddlangError, match="sharding: fsdp on 1 process"):
        sharding_of(phase(sharding="fsdp"), ALONE)
    with pytest.raises(AddlangError, match="sharding: none on 2 process"):
        sharding_of(phase(sharding="none"), World(1, 2))


@pytest.mark.parametrize(
    ("settings", "refused", "message"),
    [
        (
            {"strategy": "lisa"},
            {"ddp", "fsdp"},
            r"lisa puts parameters to sleep(.|\n)*one process, or use strategy: ssu",
        ),
        ({"strategy": "gmt"}, {"fsdp"}, r"gmt chooses within whole tensors(.|\n)*sharding: ddp"),
        ({"strategy": "lora"}, {"fsdp"}, r"adapters are not sharded(.|\n)*sharding: ddp"),
        ({"strategy": "dora"}, {"fsdp"}, r"adapters are not sharded"),
        ({"strategy": "adalora"}, {"fsdp"}, r"adapters are not sharded"),
        ({"execution": "split_resident"}, {"fsdp"}, r"resident split layers cannot be sharded(.|\n)*split_assemble"),
        ({}, set(), ""),
        ({"strategy": {"name": "lota"}, "execution": "masked"}, set(), ""),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name_and_nothing_else(
    settings: dict[str, Any], refused: set[str], message: str
) -> None:
    for sharding, world in (("none", ALONE), ("ddp", World(0, 2)), ("fsdp", World(0, 2))):
        if sharding in refused:
            with pytest.raises(AddlangError, match=message):
                check_sharding(phase(sharding=sharding, **settings), world)
        else:
            assert check_sharding(phase(sharding=sharding, **settings), world) == sharding


def test_closing_trackers_leaves_the_processes_connected(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trackers = Trackers(phase(report_to="tensorboard"), tmp_path)
        trackers.log({"step": 1, "loss": 2.5})
        trackers.close()
        dist.barrier()  # raises without a group
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert b"loss" in next(tmp_path.rglob("events*")).read_bytes(), "and what was logged is on disk"


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(AddlangError, match="DeepSpeed is not supported"), join_world("cpu"):
        pass


def test_parameters_of_zero_3_are_refused() -> None:
    model = make_model("llama")
    plan = FreezePlan.empty(model)
    model.lm_head.weight.ds_id = 7
    with pytest.raises(AddlangError, match="partitioned by DeepSpeed ZeRO-3"):
        plan.validate(model)


@pytest.mark.parametrize(("batch", "size"), [(4, 3), (32, 5), (2, 4), (8, 1)])
def test_rows_of_all_processes_are_the_batch(batch: int, size: int) -> None:
    parts = [World(r, size).rows(batch) for r in range(size)]
    assert [k for first, count in parts for k in range(first, first + count)] == list(range(batch))
    assert max(c for _, c in parts) - min(c for _, c in parts) <= 1


def test_a_process_without_sequences_stays_within_the_step_and_adds_no_label() -> None:
    class Bounded(Data):
        def batch(self, first: int, count: int) -> Any:
            assert 6 <= first <= first + count <= 8, "the step's sequences are 6 and 7, the run's last ones"
            return super().batch(first, count)

    parts = [own_rows(Bounded(), 6, 2, World(rank, 3)) for rank in range(3)]
    assert [len(p["labels"]) for p in parts] == [1, 1, 1], "as many forward passes in every process"
    assert [label_mass(p)[0] > 0 for p in parts] == [True, True, False]
