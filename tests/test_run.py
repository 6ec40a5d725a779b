"""The main path, end to end, on a tiny random model: output, proof, resume, and who may write where."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import ARCHITECTURES, make_tokenizer, save_model

from addlang.errors import AddlangError, PreemptedError, ProofError
from addlang.freeze.plan import FreezePlan
from addlang.models import Checkpoint, load_model
from addlang.recipe import Phase, Recipe
from addlang.run import execute
from addlang.rundir import RunDir, read_state
from addlang.train import loop
from addlang.train.shard import World as Processes
from addlang.verify import verify_run
from tinyrun import (
    Killed,
    World,
    chat_rows,
    dying_at,
    flip_bit,
    frozen_place,
    listing,
    metrics,
    same,
    text_rows,
    weights,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("offline")
STRATEGIES = ("full", "ssu")


@pytest.fixture(scope="module")
def finished(world: World, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that tests look at but do not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDLANG_CACHE", str(shared_cache))
        return execute(world.recipe(tmp_path_factory.mktemp("finished") / "out"))


def test_a_run_leaves_a_checkpoint_and_its_documents_and_nothing_else(finished: Path, world: World) -> None:
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    source = {p.name for p in Path(world.model).iterdir()}
    documents = {
        "recipe.yaml", "freeze_plan.safetensors", "metrics.jsonl", "results.jsonl", "comparison.json", "proof.json", "state.json",
        "README.md", "report.html",
    }  # fmt: skip
    samples = {f for f in files if f.startswith("samples/")}
    assert files - samples == source | documents
    assert {f.split("/")[1] for f in samples} == {"before", "after"}
    assert read_state(finished)["status"] == "finished"


def test_the_result_is_an_ordinary_checkpoint_in_the_sources_type(finished: Path, world: World) -> None:
    source, adapted = Checkpoint(Path(world.model)), Checkpoint(finished)
    assert source.dtype == adapted.dtype == torch.bfloat16
    assert adapted.header == source.header
    assert (finished / "tokenizer.json").read_bytes() == (Path(world.model) / "tokenizer.json").read_bytes()
    logits = load_model(finished)(torch.arange(6, 30).view(1, -1)).logits
    assert bool(torch.isfinite(logits).all())


def test_every_frozen_element_is_the_sources_and_every_trained_tensor_moved(finished: Path, world: World) -> None:
    before, after = weights(Path(world.model)), weights(finished)
    plan = FreezePlan.load(finished / "freeze_plan.safetensors")
    for name, old in before.items():
        mask = plan[name].mask()
        assert torch.equal(old[mask], after[name][mask]), name
        if plan[name].kind != "all":
            assert bool((old != after[name])[~mask].any()), name


def test_verify_recomputes_what_the_run_wrote(finished: Path) -> None:
    proof = verify_run(finished)
    assert proof == json.loads((finished / "proof.json").read_text())
    assert proof["ok"]
    (phase,) = proof["phases"]
    assert phase["frozen_changed"] == 0 < phase["frozen_elements"]
    assert 0 < phase["trainable_moved"] <= phase["trainable_elements"]


def test_results_and_comparison_are_of_the_same_items_before_and_after(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert {(r["model"], r["role"]) for r in rows} == {
        (m, r) for m in ("before", "after") for r in ("source", "target")
    }
    for c in json.loads((finished / "comparison.json").read_text()):
        assert c["low"] <= c["difference"] <= c["high"]
    for file in (finished / "samples" / "before").iterdir():
        ids = [
            [i["id"] for i in json.loads((finished / "samples" / m / file.name).read_text())["items"]]
            for m in ("before", "after")
        ]
        assert ids[0] == ids[1]


def test_the_model_learns_the_target_text(finished: Path) -> None:
    (target,) = [c for c in json.loads((finished / "comparison.json").read_text()) if c["role"] == "target"]
    assert target["after"] < 0.9 * target["before"]


def test_the_resolved_recipe_in_the_run_gives_the_same_run(finished: Path, world: World, tmp_path: Path) -> None:
    again = Recipe.load(finished / "recipe.yaml", [("output_dir", str(tmp_path / "again"))])
    assert again.fingerprint == read_state(finished)["fingerprint"]
    assert same(execute(again), finished)


def test_warnings_are_kept_for_the_report_each_once(world: World, tmp_path: Path) -> None:
    path = execute(
        world.recipe(tmp_path / "out", calibration={"datasets": [{"path": world.chat}], "allow_fewer": True})
    )
    kept = read_state(path)["warnings"]
    assert len([w for w in kept if "20 calibration sequences instead of 500" in w]) == 1
    assert "20 calibration sequences instead of 500" in (path / "report.html").read_text()


# ---- held-out text and mixture


def test_held_out_text_is_never_trained_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def capture(_attached: Any, data: Any, *_: Any, **__: Any) -> None:
        packed.extend(data.mixture.sources)
        raise Killed

    monkeypatch.setattr(loop, "train", capture)
    with pytest.raises(Killed):
        execute(world.recipe(tmp_path / "out"))
    held = json.loads(next((tmp_path / "out" / "samples" / "before").glob("held-out*")).read_text())["items"]
    trained = make_tokenizer().decode(packed[0].tokens[:])
    texts = {row["text"] for row in text_rows(60, 1)}
    assert len(held) == 9  # 0.15 of 60
    assert len([t for t in texts if t in trained]) == len(texts) - len(held)


def test_replay_takes_its_share_of_the_tokens(world: World, tmp_path: Path) -> None:
    data = [{"path": world.text, "weight": 0.75}, {"path": world.more, "role": "replay", "weight": 0.25}]
    path = execute(world.recipe(tmp_path / "out", datasets=data, tokens=8000))
    sources = read_state(path)["data"]["adapt"]["sources"]
    assert [s["role"] for s in sources] == ["target", "replay"]
    assert sources[1]["trained_tokens"] / sum(s["trained_tokens"] for s in sources) == pytest.approx(0.25, abs=0.02)
    assert sources[1]["held_out"] == 0


def test_weights_divide_the_budget_among_several_texts(world: World, tmp_path: Path) -> None:
    data = [{"path": world.text, "weight": 3}, {"path": world.more, "weight": 1}]
    path = execute(world.recipe(tmp_path / "out", datasets=data, tokens=8000))
    share = [s["trained_tokens"] for s in read_state(path)["data"]["adapt"]["sources"]]
    assert share[0] / sum(share) == pytest.approx(0.75, abs=0.02)


# ---- phases


def two_phases(world: World, output_dir: Path, **second: Any) -> Recipe:
    data = world.data(output_dir)
    first = {k: data.pop(k) for k in list(data) if k in Phase.model_fields}
    chat = write_rows(world.root / "tuning.jsonl", chat_rows(60, 9))
    data["phases"] = [
        {"name": "read", **first},
        {"name": "tune", **first, "datasets": [{"path": chat}], "strategy": "full", "sequence_length": 128, **second},
    ]
    return Recipe.parse(data)


def test_the_second_phase_starts_where_the_first_ended(world: World, tmp_path: Path) -> None:
    path = execute(two_phases(world, tmp_path / "out"))
    proof = json.loads((path / "proof.json").read_text())
    assert [p["phase"] for p in proof["phases"]] == ["read", "tune"]
    assert proof["phases"][0]["source_hash"] == Checkpoint(Path(world.model)).hash
    assert proof["phases"][1]["source_hash"] == Checkpoint(path / "phases" / "read").hash
    assert proof["phases"][1]["adapted_hash"] == Checkpoint(path).hash
    assert verify_run(path) == proof
    assert {p.name for p in (path / "samples").iterdir()} == {"before", "read", "after"}


def test_a_phase_can_start_from_the_source(world: World, tmp_path: Path) -> None:
    path = execute(two_phases(world, tmp_path / "out", start="source"))
    source = Checkpoint(Path(world.model)).hash
    assert [p["source_hash"] for p in json.loads((path / "proof.json").read_text())["phases"]] == [source, source]


def test_no_phase_trains_on_what_the_last_one_holds_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first phase reads twice the text of the second, which is among it."""
    from addlang.data import prepare as module

    seen: dict[str, Any] = {}
    original = module.prepare

    def spy(recipe: Recipe, phase: Phase, *args: Any, **kw: Any) -> Any:
        seen[phase.name] = original(recipe, phase, *args, **kw)
        return seen[phase.name]

    monkeypatch.setattr(module, "prepare", spy)
    both = [json.loads(x) for path in (world.text, world.more) for x in Path(path).read_text().splitlines()]
    data = world.data(tmp_path / "out")
    first = {k: data.pop(k) for k in list(data) if k in Phase.model_fields}
    large = write_rows(world.root / "large.jsonl", both)
    data["phases"] = [{"name": "a", **first, "datasets": [{"path": large}]}, {"name": "b", **first}]
    execute(Recipe.parse(data))
    held = [text for _, text in seen["b"].heldout]
    assert len(held) == 9
    trained = make_tokenizer().decode(seen["a"].mixture.sources[0].tokens.tolist())
    assert not [text for text in held if text in trained]
    kept = [row["text"] for row in both if row["text"] in trained]
    assert len(kept) > 80


