"""The loop: exact resume, accumulation, order of a step, errors (contracts 1, 5 and 8)."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import calibration, make_model

from addlang.errors import AddlangError, AddlangWarning, PreemptedError
from addlang.freeze.proof import bits
from addlang.strategies import PlanInputs, make_strategy
from addlang.train import checkpoint
from addlang.train.schedule import budget, global_batch, micro_batch
from training import Data, Killed, attach, phase, run, weights


@pytest.mark.parametrize("strategy", ["full", "ssu"])
@pytest.mark.parametrize("at", [2, 3, 4, 7])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(strategy: str, at: int, tmp_path: Path) -> None:
    want = weights(run(tmp_path / "whole", attach(strategy)))

    def kill(first: int) -> None:
        if first == at * 4:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", attach(strategy), data=Data(kill))
    got = weights(run(tmp_path / "killed", attach(strategy)))
    assert all(torch.equal(bits(want[n]), bits(got[n])) for n in want)
    read = lambda d: [  # noqa: E731
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
        for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()
    ]
    assert read("whole") == read("killed")


def test_a_torn_checkpoint_is_skipped_with_a_warning_and_the_older_one_is_used(tmp_path: Path) -> None:
    want = weights(run(tmp_path / "whole"))

    def kill(first: int) -> None:
        if first == 7 * 4:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "torn", data=Data(kill))
    file = tmp_path / "torn" / "checkpoint-6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(AddlangWarning, match=r"checkpoint-6 is torn"):
        got = weights(run(tmp_path / "torn"))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_a_kill_inside_a_checkpoint_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = weights(run(tmp_path / "whole"))
    original = checkpoint.random_state
    calls = 0

    def die() -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second checkpoint has weights and optimizer, but not yet its manifest
            raise Killed
        return original()

    monkeypatch.setattr(checkpoint, "random_state", die)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "random_state", original)
    assert [p.name for p in sorted((tmp_path / "killed").glob("checkpoint-*"))] == ["checkpoint-3"]
    got = weights(run(tmp_path / "killed"))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_sigterm_saves_and_the_next_call_continues(tmp_path: Path) -> None:
    want = weights(run(tmp_path / "whole"))

    def terminate(first: int) -> None:
        if first == 4 * 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="after step 5 of 8") as caught:
        run(tmp_path / "stopped", data=Data(terminate))
    assert caught.value.exit_code == 75
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    got = weights(run(tmp_path / "stopped"))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_only_save_total_limit_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, save_steps=1, save_total_limit=3)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]


@pytest.mark.parametrize("limit", [1, 2])
def test_torn_checkpoints_do_not_take_the_places_of_whole_ones(limit: int, tmp_path: Path) -> None:
    def sitting(killed_after: int) -> None:
        def kill(first: int) -> None:
            if first == killed_after * 4:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path / "torn", data=Data(kill), save_steps=1, save_total_limit=limit)

    want = weights(run(tmp_path / "whole"))
    sitting(6)
    kept = sorted((tmp_path / "torn").glob("checkpoint-*"))
    assert [p.name for p in kept] == ["checkpoint-5", "checkpoint-6"][-limit:]
    for path in kept:
        file = path / "trained.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(AddlangWarning, match=r"checkpoint-\d is torn"):
        sitting(3)
    found = checkpoint.newest(tmp_path / "torn")
    assert found is not None
    assert found.name == "checkpoint-3"
    got = weights(run(tmp_path / "torn", save_steps=1, save_total_limit=limit))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_accumulation_equals_one_large_batch_although_label_counts_differ(tmp_path: Path) -> None:
    a = weights(run(tmp_path / "a", attach(dtype=torch.float64), micro=4))
    b = weights(run(tmp_path / "b", attach(dtype=torch.float64), micro=1))
    for n in a:
        assert torch.allclose(a[n], b[n], rtol=1e-9, atol=1e-12), n


def test_frozen_survives_the_whole_loop_and_clipping_sees_only_what_is_trained(tmp_path: Path) -> None:
    attached = attach()
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    run(tmp_path, attached, max_grad_norm=0.1)
    for name, new in attached.export():
        mask = attached.plan[name].mask()
        assert torch.equal(bits(new)[mask], bits(before[name])[mask])


def test_clipping_at_zero_still_masks(tmp_path: Path) -> None:
    attached = attach()
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    run(tmp_path, attached, max_grad_norm=0.0)
    for name, new in attached.export():
        mask = attached.plan[name].mask()
        assert torch.equal(new[mask], before[name][mask])


def test_a_nan_loss_stops_with_the_rows_written_down(tmp_path: Path) -> None:
    attached = attach("full")

    def poison(first: int) -> None:
        if first == 8:
            with torch.no_grad():
                attached.model.model.norm.weight.fill_(math.nan)

    with pytest.raises(AddlangError, match=r"became NaN or infinite at step 3 of phase 'adapt'"):
        run(tmp_path, attached, data=Data(poison))
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad == {"step": 3, "rows": [{"sequence": k} for k in range(8, 12)]}


def test_trained_weights_get_fp32_masters_and_frozen_ones_stay_16_bit() -> None:
    model = make_model("llama").to(torch.bfloat16)
    s = make_strategy("ssu", {"train_embeddings": False, "train_lm_head": False})
    attached = s.attach(model, s.plan(model, PlanInputs(calibration=lambda: calibration())), "masked")
    for n, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if attached.plan[n].kind == "all" else torch.float32), n


def test_a_small_step_is_kept_by_fp32_masters_and_lost_in_pure_bf16(tmp_path: Path) -> None:
    """The reason for masters: at the paper's learning rate most bf16 weights would round back (methods.md)."""

    def moved(masters: bool) -> float:
        model = make_model("llama").to(torch.bfloat16)
        before = {n: p.detach().clone().float() for n, p in model.named_parameters()}
        s = make_strategy("full", {})
        attached = s.attach(model, s.plan(model, PlanInputs()), "masked", masters=masters)
        run(
            tmp_path / str(masters),
            attached,
            steps=2,
            learning_rate=5e-5,
            master_weights="fp32" if masters else "model",
            warmup_steps=0,
        )
        changed = [(n, (t.float() != before[n])) for n, t in attached.export() if "proj" in n and n.endswith("weight")]
        return float(torch.cat([c.flatten().float() for _, c in changed]).mean())

    assert moved(True) > 0.99
    assert moved(False) < 0.6


