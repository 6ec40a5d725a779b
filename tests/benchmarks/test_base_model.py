"""The base model's benchmark: data, order of training, resume, the finished directory and its parts."""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "base_model"
WORDS = ("the", "king", "sea", "old", "house", "and", "walked", "to", "his", "daughter", "saw", "a", "ship", "was")


def load(name: str) -> Any:
    """A script of the benchmark; they import each other by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


prepare, streams, train, join, study_data = (
    load(name) for name in ("prepare", "streams", "train", "join", "study_data")
)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of a corpus laid out as the real one."""
    corpus = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(n)) + "."

    for i, name in enumerate(("en_public_domain.01", "en_public_domain.02", "en_open_licence", "en_noncommercial")):
        licence = "CC BY-NC-SA 4.0" if name == "en_noncommercial" else "public domain"
        rows = [{"text": f"{name} {text(40)}", "license": licence} for _ in range(400)]
        write(corpus / "english" / f"{name}.jsonl", rows if i else [{"text": "a <|end|> b", "license": licence}, *rows])
    write(
        corpus / "instructions" / "en_instructions.01.jsonl",
        [
            {
                "instruction": f"Say {text(3)}",
                "input": text(4) if i % 2 else "",
                "output": text(5),
                "license": "MIT" if i % 4 else "CC BY-NC 4.0",
            }
            for i in range(400)
        ],
    )
    for language in (*prepare.LANGUAGES, *prepare.TRACE_LANGUAGES):
        rows = [{"text": f"ሀሁ ñ {language} {text(4)}", "license": "CC0"} for _ in range(3)]
        write(corpus / "text" / f"{language}.jsonl", rows)
    output = corpus / "data.npz"
    prepare.main(["--corpus", str(corpus), "--output", str(output), "--vocabulary", "400"])
    return output


def run(data: Path, output: Path, *more: str, steps: int = 20) -> None:
    train.main(
        ["--data", str(data), "--preset", "tiny", "--steps", str(steps), "--threads", "1", "--logging_steps", "5",
         "--output", str(output), *more]
    )  # fmt: skip


def test_prepared_data_hold_what_they_should(data: Path) -> None:
    from tokenizers import Tokenizer

    prepared = streams.Prepared.load(data)
    core = Tokenizer.from_str(prepared.tokenizer)
    end, user = core.token_to_id(prepare.END), core.token_to_id(prepare.USER)
    assert (prepared.chat[prepared.starts[:-1]] == user).all()
    before = prepared.starts[:-1] + prepared.answers - 1
    assert (prepared.chat[before] == core.token_to_id(prepare.ASSISTANT)).all()
    assert (prepared.chat[prepared.starts[1:] - 1] == end).all()
    facts = prepared.facts
    assert facts["prose"]["documents"] + facts["trace"]["documents"] == int((prepared.prose == end).sum())
    assert set(facts["prose"]["bytes_by_licence"]) == {"public domain"}
    assert set(facts["instructions"]["bytes_by_licence"]) == {"MIT", "CC BY-NC 4.0"}
    text = core.decode(prepared.prose.tolist())
    assert "a <end> b" in text  # text is never a special token
    assert all(held not in text for held in prepared.heldout["texts"]["en"])
    assert len(prepared.heldout["texts"]["en"]) > 0


def test_a_chat_row_carries_loss_on_answers(data: Path) -> None:
    prepared = streams.Prepared.load(data)
    chats = streams.Chats(prepared, 128, seed=0, pad=0)
    tokens, labels = chats.rows(0, 30)
    assert tokens.shape == labels.shape == (30, 128)
    carried = labels != streams.NO_LOSS
    assert (labels[carried] == tokens[carried]).all()
    assert not carried[tokens == 0].any()
    share = carried.sum() / (tokens != 0).sum()
    answers = (np.diff(prepared.starts) - prepared.answers).sum() / len(prepared.chat)
    assert answers < share < answers + 2 * streams.USER_SHARE


