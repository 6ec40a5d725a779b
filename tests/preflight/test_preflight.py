"""The parts of a preflight against what they should find, and the whole of it through the command line."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer
from typer.testing import CliRunner

from addlang.cli import app
from addlang.lab import lab_model_path
from addlang.models import load_tokenizer
from addlang.preflight.answers import answers
from addlang.preflight.conflict import gradient_conflict
from addlang.preflight.forecast import forecast, shipped
from addlang.preflight.form import compare_forms, form_of
from addlang.preflight.probe import Probe, run_probe
from addlang.preflight.run import (
    Method,
    Settings,
    alternatives,
    audit_model,
    candidate,
    preflight,
    prepare_flight,
    target_text,
)
from addlang.preflight.tokens import byte_characters, fit_of
from addlang.preflight.watch import Reading, Watched, collate, read, watched
from addlang.report.preflight import preflight_html, sections
from addlang.schema import Calibration
from tinyrun import World, chat_rows, without_weights, write_rows


def rows(*sequences: list[int]) -> Watched:
    return Watched((collate([(s, [0, *[1] * (len(s) - 1)]) for s in sequences]),), "ids")


def test_a_reading_is_the_models_log_probability_of_every_watched_token() -> None:
    model, ids = make_model("llama"), [7, 8, 9, 10]
    found = read(model, rows(ids, [11, 12]))
    with torch.inference_mode():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    expected = [float(logp[t, ids[t + 1]]) for t in range(3)]
    assert found.logp[:3] == pytest.approx(expected, abs=1e-5)
    assert len(found.logp) == 4
    assert found.loss == pytest.approx(-found.logp.mean())


@pytest.mark.parametrize("name", ["ssu", "hft", "layers", "lota", "s2ft", "spectrum", "lora", "adalora", "gmt"])
def test_a_16_bit_checkpoint_is_probed_in_the_precision_of_training(name: str, world: World, tmp_path: Path) -> None:
    """As on every GPU: what is frozen stays in 16 bits, what is trained gets masters, and products need autocast."""
    options = {"layers": {"freeze": "0"}, "lota": {"warmup_steps": 2}}.get(name, {})
    recipe = world.recipe(tmp_path / "out", strategy={"name": name, **options}, precision="bf16", learning_rate=1e-12)
    flight = prepare_flight(recipe, Settings(), None)
    given = (flight.phase, flight.source, flight.tokenizer, flight.data, flight.text)
    found = run_probe(recipe, *given, device=torch.device("cpu"), steps=6)
    assert [step for step, _ in found.losses] == [0, 1, 3, 6]
    # nothing moves at this rate, so all that could change is precision
    assert [loss for _, loss in found.losses] == pytest.approx([found.before.loss] * 4, abs=2e-6)


def test_conversations_without_an_answer_are_not_watched(tmp_path: Path) -> None:
    talks = chat_rows(6, 3)
    file = write_rows(tmp_path / "c.jsonl", [{"messages": row["messages"][: 1 + i % 2]} for i, row in enumerate(talks)])
    calibration = Calibration.model_validate({"datasets": [{"path": file}]})
    found = watched(calibration, make_tokenizer(), language="en", sequence_length=96, base_dir=None)
    assert found.source == f"{file} (3)"


def test_gradients_agree_with_themselves_and_oppose_their_negation() -> None:
    model = make_model("llama")
    text = rows([7, 8, 9, 10, 11], [20, 21, 22])
    same = gradient_conflict(model, text.batches, text)
    assert same.cosine == pytest.approx(1.0)
    assert same.push == pytest.approx(1.0)
    assert set(same.groups) >= {"q_proj", "down_proj", "embed_tokens", "lm_head"}
    assert all(p.grad is None for p in model.parameters())
    other = gradient_conflict(model, rows([30, 31, 32, 33]).batches, text)
    assert -1 <= other.cosine < 0.9


def test_the_cosine_is_that_of_plain_autograd() -> None:
    model = make_model("mistral")
    a, b = rows([7, 8, 9, 10, 11]), rows([40, 41, 42, 43])
    flat = []
    for text in (a, b):
        twin = copy.deepcopy(model)
        batch = text.batches[0]
        twin(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        flat.append(torch.cat([p.grad.flatten() for p in twin.parameters()]).double())
    expected = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    assert gradient_conflict(model, a.batches, b).cosine == pytest.approx(expected, abs=1e-5)


def test_the_tokenizers_fit_tells_pieces_of_characters_from_whole_ones() -> None:
    tokenizer = load_tokenizer(lab_model_path())
    english, ethiopic = fit_of(tokenizer, ["The cat likes rice."]), fit_of(tokenizer, ["ሰላም ለዓለም"])
    assert english.fragments == 0.0
    assert ethiopic.fragments > 0.8
    assert ethiopic.tokens_per_character > 2
    assert english.tokens_per_word is not None
    assert english.tokens_per_word < 3
    assert fit_of(tokenizer, ["今日は天気がいいですね"]).tokens_per_word is None
    assert len(set(byte_characters().values())) == 256


def test_bytes_of_a_fallback_vocabulary_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallback:
        unk_token_id, all_special_ids = 0, (0,)
        vocabulary = {"<unk>": 0, "<0xE1>": 1, "<0x88>": 2, "<0x0A>": 3, "▁a": 4}  # noqa: RUF012
        backend_tokenizer = make_tokenizer().backend_tokenizer

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": {"a\n": [4, 3], "ሀ": [1, 2], "?": [0]}[text]}

    monkeypatch.setattr("addlang.preflight.tokens._is_byte_level", lambda _: False)
    assert fit_of(Fallback(), ["a\n"]).fragments == 0.0
    assert fit_of(Fallback(), ["ሀ"]).fragments == pytest.approx(2 / 3)
    assert fit_of(Fallback(), ["?"]).unknown == 1.0


@pytest.mark.parametrize(
    ("reply", "form"),
    [("Paris", "one word"), ("It is Paris.", "one line"), ("- a b\n- c d", "list"), ("1. a\n2. b", "list"),
     ('{"a": 1}', "JSON or code"), ("```py\nx\n```", "JSON or code"), ("a b\nc d", "several lines"), ("{a", "one word")],
)  # fmt: skip
def test_the_form_of_a_reply(reply: str, form: str) -> None:
    assert form_of(reply) == form


def test_the_overlap_of_forms_is_one_minus_the_total_variation() -> None:
    found = compare_forms(["a", "a b"], ["a", "a", "a b", "- x y\n- z w"])
    assert found.overlap == pytest.approx(0.75)
    assert compare_forms(["a"], ["b"]).overlap == 1.0
    judged = compare_forms(["This is a plain sentence about the weather."], ["a"])
    assert (judged.model_judged, judged.data_judged) == (1, 0)
    assert judged.model_languages == {"en": 1.0}


@pytest.mark.usefixtures("offline")
def test_a_preflight_of_a_tiny_run_measures_every_part_and_changes_nothing(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "run", strategy="full", learning_rate=1e-3)
    before = {p: p.read_bytes() for p in sorted(Path(world.model).iterdir())}
    result = preflight(
        recipe, Settings(encoder=None, probe_steps=4, compare=(Method("ssu", {"ratio": 0.75}),), rates=(1.0, 0.5))
    )
    assert [len(result["probes"]), result["probes"][0]["label"]] == [4, "full"]
    assert [p["learning_rate"] for p in result["probes"]] == [1e-3, 5e-4, 1e-3, 5e-4]
    assert all(p["forecast"]["lost"] is None for p in result["probes"]), "probes of 4 steps say nothing"
    assert any("probes of 32" in line for line in result["probes"][0]["forecast"]["why"])
    assert result["probes"][0]["shift"] > result["probes"][1]["shift"] > 0, "half the rate changes less"
    assert {s["role"] for s in result["model"]["scores"]} == {"source", "target"}
    assert result["data"]["sources"][0]["tokens"] > 0
    assert result["plan"]["seconds"] > 0
    assert result["similarity"]["forms"] is None
    assert any("raw text" in note for note in result["notes"])
    assert "guess" in " ".join(result["advice"]["reasons"])
    assert [c["what"] for c in result["advice"]["choices"]] == ["strategy", "ratio", "learning rate"]
    said = {a["question"].split()[0]: a["answer"] for a in result["answers"]}
    assert said == {"Can": "yes", "Are": "yes", "Does": "yes", "Is": "cannot tell"}
    assert {p: p.read_bytes() for p in sorted(Path(world.model).iterdir())} == before
    assert not (tmp_path / "run").exists()
    json.dumps(result, allow_nan=False)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("given", [False, True])
def test_held_out_conversations_are_measured_and_watched_by_their_answers(
    world: World, tmp_path: Path, given: bool
) -> None:
    own = write_rows(tmp_path / "own.jsonl", chat_rows(5, 9)) if given else None
    evaluation = {"holdout": 0.4, "replies": None} | ({"target_datasets": [{"path": own}]} if given else {})
    changes = {"datasets": [{"path": world.chat}], "sequence_length": 128, "evaluation": evaluation}
    flight = prepare_flight(world.recipe(tmp_path / "run", **changes), Settings(encoder=None), None)
    chats = [messages for _, messages in flight.heldout[1]]
    assert len(chats) == (5 if given else 8)
    batch = target_text(flight).batches[0]
    assert len(batch["labels"]) == len(chats)
    for messages, ids, labels in zip(chats, batch["input_ids"], batch["labels"], strict=True):
        answer = flight.tokenizer(messages[1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
        assert labels[labels != -100].tolist() == answer, "nothing of the question is watched"
        assert flight.tokenizer.decode(ids).startswith("<|user|>")
    scores = audit_model(flight, {})["scores"]
    assert {"bits_per_byte", "answer_bits_per_byte"} == {r["metric"] for r in scores if r["role"] == "target"}


@pytest.mark.usefixtures("offline")
def test_what_is_compared_has_its_own_guards_and_guards_have_a_forecast_of_their_own(
    world: World, tmp_path: Path
) -> None:
    recipe = world.recipe(
        tmp_path / "run", strategy="full", learning_rate=1e-3, guards=[{"name": "l2sp", "weight": 0.1}]
    )
    methods = (Method("full"), Method("ssu", {}, (("l2sp", {}),)), Method("full", {}, (("l2sp", {"weight": 0.1}),)))
    flight = prepare_flight(recipe, Settings(compare=methods), None)
    planned = alternatives(flight)
    assert [label for label, _ in planned] == ["full + l2sp, weight 0.1", "full", "ssu + l2sp"]
    probe = Probe(32, ((0, 1.0), (16, 1.1), (32, 1.2)), *(Reading(np.full(4, -v), np.ones(4, bool)) for v in (1.0, 1.2)),
                  (3.0, 2.0), 0.5, 0.1, 0.01, 3.2)  # fmt: skip
    for label, phase in planned:
        found = candidate(flight, label, phase, probe, {})
        row = {"log_probe_shift": math.log10(0.2), "log_probe_loss": math.log10(0.2), "log_probe_growth": 0.0, "probe_steps": 32.0,
               "log_steps_left": math.log10(flight.data.sequences // flight.data.batch_size / 32)}  # fmt: skip
        want = forecast(row, shipped(held=label != "full"), parameters=flight.parameters)
        assert (found.forecast.lost, found.forecast.high) == pytest.approx((want.lost, want.high)), label
        assert found.strategy == {"full": "full"}.get(label, f"{phase.strategy.name} + l2sp")


@pytest.mark.usefixtures("offline")
def test_without_weights_the_tokenizer_the_data_and_the_memory_are_looked_at_and_the_rest_is_said(
    world: World, tmp_path: Path
) -> None:
    bare = without_weights(world.model, tmp_path / "bare")
    recipe = world.recipe(tmp_path / "run", strategy="full", model_name_or_path=str(bare))
    result = preflight(recipe, Settings(compare=(Method("ssu"),)))
    assert result["model"]["scores"] == []
    assert result["model"]["tokenizer"]["target"]["tokens_per_word"] > 1
    assert result["plan"]["memory"]["total"] > 0
    assert (result["conflict"], result["probes"], result["advice"]["candidate"]) == (None, None, None)
    assert "No probe was run" in result["advice"]["reasons"][0]
    assert next(n for n in result["notes"] if "has no weights" in n).startswith("Scores: not measured")
    said = {a["question"].rsplit(" ", 1)[-1]: a["answer"] for a in result["answers"]}
    assert (said["language?"], said["plan?"], said["them?"], said["planned?"]) == (
        "yes",
        "yes",
        "cannot tell",
        "cannot tell",
    )
    html = preflight_html(result)
    assert "Can it be done?" in html
    assert html.count("Not measured; see the notes.") == 3


@pytest.mark.usefixtures("offline")
def test_a_model_that_is_too_large_for_the_device_is_not_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("addlang.train.memory.device_memory", lambda _: 1000)
    monkeypatch.setattr("addlang.models.load_model", refuse)
    result = preflight(world.recipe(tmp_path / "run", strategy="full"), Settings())
    assert any("GiB of memory are needed (4 bytes per parameter)" in note for note in result["notes"])
    assert {a["question"].rsplit(" ", 1)[-1]: a["answer"] for a in result["answers"]}["memory?"] == "no"


@pytest.mark.usefixtures("offline")
def test_without_a_chat_template_what_needs_one_is_not_probed_and_the_rest_is(world: World, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in Path(world.model).iterdir():
        if file.name == "tokenizer_config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("chat_template", None)
            (plain / file.name).write_text(json.dumps(config), encoding="utf-8")
        elif file.name != "chat_template.jinja":
            (plain / file.name).symlink_to(file)
    recipe = world.recipe(
        tmp_path / "run", strategy="full", model_name_or_path=str(plain),
        calibration={"datasets": [{"path": world.english, "role": "source"}], "sequences": 4, "sequence_length": 32},
    )  # fmt: skip
    settings = Settings(encoder=None, probe_steps=2, compare=(Method("self_anchor"), Method("hft")))
    result = preflight(recipe, settings)
    assert [p["label"] for p in result["probes"]] == ["full", "hft"]
    assert any("watched as plain text" in n for n in result["notes"])
    assert any(n.startswith("self_anchor: not probed.") and "no chat template" in n for n in result["notes"])


@pytest.mark.usefixtures("offline")
def test_a_method_that_needs_too_much_memory_is_noted_and_the_others_are_probed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("addlang.guards.l2sp._Active.begin", full)
    methods = (Method("full", {}, (("l2sp", {}),)), Method("hft"))
    result = preflight(
        world.recipe(tmp_path / "run", strategy="full"), Settings(encoder=None, probe_steps=2, compare=methods)
    )
    assert [p["label"] for p in result["probes"]] == ["full", "hft"]
    assert any(n.startswith("full + l2sp: not probed. memory ran out in phase 'adapt'") for n in result["notes"])


@pytest.mark.usefixtures("offline")
def test_a_method_that_a_recipe_would_refuse_is_noted_and_not_probed(world: World, tmp_path: Path) -> None:
    twice = Method("self_anchor", {}, (("self_anchor", {}),))
    methods = (Method("hft"), Method("full", {}, (("l2sp", {}),)), twice)
    recipe = world.recipe(tmp_path / "run", strategy="full", no_previous_weights=True)
    result = preflight(recipe, Settings(encoder=None, probe_steps=2, compare=methods))
    assert [p["label"] for p in result["probes"]] == ["full", "hft"]
    assert any(n.startswith("full + l2sp: not probed. no_previous_weights: 'l2sp' holds") for n in result["notes"])
    free = world.recipe(tmp_path / "run", strategy="full")
    notes = preflight(free, Settings(encoder=None, probe_steps=2, compare=(twice,)))["notes"]
    assert any(n.startswith("self_anchor + self_anchor: not probed. strategy 'self_anchor' brings") for n in notes)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("probed", [True, False])
def test_what_is_said_about_the_plan_rests_on_the_probe_of_the_planned_setting_alone(
    probed: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if not probed:
        monkeypatch.setattr("addlang.guards.l2sp._Active.begin", full)
    recipe = world.recipe(tmp_path / "run", strategy="full", guards=["l2sp"])
    result = preflight(recipe, Settings(encoder=None, probe_steps=2, compare=(Method("hft"),)))
    said = {s.title: s for s in sections(result)}
    labels = [row[0] for row in said["Forecast of what is lost"].tables[0].rows]
    learns, kept = result["answers"][2:4]
    if probed:
        assert labels == ["planned: full + l2sp", "hft"]
        assert [p["planned"] for p in result["probes"]] == [True, False]
        assert result["plan"]["seconds"] == result["plan"]["steps"] * result["probes"][0]["seconds_per_step"]
        assert learns["why"].startswith("in 2 steps as planned the loss")
    else:
        assert labels == ["hft"]
        assert [p["planned"] for p in result["probes"]] == [False]
        assert result["plan"]["seconds"] is None
        why = "the planned setting was not probed: memory ran out in phase 'adapt'"
        for answer in (learns, kept):
            assert answer["answer"] == "cannot tell"
            assert answer["why"].startswith(why)
        assert any("was not probed: memory ran out" in line for line in said["Forecast of what is lost"].lines)


def card(**changes: object) -> dict[str, object]:
    return {"sources": [{"path": "x", "role": "target", "tokens": 1000, "epochs": 1.0, **changes}]}


def test_every_question_has_an_answer_of_its_own() -> None:
    fit = {"unknown": 0.0, "fragments": 0.0, "tokens_per_word": 2.0}
    said = {"lost": 0.02, "low": 0.0, "high": 0.06, "why": []}
    good = {
        "model": {"tokenizer": {"source": fit, "target": fit}}, "data": card(), "settings": {"keep": 0.97, "probe_steps": 32},
        "probes": [{"gained": 0.5, "forecast": said, "planned": True}],
        "plan": {"memory": {"total": 2**30}, "available": 2**31, "device": "CPU"},
    }  # fmt: skip

    def answer(number: int, **changes: object) -> str:
        return answers({**good, **changes})[number]["answer"]

    def tokenizer(**changes: float) -> dict[str, object]:
        return {"tokenizer": {"source": fit, "target": {**fit, **changes}}}

    assert [answer(i) for i in range(5)] == ["yes", "yes", "yes", "cannot tell", "yes"]
    assert answer(0, model=tokenizer(unknown=0.01)) == "no"
    assert answer(0, model=tokenizer(fragments=0.9)) == "at a price"
    assert answer(0, model=tokenizer(tokens_per_word=6.0)) == "at a price"
    assert (
        answer(0, model=None) == answer(1, data=None) == answer(2, probes=[]) == answer(4, plan=None) == "cannot tell"
    )
    assert answer(1, data=card(epochs=20.0)) == "no"
    assert "--tokens 4000" in answers({**good, "data": card(epochs=20.0)})[1]["why"]
    assert answer(2, probes=[{"gained": -0.1, "forecast": said, "planned": True}]) == "no"
    assert answer(3, probes=[{"gained": 1, "forecast": {**said, "high": 0.03}, "planned": True}]) == "yes"
    assert answer(3, probes=[{"gained": 1, "forecast": {**said, "low": 0.04}, "planned": True}]) == "no"
    assert answer(4, plan={**good["plan"], "available": 2**29}) == "no"  # type: ignore[dict-item]


@pytest.mark.usefixtures("offline")
def test_the_command_prints_tables_and_writes_a_page(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = str(world.chat)
    words = ["preflight", world.model, chat, "--language", "sw", "--compare", "none", "--rates", "1", "--encoder", "none",
             "--probe_steps", "2", "--tokens", "512", "--sequence_length", "256", "--batch_size", "1", "--strategy", "full",
             "--holdout", "0.2", "--calibration.datasets", f"[{{path: {chat}, role: source}}]", "--replies", "null",
             "--output", "pages/preflight.html"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    for part in (
        "Recommendation",
        "Can it be done?",
        "Gradient conflict",
        "Memory and time",
        "tokens per word",
        "cannot tell",
    ):
        assert part in done.stdout
    page = (tmp_path / "pages" / "preflight.html").read_text(encoding="utf-8")
    assert "Preflight: Swahili" in page
    assert not re.search(r'(src|href)="https?:', page)
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert data["settings"]["probe_steps"] == 2


def test_wrong_arguments_name_their_remedy(tmp_path: Path) -> None:
    def error(*words: str) -> str:
        return str(CliRunner().invoke(app, ["preflight", *words]).exception)

    assert "no DATA" in error("lab")
    assert "--language" in error("lab", "lab://sw")
    assert "Did you mean 'full'" in error("lab", "lab://sw", "--language", "sw", "--compare", "ful")
    assert "NAME:KEY=VALUE" in error("lab", "lab://sw", "--language", "sw", "--compare", "ssu:ratio")
    assert "Did you mean 'ewc'" in error("lab", "lab://sw", "--language", "sw", "--compare", "full+ewk")
    assert "'weigth'" in error("lab", "lab://sw", "--language", "sw", "--compare", "full+ewc:weigth=3")
    (tmp_path / "folder").mkdir()
    assert "is a directory" in error("lab", "lab://sw", "--language", "sw", "--output", str(tmp_path / "folder"))
    assert "'x' is no multiple" in error("lab", "lab://sw", "--language", "sw", "--rates", "x")