def test_verify_of_phases_stops_at_the_one_whose_proof_fails(world: World, tmp_path: Path) -> None:
    path = execute(two_phases(world, tmp_path / "out"))
    first = path / "phases" / "read"
    name, place = frozen_place(first)
    flip_bit(first, name, place)
    proof = verify_run(path)
    assert not proof["ok"]
    assert [p["phase"] for p in proof["phases"]] == ["read"]


# ---- architectures and layouts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_architecture_goes_through_the_main_path(
    architecture: str, strategy: str, world: World, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", architecture)
    path = execute(world.recipe(tmp_path / "out", model_name_or_path=str(model), strategy=strategy))
    proof = verify_run(path)
    assert proof["ok"]
    assert proof["phases"][0]["trainable_moved"] > 0
    assert Checkpoint(path).header == Checkpoint(model).header


def test_a_sharded_source_gives_the_same_shards_and_index(world: World, tmp_path: Path) -> None:
    from tiny import make_model

    sharded = tmp_path / "sharded"
    make_model("llama").to(torch.bfloat16).save_pretrained(sharded, max_shard_size="20KB")
    make_tokenizer().save_pretrained(sharded)
    index = "model.safetensors.index.json"
    path = execute(world.recipe(tmp_path / "out", model_name_or_path=str(sharded)))
    assert len(Checkpoint(sharded).files) > 2
    assert Checkpoint(path).location == Checkpoint(sharded).location
    assert json.loads((path / index).read_text()) == json.loads((sharded / index).read_text())
    assert verify_run(path)["ok"]
    assert same(path, execute(world.recipe(tmp_path / "single")))


