"""The pool of runs: order, failure, and what a worker finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from addlang import spread
from addlang.errors import AddlangError, PreemptedError
from addlang.rundir import read_state
from addlang.sweep import dealt, run_one, sweep
from addlang.train.checkpoint import newest
from addlang.verify import verify_run
from tinyrun import World


def note_settings(data: dict[str, Any], where: str, base_dir: Path | None) -> str:
    import torch

    path = Path(data["output_dir"])
    path.mkdir(parents=True)
    (path / "seen").write_text(f"{torch.get_num_threads()} {os.environ['ADDLANG_CACHE']} {where}", encoding="utf-8")
    return str(path)


def test_every_run_is_yielded_with_its_key(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    todo = [(name, {"output_dir": str(tmp_path / name)}) for name in names]
    found = dict(sweep(todo, workers=2, threads=1, cache=tmp_path / "cache", where="here", work=note_settings))
    assert found == {name: tmp_path / name for name in names}
    seen = {(path / "seen").read_text(encoding="utf-8") for path in found.values()}
    assert seen == {f"1 {tmp_path / 'cache'} here"}


def test_nothing_to_do(tmp_path: Path) -> None:
    assert list(sweep([], workers=2, threads=1, cache=tmp_path)) == []


def test_the_error_of_a_run_is_raised(tmp_path: Path) -> None:
    todo = [("bad", {"output_dir": str(tmp_path / "out"), "model_name_or_path": "lab", "langage": "ig"})]
    with pytest.raises(AddlangError, match=r"(?s)my grid: .*langage"):
        list(sweep(todo, workers=1, threads=1, cache=tmp_path / "cache", where="my grid"))
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addlang.export import write_json
    from addlang.recipe import Recipe

    data = {
        "model_name_or_path": "lab",
        "language": "ig",
        "output_dir": str(tmp_path / "out"),
        "strategy": "full",
        "datasets": [{"path": "text.jsonl"}],
    }
    fingerprint = Recipe.parse(data).fingerprint
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("addlang.run.execute", lambda recipe, base_dir: tmp_path / "executed")
    for status, expected in (("finished", "out"), ("running", "executed")):
        write_json(tmp_path / "out" / "state.json", {"status": status, "fingerprint": fingerprint, "stages": {}})
        assert run_one(data, "x") == str(tmp_path / expected)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("the text", encoding="utf-8")
    inputs = {"text.jsonl": "of another text"}
    finished = {"status": "finished", "fingerprint": fingerprint, "stages": {}, "inputs": inputs}
    write_json(tmp_path / "out" / "state.json", finished)
    with pytest.raises(AddlangError, match=r"(?s)out' holds a finished run of other files.*: text.jsonl\n.*remove"):
        run_one(data, "x")
    another = {"status": "finished", "fingerprint": "of another recipe", "stages": {}}
    write_json(tmp_path / "out" / "state.json", another)
    assert run_one(data, "x") == str(tmp_path / "executed")


def fail_in_many_ways(data: dict[str, Any], where: str, base_dir: Path | None) -> str:
    import signal
    import time

    from addlang.errors import PreemptedError

    match data["name"]:
        case "out of memory":
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")
        case "cannot be sent":
            raise NeedsTwo("a", "b")
        case "bad input":
            raise AddlangError("bad input")
        case "killed":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        case "beside":
            ended = False

            def end(*_: object) -> None:
                nonlocal ended
                ended = True

            signal.signal(signal.SIGTERM, end)
            deadline = time.monotonic() + 30
            while not ended and time.monotonic() < deadline:
                time.sleep(0.01)
            raise PreemptedError("the state is saved")
    return str(data["name"])


class NeedsTwo(Exception):  # noqa: N818
    """As errors of some libraries: it can be sent to another process, but not be read there."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


def start_light(threads: int, cache: str, gpus: Any = None) -> None:
    """A worker without torch."""


def sweep_by_name(
    names: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int = 1
) -> tuple[list[str], dict[str, str]]:
    """The runs that were finished, and the errors of those that failed."""
    monkeypatch.setattr("addlang.sweep.start_worker", start_light)
    failed: dict[str, str] = {}
    runs = sweep(
        [(name, {"name": name}) for name in names],
        workers=workers,
        threads=1,
        cache=folder,
        on_error=lambda key, error: failed.update({key: str(error)}),
        work=fail_in_many_ways,
    )
    return [key for key, _ in runs], failed


def test_a_run_that_fails_with_any_error_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["first", "out of memory", "cannot be sent", "bad input", "last"]
    finished, failed = sweep_by_name(names, tmp_path, monkeypatch)
    assert finished == ["first", "last"]
    assert failed == {
        "out of memory": "RuntimeError: CUDA out of memory.",
        "cannot be sent": "NeedsTwo: a and b",
        "bad input": "bad input",
    }