def test_the_budget_is_rounded_up_to_the_papers_steps() -> None:
    p = phase(tokens=200_000_000, sequence_length=512)
    batch, note = global_batch(p, budget(p, 10**12))
    assert (batch, note) == (32, None)
    assert math.ceil(p.tokens / (batch * 512)) == 12_208


def test_a_small_budget_shrinks_the_batch_and_says_so() -> None:
    p = phase(tokens=1_000_000, sequence_length=512)
    batch, note = global_batch(p, p.tokens)
    assert batch == 8
    assert note is not None
    assert "instead of the paper's 32" in note


def test_no_budget_means_one_pass_at_most_the_papers() -> None:
    assert budget(phase(), 5000) == 5000
    assert budget(phase(), 10**12) == 200_000_000


def test_contradicting_batch_sizes_are_refused_with_the_remedy() -> None:
    with pytest.raises(AddlangError, match="leave one of the three out"):
        global_batch(phase(batch_size=32, per_device_train_batch_size=4, gradient_accumulation_steps=4), 10**9)
    with pytest.raises(AddlangError, match="not divisible"):
        micro_batch(phase(per_device_train_batch_size=5), 32, "cpu")
    assert micro_batch(phase(sequence_length=512), 32, "cuda") == 32
    assert micro_batch(phase(sequence_length=512), 32, "cpu") == 8