@pytest.mark.parametrize("kind", ["prose", "chat"])
def test_rows_do_not_depend_on_what_was_read_before(data: Path, kind: str) -> None:
    prepared = streams.Prepared.load(data)

    def make() -> Any:
        if kind == "prose":
            return streams.Prose(prepared.prose, 128, 3)
        return streams.Chats(prepared, 128, seed=3, pad=0)

    in_order = make()
    number = 3 * (in_order.per_epoch if kind == "prose" else 40)
    everything = np.concatenate([in_order.rows(i, 1)[0] for i in range(number)])
    assert (make().rows(number - 7, 7)[0] == everything[-7:]).all()
    epoch = everything[: number // 3]
    assert len(np.unique(epoch, axis=0)) == len(epoch)


def test_schedule() -> None:
    preset = train.PRESETS["5m"]
    plan = train.Plan(steps=1000, second=750, tokens_per_second=1.0)
    rates = [train.rate(preset, step, plan) for step in range(1000)]
    assert rates[0] == pytest.approx(preset.learning_rate / preset.warm_up)
    assert max(rates) == rates[749] == rates[750] == preset.learning_rate
    assert rates[999] == pytest.approx(preset.learning_rate / 250)


def test_plan_fits_the_time_and_the_data(data: Path) -> None:
    prepared, preset = streams.Prepared.load(data), train.PRESETS["tiny"]
    assert train.make_plan(preset, prepared, speed=1024, seconds_left=40, steps=None).steps == 40
    longest = train.make_plan(preset, prepared, speed=1e9, seconds_left=1e6, steps=None)
    assert train.Batches(prepared, preset, 0, 0).epochs(longest)["prose"] == pytest.approx(preset.prose_epochs, rel=0.1)


def test_trains_a_directory_that_loads(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, parts = tmp_path / "model", tmp_path / "parts"
    run(data, output, "--architecture", "olmo2", "--export-parts", str(parts))
    printed = json.loads(capsys.readouterr().out)
    facts = json.loads((output / "train.json").read_text(encoding="utf-8"))
    assert printed == facts
    assert set(facts["bits_per_byte"]) == {"en", *prepare.LANGUAGES}
    assert facts["tokens"] == 20 * 1024
    assert facts["data"]["noncommercial"] == "instructions"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.model_type == "olmo2"
    assert str(model.dtype) == "torch.bfloat16"
    assert model.num_parameters() == facts["parameters"]
    chat = [{"role": "user", "content": "Say ሀ ñ"}, {"role": "assistant", "content": "yes"}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(answer) == "yes<|end|>"
    assert tokenizer.decode(encoded["input_ids"]) == "<|user|>Say ሀ ñ<|end|><|assistant|>yes<|end|>"
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in log] == [5, 10, 15, 20]
    assert log[2]["loss"] < log[0]["loss"] - 0.5
    assert not (tmp_path / "model.partial").exists()

    join.join(parts, tmp_path / "joined")
    for path in output.iterdir():
        assert (tmp_path / "joined" / path.name).read_bytes() == path.read_bytes()


def test_resumes_where_it_was_stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, tmp_path / "whole")
    seen = train.Batches.step

    def stop(self: Any, step: int, plan: Any) -> Any:
        if step == 12:
            raise KeyboardInterrupt
        return seen(self, step, plan)

    monkeypatch.setattr(train.Batches, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "stopped", "--save_minutes", "0")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="other settings"):
        run(data, tmp_path / "stopped", "--seed", "1")
    run(data, tmp_path / "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_a_finished_model_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="not an empty directory"):
        run(data, tmp_path / "model")


def test_damaged_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 100)
    parts = join.split(tmp_path / "model", tmp_path / "parts", part_bytes=10_000)
    assert len(parts) > 3
    assert all(part.stat().st_size <= 10_000 for part in parts)
    parts[1].write_bytes(b"x")
    with pytest.raises(SystemExit, match="damaged"):
        join.join(tmp_path / "parts", tmp_path / "joined")
    parts[1].unlink()
    with pytest.raises(SystemExit, match="missing"):
        join.join(tmp_path / "parts", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_reads_the_real_corpus(tmp_path: Path) -> None:
    shared = Path(os.environ.get("ADDLANG_SHARED", ROOT.parent / "shared"))
    corpus = shared / "corpus"
    if not corpus.is_dir():
        pytest.skip(f"no corpus in '{shared}' (ADDLANG_SHARED names the folder that holds it)")
    facts = prepare.prepare(corpus, tmp_path / "data.npz", vocabulary=500, noncommercial="none", limit=20)
    assert facts["vocabulary"] == 500
    assert not any("NC" in name for part in ("prose", "instructions") for name in facts[part]["bytes_by_licence"])


def test_files_of_a_study_are_the_base_models_own_and_what_it_has_not_seen(data: Path, tmp_path: Path) -> None:
    study_data.main(["--data", str(data), "--corpus", str(data.parent), "--output", str(tmp_path)])
    rows = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in tmp_path.glob("*.jsonl")
    }
    assert set(rows) == {*study_data.LANGUAGES, "chat", "english", "english-chat"}
    assert sorted(row["text"] for row in rows["ha"]) == sorted(
        json.loads(line)["text"]
        for line in (data.parent / "text" / "ha.jsonl").read_text(encoding="utf-8").splitlines()
    )
    prepared = streams.Prepared.load(data)
    held = {study_data.turns(*chat)[0]["content"] for chat in prepared.heldout["chats"]}
    seen = {chat["messages"][0]["content"] for chat in rows["chat"]}
    assert seen
    assert held
    assert not seen & held
    assert all(question.startswith("Say ") and "<|" not in question for question in seen | held)
    assert {chat["messages"][0]["content"] for chat in rows["english-chat"]} <= held
    assert len(rows["english"]) == len(prepared.heldout["texts"]["en"]) + len(rows["english-chat"])