def test_a_killed_process_costs_the_runs_in_progress_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, failed = sweep_by_name(["killed", "beside", "third", "fourth"], tmp_path, monkeypatch, workers=2)
    assert sorted(finished) == ["fourth", "third"]
    assert sorted(failed) == ["beside", "killed"]
    assert all("a process was killed while this run was in progress" in error for error in failed.values())
    finished, failed = sweep_by_name(["killed", "last"], tmp_path, monkeypatch)
    assert (finished, list(failed)) == (["last"], ["killed"])


def test_without_on_error_a_killed_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("addlang.sweep.start_worker", start_light)
    todo = [("killed", {"name": "killed"})]
    with pytest.raises(AddlangError, match="a process was killed"):
        list(sweep(todo, workers=1, threads=1, cache=tmp_path, work=fail_in_many_ways))


def wait_forever(data: dict[str, Any], where: str, base_dir: Path | None) -> str:
    import time

    Path(data["output_dir"]).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)
    return ""


def test_workers_end_when_the_sweep_is_killed(tmp_path: Path) -> None:
    import multiprocessing
    import signal
    import time

    context = multiprocessing.get_context("spawn")
    process = context.Process(target=sweep_forever, args=(tmp_path,))
    process.start()
    mark = tmp_path / "pid"
    deadline = time.monotonic() + 90
    while not (mark.is_file() and mark.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = int(mark.read_text(encoding="utf-8"))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError("the worker outlived the sweep")


def sweep_forever(folder: Path) -> None:
    todo = [("only", {"output_dir": str(folder / "pid")})]
    list(sweep(todo, workers=1, threads=1, cache=folder / "cache", work=wait_forever))


def test_gpus_are_dealt_in_groups_and_what_is_left_over_rests() -> None:
    assert dealt([], 4) == []
    assert dealt(["0", "1", "2"], 1) == ["0", "1", "2"]
    assert dealt(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3"]
    with pytest.raises(AddlangError, match=r"--processes 4: only 2 GPUs here"):
        dealt(["0", "1"], 4)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (AddlangError("no such file", "look again"), AddlangError, r"no such file\n  fix: look again"),
        (PreemptedError("stopped", "run again"), PreemptedError, "stopped"),
        (KeyError("x"), AddlangError, "KeyError: 'x'"),
        (None, AddlangError, "torchrun ended with 1"),
    ],
)
def test_what_ended_a_run_on_several_processes_is_raised_as_one_process_would(
    raised: Exception | None,
    kind: type[AddlangError],
    said: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launched(command: list[str], **_: Any) -> Any:
        if raised is not None:
            spread.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 1, stdout="what it printed")

    def failing(*_: Any) -> str:
        assert raised is not None
        raise raised

    monkeypatch.setattr("addlang.sweep.run_one", failing)
    monkeypatch.setattr("addlang.spread.subprocess.run", launched)
    with pytest.raises(kind, match=said) as error:
        spread.run_spread(world.data(tmp_path / "out"), "x", processes=2)
    assert type(error.value) is kind


@pytest.mark.slow
def test_runs_on_two_processes_are_carried_out_and_the_one_that_cannot_be_is_named(
    world: World, tmp_path: Path
) -> None:
    recipe = {k: v for k, v in world.data(tmp_path, tokens=512, strategy=None, seed=None).items() if k != "output_dir"}
    study = {
        "output_dir": str(tmp_path / "out"), "recipe": recipe, "seeds": [0], "learning_rates": [1e-3],
        "arms": {"SSU": {"strategy": "ssu"}, "LISA": {"strategy": "lisa"}},
    }  # fmt: skip
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "addlang", "sweep", str(file), "--processes", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert "addlang sweep study.yaml --processes 2" in result["command"]
    (failed,) = result["failed"]
    assert failed["run"] == "LISA-lr0.001-s0"
    assert failed["error"].startswith("lisa puts parameters to sleep, which neither DDP nor FSDP allows")
    run = tmp_path / "out" / "runs" / "SSU-lr0.001-s0"
    assert read_state(run)["processes"] == 2
    assert verify_run(run)["ok"]


@pytest.mark.slow
def test_a_run_on_several_processes_saves_and_ends_when_its_sweep_is_gone(world: World, tmp_path: Path) -> None:
    data = world.data(tmp_path / "out", tokens=400_000, strategy="full")
    script = f"import json\nfrom addlang.spread import run_spread\nrun_spread(json.loads({json.dumps(json.dumps(data))}), 'x', processes=2)"
    sweeping = subprocess.Popen([sys.executable, "-c", script])
    log = tmp_path / "out" / "metrics.jsonl"
    while not (log.is_file() and log.stat().st_size > 2000):
        assert sweeping.poll() is None
        time.sleep(0.05)
    sweeping.kill()
    sweeping.wait()
    size = -1
    while log.stat().st_size != size:  # no line is written any more
        size = log.stat().st_size
        time.sleep(6)
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps[-1] < 400_000 // (4 * 32) - 1
    assert newest(tmp_path / "out") is not None