# ---- refusals before any weight is loaded


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is loaded."""
    import addlang.models

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(addlang.models, "load_model", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_liger_kernel": True}, r"liger-kernel cannot be used(.|\n)*addlang\[liger\]"),
        ({"optimizer": "adamw_8bit"}, r"needs torchao(.|\n)*addlang\[optimizers\]"),
        ({"torch_compile": True}, r"torch_compile needs a C\+\+ compiler"),
        ({"attn_implementation": "flash_attention_2", "per_device_train_batch_size": 1}, "'flash_attention_2' cannot be used"),
        ({"attn_implementation": "flash_attention_3", "per_device_train_batch_size": 1}, "'flash_attention_3' cannot be used"),
        ({"sharding": "fsdp"}, r"sharding: fsdp on 1 process\(es\)"),
        ({"execution": "split", "strategy": {"name": "ssu", "granularity": "element"}}, r"'model\..*q_proj.weight' is frozen element by element"),
        ({"execution": "masked", "strategy": "lora"}, "there is no execution to choose"),
        ({"precision": "fp32", "master_weights": "model"}, "precision: fp32 contradicts master_weights: model"),
    ],
    ids=["liger", "torchao", "compiler", "flash2", "flash3", "sharding", "elements", "adapters", "precision"],
)  # fmt: skip
def test_what_cannot_work_here_is_said_before_anything_is_measured(
    settings: dict[str, Any], message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("liger_kernel", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    for number in (2, 3):
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{number}_available", lambda: False)
    monkeypatch.setattr("addlang.run.prepare_data", lambda *_: pytest.fail("the data were read first"))
    with pytest.raises(AddlangError, match=message):
        execute(world.recipe(tmp_path / "out", **settings))


def test_a_warmup_longer_than_the_data_is_refused_before_anything_is_measured(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.run.evaluate", lambda *_: pytest.fail("the model was measured first"))
    with pytest.raises(AddlangError, match=r"warmup_steps 1000 leaves none of the 12 steps(.|\n)*lower warmup_steps"):
        execute(world.recipe(tmp_path / "out", warmup_steps=1000))
    with pytest.raises(AddlangError, match=r"lota warms up for 100 steps, but phase 'adapt' has data for 12 only"):
        execute(world.recipe(tmp_path / "other", strategy="lota"))


class Leader(Processes):
    """The first of several processes, which waits for none."""

    def agree(self, value: Any) -> Any:
        return value


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("addlang.run.join_world", lambda _: contextlib.nullcontext(Leader(0, 2)))


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "lisa"}, "lisa puts parameters to sleep"),
        ({"strategy": "gmt"}, "gmt chooses within whole tensors"),
        ({"strategy": "lora"}, "adapters are not sharded"),
        ({"execution": "split_resident"}, "resident split layers cannot be sharded"),
    ],
    ids=["lisa", "gmt", "adapters", "resident"],
)
def test_what_several_processes_cannot_train_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(AddlangError, match=message):
        execute(world.recipe(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("two_processes")
def test_a_batch_that_the_processes_cannot_divide_as_asked_is_refused_before_anything_is_measured(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.run.evaluate", lambda *_: pytest.fail("the model was measured first"))
    with pytest.raises(AddlangError, match=r"batch_size 6 over 2 devices, 3 each, is not divisible by gradient_acc"):
        execute(world.recipe(tmp_path / "out", batch_size=6, gradient_accumulation_steps=2))


def test_an_architecture_that_liger_does_not_know_is_refused_before_the_data_are_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = SimpleNamespace(monkey_patch=SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"olmo2": None}))
    monkeypatch.setattr("addlang.liger.import_liger", lambda: liger)
    monkeypatch.setattr("addlang.run.prepare_data", lambda *_: pytest.fail("the data were read first"))
    with pytest.raises(AddlangError, match=r"liger-kernel does not know 'llama' models"):
        execute(world.recipe(tmp_path / "out", use_liger_kernel=True))


def test_no_chat_template_is_an_error_before_weights_are_loaded(world: World, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(AddlangError, match="chat template"):
        execute(world.recipe(tmp_path / "out", model_name_or_path=str(model)))


def test_a_chat_template_can_be_given_beside_the_recipe(world: World, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").rename(tmp_path / "own.jinja")
    recipe = world.recipe(tmp_path / "out", model_name_or_path=str(model), chat_template="own.jinja")
    assert verify_run(execute(recipe, base_dir=tmp_path))["ok"]


@pytest.mark.usefixtures("no_weights")
def test_too_few_calibration_sequences_are_an_error_before_weights_are_loaded(world: World, tmp_path: Path) -> None:
    calibration = {"datasets": [{"path": world.chat}], "sequences": 21}
    with pytest.raises(AddlangError, match="only 20 calibration sequences instead of 21"):
        execute(world.recipe(tmp_path / "out", calibration=calibration))


@pytest.mark.usefixtures("no_weights")
def test_a_sequence_longer_than_the_context_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="sequence_length 512 is longer than the model's context of 256"):
        execute(world.recipe(tmp_path / "out", sequence_length=512))
    evaluation = {**world.data(tmp_path)["evaluation"], "sequence_length": 300}
    with pytest.raises(AddlangError, match=r"evaluation\.sequence_length 300 is longer"):
        execute(world.recipe(tmp_path / "out", evaluation=evaluation))


# ---- the proof


def test_one_flipped_bit_of_a_frozen_element_fails_the_proof_and_names_the_tensor(world: World, tmp_path: Path) -> None:
    path = execute(world.recipe(tmp_path / "out"))
    name, place = frozen_place(path)
    flip_bit(path, name, place)
    proof = verify_run(path)
    assert not proof["ok"]
    assert [(t["name"], t["frozen_changed"]) for t in proof["phases"][0]["tensors"] if t["frozen_changed"]] == [
        (name, 1)
    ]


def test_a_run_whose_proof_failed_stays_failed_when_it_is_continued(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import addlang.export

    def careless(source: Checkpoint, attached: Any, plan: FreezePlan, out: Path, **kw: Any) -> None:
        original(source, attached, plan, out, **kw)
        name = "model.layers.1.mlp.up_proj.weight"
        flip_bit(out, name, tuple(plan[name].mask().nonzero()[0].tolist()))

    original = addlang.export.export
    monkeypatch.setattr(addlang.export, "export", careless)
    for _ in range(2):
        with pytest.raises(ProofError, match="1 frozen elements of phase 'adapt' changed"):
            execute(world.recipe(tmp_path / "out"))
    assert read_state(tmp_path / "out")["status"] != "finished"


def test_verify_against_another_model_is_an_error_that_says_so(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="the freeze plan was made for a model with hash"):
        verify_run(finished, str(save_model(tmp_path / "other", "llama", initializer_range=0.1)))


def test_verify_finds_a_source_that_moved(finished: Path, world: World, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(world.model, moved)
    assert verify_run(finished, str(moved))["ok"]


# ---- whose directory it is


def test_a_finished_run_is_not_overwritten_unless_asked(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(world.recipe(out))
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    with pytest.raises(AddlangError, match="holds a finished run") as caught:
        execute(world.recipe(out))
    assert "--overwrite" in str(caught.value)
    with pytest.raises(AddlangError, match="holds a run of another recipe"):
        execute(world.recipe(out, seed=2))
    assert listing(out) == before
    execute(world.recipe(out, seed=2), overwrite=True)
    assert not same(out, execute(world.recipe(tmp_path / "other")))
    assert yaml.safe_load((out / "recipe.yaml").read_text())["seed"] == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_a_continued_run_keeps_its_form_of_split_execution(world: World, tmp_path: Path) -> None:
    """What memory is free on the day of the resume does not change the last bits of the result."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("addlang.train.memory.free_memory", lambda *_: 0.0)
        patch.setattr(loop, "token_loss", dying_at(8, loop.token_loss, Killed()))
        with pytest.raises(Killed):
            execute(world.recipe(out, save_steps=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("addlang.train.memory.free_memory", lambda *_: 1e12)
        execute(world.recipe(out, save_steps=1))
        other = execute(world.recipe(tmp_path / "other"))
    said = [json.loads((path / "state.json").read_text())["plan"]["adapt"]["execution"] for path in (out, other)]
    assert said == ["split (assemble)", "split (resident)"]


def test_another_recipe_is_refused_with_the_keys_that_differ(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(world.recipe(out))
    with pytest.raises(AddlangError) as caught:
        execute(world.recipe(out, learning_rate=3e-3, strategy={"name": "ssu", "ratio": 0.25}))
    assert "phases.0.learning_rate (0.01 there, 0.003 here)" in str(caught.value)
    assert "phases.0.strategy.ratio (0.5 there, 0.25 here)" in str(caught.value)


def test_settings_that_do_not_change_the_result_may_change_on_resume(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(8, loop.token_loss, Killed()))
        with pytest.raises(Killed):
            execute(world.recipe(out))
    assert same(execute(world.recipe(out, save_steps=2, logging_steps=5)), execute(world.recipe(tmp_path / "whole")))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"thesis.tex": "years of work"},
        {"state.json": '{"save": "of another program"}'},
        {"state.json": "torn {"},
        {"recipe.yaml": "written: by hand"},
        {"photos.tmp": "unsorted"},
        {"checkpoint-3/weights": "of another trainer"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_strangers_directory_is_never_touched(
    content: dict[str, str], overwrite: bool, world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name, text in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = listing(out)
    with pytest.raises(AddlangError, match="is not empty and is no run of addlang"):
        execute(world.recipe(out), overwrite=overwrite)
    assert listing(out) == before


def test_an_output_directory_that_is_a_file_or_cannot_be_made_is_a_clear_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AddlangError, match="is a file"):
        execute(world.recipe(tmp_path / "file"))
    with pytest.raises(AddlangError, match="cannot be used"):
        execute(world.recipe(Path("/proc/addlang")))


def test_a_directory_whose_run_failed_before_it_did_anything_can_be_used_again(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AddlangError, match="does not exist"):
        execute(world.recipe(out, datasets=[{"path": "mistyped.jsonl"}]))
    assert verify_run(execute(world.recipe(out)))["ok"]


def test_a_torn_state_is_said_and_overwrite_mends_it(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(world.recipe(out))
    (out / "state.json").write_text("")
    with pytest.raises(AddlangError, match=r"state\.json is torn .*\n.*--overwrite"):
        execute(world.recipe(out))
    assert verify_run(execute(world.recipe(out), overwrite=True))["ok"]


def test_two_runs_in_one_directory_at_once_are_refused(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "out")
    first = RunDir.open(recipe)
    with pytest.raises(AddlangError, match="another process is running in"):
        execute(recipe)
    with pytest.raises(AddlangError, match="another process is running in"):
        execute(recipe, overwrite=True)
    first.close()
    assert verify_run(execute(recipe))["ok"]


def test_a_lock_that_its_holder_removed_excludes_nobody_and_is_not_taken_for_ours(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open() and our flock() the holder unlinks the file: our lock would be on a file that nobody sees."""
    import fcntl

    recipe = world.recipe(tmp_path / "out")
    (tmp_path / "out").mkdir()
    original, calls = fcntl.flock, 0

    def flock(handle: Any, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.unlink(tmp_path / "out" / ".lock")
        original(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = RunDir.open(recipe)
    with pytest.raises(AddlangError, match="another process"):
        RunDir.open(recipe)
    held.close()


# ---- killed and continued


STAGES = [
    ("addlang.evaluate.suite.cached_evaluate", 1, "in the first evaluation"),
    ("addlang.freeze.plan.FreezePlan.save", 1, "before the plan is saved"),
    ("addlang.train.loop.token_loss", 3, "before the first checkpoint"),
    ("addlang.train.loop.token_loss", 12, "between checkpoints"),
    ("addlang.export.copy_small_files", 1, "in the export"),
    ("addlang.freeze.proof.prove", 1, "before the proof"),
    ("addlang.train.checkpoint.clear", 1, "between proof and clearing"),
    ("addlang.evaluate.suite.cached_evaluate", 2, "in the second evaluation"),
    ("addlang.evaluate.compare.compare", 1, "before the comparison"),
    ("addlang.report.write_report", 1, "before the report"),
]


@pytest.mark.parametrize(("function", "call", "when"), STAGES, ids=[s[2].replace(" ", "-") for s in STAGES])
def test_killed_at_any_stage_and_run_again_gives_the_same_bits(
    function: str, call: int, when: str, world: World, finished: Path, tmp_path: Path
) -> None:
    import addlang.report  # noqa: F401 - patched by its dotted name

    target = pytest.MonkeyPatch()
    owner, _, name = function.rpartition(".")
    module: Any = __import__("importlib").import_module(owner) if "FreezePlan" not in owner else FreezePlan
    target.setattr(module, name, dying_at(call, getattr(module, name), Killed(when)))
    try:
        with pytest.raises(Killed):
            execute(world.recipe(tmp_path / "out"))
    finally:
        target.undo()
    path = execute(world.recipe(tmp_path / "out"))
    assert same(path, finished)
    assert metrics(path) == metrics(finished)
    assert {p.name for p in path.iterdir()} == {p.name for p in finished.iterdir()}
    for name in ("comparison.json", "results.jsonl"):
        assert (path / name).read_text() == (finished / name).read_text()


def test_what_is_complete_is_not_done_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import addlang.evaluate.compare

    with monkeypatch.context() as patch:
        patch.setattr(addlang.evaluate.compare, "compare", dying_at(1, addlang.evaluate.compare.compare, Killed()))
        with pytest.raises(Killed):
            execute(world.recipe(tmp_path / "out"))
    monkeypatch.setattr(loop, "train", dying_at(1, loop.train, AssertionError("trained again")))
    assert verify_run(execute(world.recipe(tmp_path / "out")))["ok"]


def test_data_that_changed_in_between_is_refused(world: World, tmp_path: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", text_rows(60, 11))
    recipe = world.recipe(tmp_path / "out", datasets=[{"path": text}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(8, loop.token_loss, Killed()))
        with pytest.raises(Killed):
            execute(recipe)
    write_rows(tmp_path / "text.jsonl", text_rows(61, 11))
    with pytest.raises(AddlangError, match="the data of phase 'adapt' have changed since this run began"):
        execute(recipe)
    write_rows(tmp_path / "text.jsonl", text_rows(60, 11))
    assert verify_run(execute(recipe))["ok"]


def test_a_source_model_that_changed_in_between_is_refused(world: World, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    recipe = world.recipe(tmp_path / "out", model_name_or_path=str(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(8, loop.token_loss, Killed()))
        with pytest.raises(Killed):
            execute(recipe)
    flip_bit(model, "model.layers.1.mlp.up_proj.weight", (0, 0))
    with pytest.raises(AddlangError, match="model: changed since this run began"):
        execute(recipe)
    state = json.loads((tmp_path / "out" / "state.json").read_text(encoding="utf-8"))
    del state["inputs"]  # as in a run of an earlier version; the plan knows all the same
    (tmp_path / "out" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(AddlangError, match="weights that phase 'adapt' starts from have changed"):
        execute(recipe)


def test_a_run_knows_the_content_of_the_files_that_it_read(world: World, finished: Path) -> None:
    from addlang.inputs import digests

    inputs = json.loads((finished / "state.json").read_text(encoding="utf-8"))["inputs"]
    assert set(inputs) == {world.model, world.text, world.english, world.chat}
    assert len(set(inputs.values())) == 4
    assert digests(world.recipe(finished), None) == inputs


@pytest.mark.parametrize(
    ("function", "call"), [("addlang.evaluate.suite.cached_evaluate", 1), ("addlang.freeze.proof.prove", 1)]
)
def test_sigterm_outside_of_training_is_a_preemption_too(
    function: str, call: int, world: World, finished: Path, tmp_path: Path
) -> None:
    import importlib

    owner, _, name = function.rpartition(".")
    module = importlib.import_module(owner)
    original = getattr(module, name)

    def terminate(*args: Any, **kw: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kw)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, terminate)
        with pytest.raises(PreemptedError) as caught:
            execute(world.recipe(tmp_path / "out"))
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert same(execute(world.recipe(tmp_path / "out")), finished)


def test_sigterm_at_the_last_step_is_heeded(world: World, finished: Path, tmp_path: Path) -> None:
    steps = len(metrics(finished))
    original, count = loop.token_loss, 0

    def terminate(*args: Any, **kw: Any) -> Any:
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_loss", terminate)
        with pytest.raises(PreemptedError):
            execute(world.recipe(tmp_path / "out"))
    assert same(execute(world.recipe(tmp_path / "out")), finished)


# ---- real processes


def command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "addlang", "run", str(recipe), *options]


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(recipe, *options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def long_recipe(world: World, directory: Path, tokens: int = 60_000) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(world.data(directory / "out", tokens=tokens, save_steps=40)))
    return file


def kills_give_the_same_bits(world: World, root: Path, count: int, seed: int) -> None:
    """One uninterrupted run, then others that are killed at random moments, ``count`` times in all.

    A run that ends before its moment comes is compared, and the next kills hit a new one.
    """
    began = time.monotonic()
    assert start(long_recipe(world, root / "whole")).wait() == 0
    length = time.monotonic() - began
    r, kills, run = random.Random(seed), 0, 0
    fresh = True  # nothing has killed this run yet
    while kills < count or not fresh:
        process = start(long_recipe(world, root / f"run-{run}"))
        try:
            _, error = process.communicate(timeout=None if kills == count else r.uniform(0.3, 0.95) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills, fresh = kills + (process.returncode == -signal.SIGKILL), False
            continue
        assert process.returncode == 0 or "finished run" in error, error
        assert same(root / f"run-{run}" / "out", root / "whole" / "out")
        assert metrics(root / f"run-{run}" / "out") == metrics(root / "whole" / "out")
        assert not list((root / f"run-{run}" / "out").rglob("*.tmp"))
        length *= 0.8 if fresh else 1.0  # it was over sooner than the first, while other work held that up
        run, fresh = run + 1, True
    assert kills == count


@pytest.mark.slow
def test_a_killed_process_run_again_gives_the_same_bits(world: World, tmp_path: Path) -> None:
    kills_give_the_same_bits(world, tmp_path, 3, seed=0)


@pytest.mark.hours
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_at_random_moments_give_the_same_bits(seed: int, world: World, tmp_path: Path) -> None:
    kills_give_the_same_bits(world, tmp_path, 4, seed=100 + seed)


@pytest.mark.slow
def test_a_terminated_process_exits_75_and_continues(world: World, tmp_path: Path) -> None:
    recipe = long_recipe(world, tmp_path)
    process = start(recipe)
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size > 2000):
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "run the same command again to continue" in error
    assert "Traceback" not in error
    assert list((tmp_path / "out").glob("checkpoint-*"))
    again = start(recipe)
    _, error = again.communicate()
    assert again.returncode == 0, error
    whole = start(long_recipe(world, tmp_path / "whole"))
    assert whole.wait() == 0
    assert same(tmp_path / "out", tmp_path / "whole" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_torchrun_trains_what_one_process_trains_and_one_process_can_go_on(
    sharding: str, world: World, tmp_path: Path
) -> None:
    whole = start(long_recipe(world, tmp_path / "whole", 20_000))
    assert whole.wait() == 0
    recipe = long_recipe(world, tmp_path, 20_000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "addlang", "run", str(recipe), "--sharding", sharding],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size > 2000):
        time.sleep(0.02)
    process.terminate()  # the launcher passes it on to its processes
    said, _ = process.communicate()
    assert process.returncode != 0
    saved = list((tmp_path / "out").glob("checkpoint-*"))
    assert saved, said
    assert all((p / ".metadata").is_file() == (sharding == "fsdp") for p in saved)
    assert read_state(tmp_path / "out")["processes"] == 2
    assert start(recipe).wait() == 0
    assert read_state(tmp_path / "out")["processes"] == 1
    assert verify_run(tmp_path / "out")["ok"]
    assert apart(tmp_path / "out", tmp_path / "whole" / "out", Path(world.model)) < 0.01


@pytest.mark.slow
def test_accelerate_launches_a_run_on_two_processes_and_its_settings_for_fsdp_do_nothing(
    world: World, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    for kind in (
        "multi_gpu",
        "use_fsdp",
    ):  # both start processes as torchrun does; the recipe says that they use the CPU
        recipe = long_recipe(world, tmp_path / kind, 1_536)
        launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--{kind}", "--num_processes", "2"]
        done = subprocess.run(
            [*launcher, "-m", "addlang", "run", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert read_state(tmp_path / kind / "out")["processes"] == 2
        assert verify_run(tmp_path / kind / "out")["ok"]
    execute(world.recipe(tmp_path / "one", tokens=1_536, save_steps=40))
    assert same(tmp_path / "multi_gpu" / "out", tmp_path / "use_fsdp" / "out")
    assert apart(tmp_path / "multi_gpu" / "out", tmp_path / "one", Path(world.model)) < 0.01


def apart(run: Path, other: Path, source: Path) -> float:
    """How far two runs' weights are from each other, as a share of the way that the other went from the source."""
    mine, theirs, before = (load_file(d / "model.safetensors") for d in (run, other, source))
    differ = sum(float((mine[n] - theirs[n]).float().square().sum()) for n in theirs)
    return math.sqrt(differ / sum(float((theirs[n] - before[n]).float().square().sum()) for n in theirs))


def test_a_base_model_needs_a_template_and_is_exported_with_it(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if name.endswith("jinja"):
            (base / name).unlink()
        else:
            config = json.loads((base / name).read_text())
            config.pop("chat_template", None)
            (base / name).write_text(json.dumps(config))
    chats = write_rows(tmp_path / "chat.jsonl", chat_rows(60, 7))
    settings: dict[str, Any] = {
        "model_name_or_path": str(base), "datasets": [{"path": chats}], "strategy": "full", "calibration": None, "sequence_length": 128,
    }  # fmt: skip
    with pytest.raises(AddlangError, match=r"no chat template(.|\n)*chat_template: alpaca"):
        execute(world.recipe(tmp_path / "without", **settings))
    out = execute(world.recipe(tmp_path / "with", chat_template="alpaca", **settings))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### Instruction:\nHi\n\n### Response:\n"
