"""The command line as a new user tries it: what it prints where, exit codes, and no traceback."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from addlang import cli, progress
from addlang.lab import lab_model_path
from tinyrun import Killed, World, dying_at, flip_bit, frozen_place, without_weights

pytestmark = pytest.mark.usefixtures("offline")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


Addlang = Callable[..., Outcome]


@pytest.fixture
def addlang(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Addlang:
    """Run a command in this process; arguments are turned into text."""
    import warnings

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["addlang", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            finally:
                progress.set_quiet(False)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "\x1b" not in captured.out + captured.err  # no terminal: plain text
        return Outcome(code, captured.out, captured.err)

    return call


def options(world: World, output_dir: Path) -> list[object]:
    """Arguments after ``adapt``."""
    return [
        world.model, world.text, "--language", "sw", "--output_dir", output_dir, "--tokens", "1536", "--sequence_length", 32,
        "--batch_size", 4, "--learning_rate", "1e-2", "--replies", "null", "--resamples", 100, "--holdout", 0.15,
        "--calibration", world.chat, "--calibration.sequences", 12, "--calibration.sequence_length", 64, "--device", "cpu",
        "--evaluation.source_datasets", f"[{{path: {world.english}}}]",
    ]  # fmt: skip


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world.data(tmp_path / "out")))
    return file


# ---- nothing heavy is loaded for nothing


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["lab", "--help"], ["run"], ["nosuch"]])
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str]) -> None:
    """This keeps ``addlang --help`` under 0.3 s; the clock itself would measure the machine."""
    own: set[str] = (
        set() if arguments == ["--help"] else {"pydantic"}
    )  # newer typer parses the options of a command with it
    code = (
        f"import sys; sys.argv = ['addlang', *{arguments}]\n"
        "from addlang.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"heavy = {{'torch', 'transformers', 'pydantic', 'datasets', 'numpy', 'yaml', 'jinja2', 'scipy'}} - {own or 'set()'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command(addlang: Addlang) -> None:
    result = addlang("--help")
    assert result.code == 0
    for command in ("lab", "adapt", "run", "plan", "evaluate", "report", "verify", "strategies", "doctor"):
        assert f" {command} " in result.out


def test_python_m_addlang_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "addlang", "strategies", "--json"], capture_output=True, text=True)
    assert {row["name"] for row in json.loads(done.stdout)} >= {"full", "ssu"}


# ---- small commands


def test_the_cost_table_ends_with_what_guards_add_to_full_fine_tuning(addlang: Addlang) -> None:
    rows = {r["strategy"]: r for r in addlang("strategies", "--table", "--model", "lab", "--json").json}
    assert list(rows)[-3:] == ["full + ewc", "full + kl", "full + l2sp"]
    assert rows["full + ewc"]["flops_ratio"] == rows["full"]["flops_ratio"] == 1


def test_strategies_come_with_paper_and_summary(addlang: Addlang) -> None:
    rows = addlang("strategies", "--json").json
    assert {"full", "ssu"} <= {row["name"] for row in rows}
    assert all(row["paper"] and row["summary"] and set(row) == {"kind", "name", "paper", "summary"} for row in rows)
    assert {row["name"] for row in rows if row["kind"] == "guard"} == {"ewc", "kl", "l2sp", "self_anchor"}
    table = addlang("strategies").out
    assert all(row["name"] in table for row in rows)


@pytest.mark.skipif(not (lab_model_path() / "config.json").is_file(), reason="the lab model is not built")
def test_the_lab_model_is_an_ordinary_directory(addlang: Addlang) -> None:
    path = addlang("lab", "path", "--json").json["model"]
    assert (Path(path) / "model.safetensors").is_file()
    assert addlang("lab", "path").out.strip() == path


def test_doctor_says_what_there_is(addlang: Addlang) -> None:
    result = addlang("doctor", "--json")
    assert result.json["packages"]["torch"]
    assert result.json["hub"] == "offline (HF_HUB_OFFLINE)"
    assert result.code == (0 if result.json["ok"] else 1)
    assert "hub           offline" in addlang("doctor").out


def test_doctor_fails_where_addlang_cannot_work(
    addlang: Addlang, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADDLANG_CACHE", str(tmp_path / "file" / "cache"))
    result = addlang("doctor")
    assert result.code == 1
    assert "set ADDLANG_CACHE" in result.out


# ---- adapt and run


def test_adapt_prints_a_table_and_where_the_result_is(addlang: Addlang, world: World, tmp_path: Path) -> None:
    result = addlang("adapt", *options(world, tmp_path / "out"))
    assert result.code == 0, result.err
    assert "Swahili gained" in result.out
    assert "proof: 0 of" in result.out
    assert f"model   {tmp_path / 'out'}" in result.out
    check = addlang("verify", tmp_path / "out")
    assert check.code == 0
    assert "proof holds: everything declared frozen is bit-identical" in check.out
    before = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    assert addlang("report", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "report.html").read_text() == before


def test_adapt_and_the_recipe_it_writes_down_are_the_same_run(addlang: Addlang, world: World, tmp_path: Path) -> None:
    printed = addlang("adapt", *options(world, tmp_path / "out"), "--ratio", 0.25, "--dry-run")
    assert printed.code == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text(printed.out)
    again = addlang("run", tmp_path / "recipe.yaml", "--dry-run", "--json").json
    assert again == addlang("adapt", *options(world, tmp_path / "out"), "--ratio", 0.25, "--dry-run", "--json").json
    assert again["phases"][0]["strategy"]["ratio"] == 0.25
    assert again["phases"][0]["tokens"] == 1536


def test_epochs_take_the_place_of_the_labs_default_budget(addlang: Addlang, world: World, tmp_path: Path) -> None:
    arguments = ("lab", world.text, "--language", "sw", "--output_dir", tmp_path / "out", "--dry-run", "--json")
    (phase,) = addlang("adapt", *arguments, "--epochs", 2).json["phases"]
    assert (phase["epochs"], phase["tokens"]) == (2, None)
    assert addlang("adapt", *arguments).json["phases"][0]["tokens"] == 300 * 512


def test_several_texts_with_weights_and_replay_share_the_budget(addlang: Addlang, world: World, tmp_path: Path) -> None:
    arguments = [*options(world, tmp_path / "out"), world.more, "--weight", 3, "--weight", 1, "--replay", world.english]
    data = addlang("adapt", *arguments, "--replay_share", 0.2, "--dry-run", "--json").json["phases"][0]["datasets"]
    assert [d["weight"] for d in data] == pytest.approx([0.6, 0.2, 0.2])
    assert [d["role"] for d in data] == ["target", "target", "replay"]


def test_json_mode_prints_one_document_and_nothing_else(addlang: Addlang, recipe: Path, tmp_path: Path) -> None:
    result = addlang("run", recipe, "--json")
    assert result.code == 0
    assert result.json["output_dir"] == str(tmp_path / "out")
    assert result.json["proof"]["ok"] is True
    assert {c["role"] for c in result.json["comparison"]} == {"source", "target"}
    assert result.err == ""
    proof = addlang("verify", tmp_path / "out", "--json")
    assert proof.json["ok"] is True


def test_overrides_of_run_are_checked_like_the_file(addlang: Addlang, recipe: Path) -> None:
    assert (
        addlang("run", recipe, "--learning_rate=3e-4", "--dry-run", "--json").json["phases"][0]["learning_rate"] == 3e-4
    )
    for arguments, message in [
        (["--learning_rat", "1"], "Did you mean 'learning_rate'"),
        (["--seed"], "--seed has no value"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--learning_rate", "-1"], "learning_rate: Input should be greater than 0"),
    ]:
        result = addlang("run", recipe, *arguments)
        assert result.code == 1
        assert message in result.err


def test_an_option_given_as_nothing_is_an_empty_list(addlang: Addlang, recipe: Path) -> None:
    done = addlang("plan", str(recipe), "--evaluation.tasks", "", "--json")
    assert done.code == 0, done.err
    refused = addlang("plan", str(recipe), "--evaluation.tasks", "[1]")
    assert refused.code == 1
    assert "evaluation.tasks" in refused.err


def test_what_libraries_say_when_imported_stays_off_the_terminal(
    addlang: Addlang, monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers = [logging.getLogger(name) for name in ("torchao", "torchao.kernel", "torch.utils._pytree")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    addlang("strategies")
    assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)


def test_options_of_the_self_anchor_are_reached_by_dots(addlang: Addlang, world: World, tmp_path: Path) -> None:
    arguments = ["adapt", world.model, world.text, "--language", "sw", "--output_dir", tmp_path / "out", "--dry-run"]
    for key in ("--strategy.anchor.share", "--anchor.share"):
        found = addlang(*arguments, "--strategy", "self_anchor", key, 0.4, "--json").json
        assert found["phases"][0]["strategy"]["anchor"]["share"] == 0.4
    shown = addlang(*arguments, "--strategy", "self_anchor", "--anchor.shar", 0.4)
    assert "unknown option 'anchor.shar'. Did you mean 'share'?" in shown.err
    assert (
        "'anchor' is already set"
        in addlang(*arguments, "--anchor", 1, "--anchor.share", 0.4, "--strategy", "self_anchor").err
    )


def test_all_mistakes_of_adapt_stand_in_one_message(addlang: Addlang, world: World, tmp_path: Path) -> None:
    result = addlang(
        "adapt", world.model, tmp_path / "gone.jsonl", "--language", "sw", "--output_dir", tmp_path / "o", "--tokens", "lots",
        "--strategy", "sssu", "--learning_rat", 1, "--base_model", "x",
    )  # fmt: skip
    assert result.code == 1
    for part in (
        "5 problem(s)", "'lots' is not a count", "unknown strategy 'sssu'", "Did you mean 'learning_rate'",
        "addlang calls it 'model_name_or_path'", "gone.jsonl: the file does not exist",
    ):  # fmt: skip
        assert part in result.err
    assert not (tmp_path / "o").exists()


# ---- plan and evaluate


def test_plan_tells_what_the_run_will_do_and_trains_nothing(addlang: Addlang, recipe: Path, tmp_path: Path) -> None:
    plan = addlang("plan", recipe, "--json").json
    (phase,) = plan["phases"]
    assert not (tmp_path / "out").exists()
    assert addlang("run", recipe).code == 0
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert phase["steps"] == state["train"]["adapt"]["steps"]
    assert phase["tokens"] == state["data"]["adapt"]["tokens"]
    assert phase["trainable_fraction"] == pytest.approx(state["plan"]["adapt"]["trainable_fraction"])
    assert state["plan"]["adapt"]["execution"] == f"split ({phase['form']})"
    shown = addlang("plan", recipe)
    assert f"{phase['trainable']:,} of {phase['parameters']:,} parameters are trained" in shown.out
    assert "up_proj" in shown.out
    assert "on a CPU these are the tensors" in shown.out


def test_plan_knows_what_split_execution_cannot_run(addlang: Addlang, recipe: Path) -> None:
    columns, elements = (
        addlang("plan", recipe, "--json", "--strategy.granularity", kind).json["phases"][0]
        for kind in ("column", "element")
    )
    assert (columns["execution"], elements["execution"]) == ("split", "masked")
    assert "is frozen element by element" in elements["why_masked"]
    assert elements["trainable"] == columns["trainable"]
    assert elements["memory"]["optimizer"] > columns["memory"]["optimizer"]  # of whole matrices
    refused = addlang("plan", recipe, "--strategy.granularity", "element", "--execution", "split")
    assert refused.code == 1
    assert "is frozen element by element" in refused.err


def test_plan_tells_adapters_from_weights_of_the_models_own(addlang: Addlang, recipe: Path) -> None:
    phase = addlang("plan", recipe, "--json", "--strategy", "lora").json["phases"][0]
    assert phase["execution"] == "adapters"
    assert phase["trainable"] != sum(g["elements"] - g["frozen"] for g in phase["groups"])


def test_plan_tells_the_tokens_that_a_strategy_reads_beforehand(addlang: Addlang, recipe: Path) -> None:
    notes = addlang("plan", recipe, "--json", "--strategy", "lota", "--strategy.warmup_steps", 5).json["phases"][0][
        "notes"
    ]
    assert any(n.startswith("5 more steps on the first 640 tokens") for n in notes)  # of 4 sequences of 32 tokens


def test_plan_refuses_what_a_run_on_as_many_devices_would(addlang: Addlang, recipe: Path) -> None:
    refused = addlang("plan", recipe, "--devices", 2, "--sharding", "none")
    assert refused.code == 1
    assert "sharding: none on 2 process(es)" in refused.err
    assert addlang("plan", recipe, "--gpu", 0).code == 2
    cases: dict[str, list[object]] = {
        "lisa puts parameters to sleep": ["--strategy", "lisa"],
        "gmt chooses within whole tensors": ["--strategy", "gmt"],
        "adapters are not sharded": ["--strategy", "lora"],
        "resident split layers cannot be sharded": ["--execution", "split_resident"],
    }
    for message, settings in cases.items():
        refused = addlang("plan", recipe, "--devices", 2, *settings)
        assert refused.code == 1
        assert message in refused.err
    assert addlang("plan", recipe, "--devices", 2, "--sharding", "ddp", "--execution", "split_resident").code == 0
    spread, copied = (
        addlang("plan", recipe, "--devices", 2, "--sharding", how, "--json").json["phases"][0]["memory"]
        for how in ("fsdp", "ddp")
    )
    assert spread["optimizer"] == pytest.approx(copied["optimizer"] / 2, rel=0.01)


def test_plan_times_a_few_steps_and_says_what_is_not_counted(addlang: Addlang, recipe: Path, tmp_path: Path) -> None:
    plan = addlang("plan", recipe, "--probe", "--json", "--guards", "[kl, l2sp]", "--sampler", "self_paced").json
    assert plan["phases"][0]["seconds"] > 0
    assert plan["phases"][0]["not_timed"] == ["evaluation", "guards (kl, l2sp)", "the sampler (self_paced)"]
    shown = addlang("plan", recipe, "--probe").out
    assert "for this phase on CPU" in shown
    assert "not counted: evaluation\n" in shown
    assert "time:" not in addlang("plan", recipe).out
    assert not (tmp_path / "out").exists()


def test_the_probe_of_plan_fuses_what_the_run_fuses_and_times_one_devices_part_of_a_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addlang import liger
    from addlang.planning import plan_run
    from addlang.train import loop

    fused, schedules, train = [], [], loop.train
    monkeypatch.setattr(liger, "apply_liger", lambda model: fused.append(model))
    monkeypatch.setattr(
        loop, "train", lambda *a, schedule, **kw: schedules.append(schedule) or train(*a, schedule=schedule, **kw)
    )
    loaded = world.recipe(tmp_path / "out", use_liger_kernel=True, batch_size=4)
    (phase,) = plan_run(loaded, devices=2, probe=True)["phases"]
    assert len(fused) == 1
    assert (phase["batch_size"], schedules[0].batch) == (4, 2)
    assert phase["not_timed"] == ["evaluation", "exchange between devices"]


@pytest.mark.parametrize("execution", ["masked", "split"])
def test_the_disk_that_plan_asks_for_is_what_a_runs_checkpoints_take(
    execution: str, addlang: Addlang, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addlang.train import checkpoint

    options = ("--execution", execution, "--save_total_limit", 1)
    plan = addlang("plan", recipe, "--json", *options).json
    said = plan["phases"][0]["checkpoint_bytes"]
    monkeypatch.setattr(checkpoint, "clear", lambda _: None)
    assert addlang("run", recipe, *options).code == 0
    (kept,) = (tmp_path / "out").rglob("checkpoint-*")
    tensors = sum(f.stat().st_size for f in kept.glob("*.safetensors"))
    assert tensors == pytest.approx(said, rel=0.1)  # names of tensors count at this size
    assert plan["disk_bytes"] == pytest.approx(2 * said, rel=0.3)  # one more while it is written, and the result


def test_plan_says_what_fits_on_a_gpu(addlang: Addlang, recipe: Path) -> None:
    plan = addlang("plan", recipe, "--gpu", 24, "--json").json
    (phase,) = plan["phases"]
    assert plan["device"] == "GPU of 24 GiB"
    assert phase["gpu"]["available_bytes"] == round(24 * 2**30 * 0.93)
    assert phase["gpu"]["changes"] == {}
    assert phase["gpu"]["memory"]["total"] == phase["memory"]["total"]
    assert all(row["fits"] for row in phase["gpu"]["table"])
    shown = addlang("plan", recipe, "--gpu", 24).out
    assert "22.3 GiB of the GPU can be used" in shown
    assert "nearest to the recipe that fits: the recipe as it is" in shown
    assert "these are the tensors" not in shown


def test_plan_needs_no_weights_and_says_whose_type_it_reckons_with(
    addlang: Addlang, recipe: Path, world: World, tmp_path: Path
) -> None:
    bare = without_weights(world.model, tmp_path / "bare")
    whole = addlang("plan", recipe, "--json").json
    plan = addlang("plan", recipe, "--model_name_or_path", bare, "--json").json
    assert any("has no weights" in n for n in plan["phases"][0]["notes"])
    assert plan["phases"][0]["memory"] == whole["phases"][0]["memory"]
    assert plan["disk_bytes"] == whole["disk_bytes"]


def test_evaluate_measures_a_model_and_the_difference_of_two(
    addlang: Addlang, recipe: Path, world: World, tmp_path: Path
) -> None:
    assert addlang("run", recipe).code == 0
    arguments = [
        "evaluate", tmp_path / "out", "--language", "sw", "--text", world.more, "--source_text", world.english, "--limit", 2,
        "--against", world.model, "--output", tmp_path / "new" / "rows.jsonl",
    ]  # fmt: skip
    result = addlang(*arguments, "--json")
    assert result.code == 0, result.err
    target = [c for c in result.json["comparison"] if c["role"] == "target"]
    assert target[0]["high"] < 0  # bits per byte of text in the language that was learned
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert rows == result.json["results"]
    assert "difference" in addlang(*arguments).out


@pytest.mark.usefixtures("offline")
def test_evaluate_measures_the_answers_of_conversations_in_both_languages(addlang: Addlang, world: World) -> None:
    arguments = [
        "evaluate",
        world.model,
        "--language",
        "sw",
        "--text",
        world.chat,
        "--source_text",
        world.chat,
        "--limit",
        1,
    ]
    result = addlang(*arguments, "--json")
    assert result.code == 0, result.err
    found = {(r["role"], r["metric"]): r["value"] for r in result.json["results"]}
    assert found["target", "answer_bits_per_byte"] == found["source", "answer_bits_per_byte"] > 0


# ---- exit codes


def test_wrong_usage_is_exit_code_2(addlang: Addlang) -> None:
    for arguments in (
        ["adapt"],
        ["nosuch"],
        ["adapt", "model", "text", "--seed", "soon", "--language", "sw", "--output_dir", "o"],
    ):
        plain = addlang(*arguments)
        assert plain.code == 2
        assert plain.err
        assert plain.out == ""
        result = addlang(*arguments, "--json")
        assert result.code == 2
        assert result.json["exit_code"] == 2


def test_an_error_is_exit_code_1_and_one_json_document(addlang: Addlang, tmp_path: Path) -> None:
    for arguments in (
        ["run", tmp_path / "no.yaml"],
        ["verify", tmp_path],
        ["report", tmp_path],
        ["plan", tmp_path / "no.yaml"],
    ):
        result = addlang(*arguments, "--json")
        assert result.code == 1
        assert result.json["exit_code"] == 1
        assert "fix:" in result.json["error"]
        plain = addlang(*arguments)
        assert plain.out == ""
        assert plain.err.startswith("error: ")


def test_a_failed_proof_is_exit_code_4_and_names_the_tensor(addlang: Addlang, recipe: Path, tmp_path: Path) -> None:
    assert addlang("run", recipe).code == 0
    name, place = frozen_place(tmp_path / "out")
    flip_bit(tmp_path / "out", name, place)
    result = addlang("verify", tmp_path / "out")
    assert result.code == 4
    assert f"frozen elements differ in 1 tensor(s): {name}" in result.err
    assert "1 of" in result.out
    document = addlang("verify", tmp_path / "out", "--json")
    assert document.code == 4
    assert document.json["exit_code"] == 4
    assert document.json["phases"][0]["frozen_changed"] == 1
    assert name in document.json["error"]


def test_a_finished_run_needs_overwrite(addlang: Addlang, recipe: Path) -> None:
    assert addlang("run", recipe).code == 0
    again = addlang("run", recipe)
    assert again.code == 1
    assert "--overwrite" in again.err
    assert addlang("run", recipe, "--overwrite").code == 0


def test_preemption_is_exit_code_75(addlang: Addlang, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from addlang.train import loop

    original = loop.token_loss
    calls = 0

    def terminate(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", terminate)
        result = addlang("run", recipe, "--json")
    assert result.code == 75
    assert result.json["exit_code"] == 75
    assert addlang("run", recipe).code == 0


def test_interruption_is_exit_code_130(addlang: Addlang, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addlang.train import loop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(3, loop.token_loss, KeyboardInterrupt()))
        result = addlang("run", recipe)
    assert result.code == 130


def test_a_bug_of_ours_is_not_hidden(addlang: Addlang, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addlang.train import loop

    monkeypatch.setattr(loop, "token_loss", dying_at(1, loop.token_loss, Killed()))
    with pytest.raises(Killed):
        addlang("run", recipe)
    monkeypatch.setattr(loop, "token_loss", dying_at(1, loop.token_loss, RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        addlang("run", recipe, "--json")
