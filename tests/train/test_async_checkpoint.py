"""Nothing is lost: background writes, their errors, kills, loss spikes, and memory that runs out."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from addlang.errors import AddlangError
from addlang.train import checkpoint, loop
from addlang.train.memory import explain_out_of_memory
from addlang.train.monitor import SPIKE_FEWEST, SPIKE_WINDOW, SpikeWatch
from training import CPU, Data, Killed, attach, phase, run, weights

TESTS = Path(__file__).parents[1]


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = weights(run(tmp_path / "whole"))
    may_write, write = threading.Event(), checkpoint.save_file
    seen: list[list[str]] = []

    def slow(*args: Any, **kw: Any) -> None:
        assert may_write.wait(60)
        write(*args, **kw)

    def hook(first: int) -> None:
        if first == 5 * 4:  # steps 4 and 5 were made while the checkpoint of step 3 was still to be written
            seen.append(sorted(p.name for p in (tmp_path / "slow").glob("checkpoint-*")))
            may_write.set()
        if first == 5 * 4 + 4:
            raise Killed

    monkeypatch.setattr(checkpoint, "save_file", slow)
    with pytest.raises(Killed):
        run(tmp_path / "slow", data=Data(hook), save_steps=3)
    assert seen == [["checkpoint-3.tmp"]]
    assert [p.name for p in (tmp_path / "slow").glob("checkpoint-*")] != []
    for newer in (tmp_path / "slow").glob("checkpoint-6"):
        newer.rename(tmp_path / "aside")
    got = weights(run(tmp_path / "slow"))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_an_error_of_a_background_write_ends_the_run_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = weights(run(tmp_path / "whole"))
    write, calls = checkpoint.save_file, 0

    def full(*args: Any, **kw: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second file of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **kw)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.setattr(checkpoint, "save_file", write)
    got = weights(run(tmp_path / "full"))
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_a_full_disk_is_told_although_safetensors_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path)
    assert caught.value.errno == errno.ENOSPC


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from addlang.train import checkpoint
from training import Data, attach, run, weights

write = checkpoint.save_file
def slowly(*args, **kw):
    time.sleep(0.02)  # a large part of the time is inside a write
    write(*args, **kw)
checkpoint.save_file = slowly

def step(first):
    print("step", first, flush=True)
    time.sleep(0.02)

attached = run(Path(sys.argv[1]), attach("ssu", execution="split_assemble"), steps=40, data=Data(step), save_steps=2)
torch.save(weights(attached), Path(sys.argv[1], "weights.pt"))
"""


def kill_at_random_points(tmp_path: Path, kills: int) -> None:
    """Start, kill -9 at a random moment after the first step, start again ..., and compare with a run of one piece.

    A run that ends before its moment comes is compared, and the next kills hit a new one.
    """
    command = [sys.executable, "-c", SCRIPT.format(tests=str(TESTS))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, stdout=subprocess.DEVNULL)
    want = torch.load(tmp_path / "whole" / "weights.pt", weights_only=True)
    delays = random.Random(0)
    done, run, fresh = 0, 0, True
    while done < kills or not fresh:
        directory = tmp_path / f"run-{run}"
        process = subprocess.Popen([*command, str(directory)], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        if done < kills:
            time.sleep(delays.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        if process.wait() == -signal.SIGKILL:
            done, fresh = done + 1, False
            continue
        assert process.returncode == 0
        got = torch.load(directory / "weights.pt", weights_only=True)
        assert all(torch.equal(want[n], got[n]) for n in want)
        steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 41))
        assert not list(directory.glob("*.tmp"))
        run, fresh = run + 1, True
    assert done == kills


@pytest.mark.slow
def test_five_kills_at_random_points_change_nothing(tmp_path: Path) -> None:
    kill_at_random_points(tmp_path, 5)


@pytest.mark.hours
def test_twenty_kills_at_random_points_change_nothing(tmp_path: Path) -> None:
    kill_at_random_points(tmp_path, 20)


def test_a_spike_is_many_times_the_median_and_small_losses_make_none() -> None:
    watch = SpikeWatch(5.0)
    assert all(watch.see(1000.0 if i == 3 else 2.0) is None for i in range(SPIKE_FEWEST))  # too early to tell
    assert watch.see(9.9) is None
    assert watch.see(10.1) == 10.0
    assert len(SpikeWatch(5.0, [1.0] * 500).recent) == SPIKE_WINDOW
    low = SpikeWatch(5.0, [0.01] * 50)
    assert low.see(4.0) is None
    assert low.see(5.5) == 5.0
    assert SpikeWatch(None, [1.0] * 50).see(1e9) is None


def test_a_spike_stops_with_the_rows_written_down_also_after_a_resume(tmp_path: Path) -> None:
    def shake(attached: Any) -> Any:
        def hook(first: int) -> None:
            if first == 23 * 4:
                with torch.no_grad():
                    attached.model.lm_head.weight.mul_(1e3)

        return Data(hook)

    def kill(first: int) -> None:
        if first == 21 * 4:
            raise Killed

    settings = {"steps": 30, "save_steps": 10, "learning_rate": 1e-5}
    with pytest.raises(Killed):
        run(tmp_path, attach("full"), data=Data(kill), **settings)
    attached = attach("full")
    with pytest.raises(
        AddlangError, match=r"the loss leapt to .* at step 24 of phase 'adapt'.*raise max_loss_spike|leapt"
    ):
        run(tmp_path, attached, data=shake(attached), **settings)
    assert json.loads((tmp_path / "bad_batch.json").read_text())["step"] == 24
    attached = attach("full")
    run(tmp_path, attached, data=shake(attached), max_loss_spike=None, **settings)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_ends_with_the_estimate_and_settings_that_fit(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    attached = attach()
    monkeypatch.setattr(loop, "token_loss", full)
    about = {"micro": 2, "device": CPU, "stored": torch.bfloat16}
    with (
        pytest.raises(AddlangError, match=r"training needs about .* GiB per device") as caught,
        explain_out_of_memory(attached.model, attached.plan, phase(), **about),
    ):
        run(tmp_path, attached)
    for setting in ("activation_checkpointing: true", "optimizer: adamw_8bit"):
        assert setting in str(caught.value)
    assert str(caught.value.fix).count("GiB") == 3


def test_where_nothing_fits_more_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from addlang.train import memory

    monkeypatch.setattr(memory, "device_memory", lambda _: 1000)
    attached = attach()
    error = memory.out_of_memory(
        attached.model.config, attached.plan, phase(), micro=2, device=CPU, stored=torch.bfloat16
    )
    assert "shard over more devices" in str(error)


def test_other_errors_pass_through() -> None:
    attached = attach()
    with (
        pytest.raises(RuntimeError, match="a bug"),
        explain_out_of_memory(attached.model, attached.plan, phase(), micro=2, device=CPU, stored=torch.bfloat16),
    ):
        raise RuntimeError("a bug")
