"""Replay: which rows, whose answers, what is dropped, and that a killed process goes on where it stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from addlang.data import replay as module
from addlang.data.chat import encode_conversation
from addlang.data.inspect import Inspected
from addlang.data.replay import Pool, english_replay, generative_replay, judged, off_language, prompt_of
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate import generation
from addlang.lab import lab_model_path
from addlang.lab.world import conversations
from addlang.models import load_model, load_tokenizer
from addlang.recipe import Recipe
from addlang.run import execute
from addlang.rundir import read_state
from addlang.schema import Phase
from tinyrun import Killed, dying_at, same, write_rows

L = 128


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    return load_model(lab_model_path()).float(), load_tokenizer(lab_model_path())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{"messages": m} for m in conversations("english", 120, 5)]


@pytest.fixture
def phase(rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Phase]:
    def make(rows: list[dict[str, Any]] = rows, name: str = "rows.jsonl", **replay: Any) -> Phase:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = {
            "kind": "generative",
            "datasets": [{"path": str(path)}],
            "batch_size": 8,
            "max_new_tokens": 40,
            **replay,
        }
        return Phase(datasets=[{"path": "x"}], strategy="full", sequence_length=L, replay=settings)

    return make


def pool_of(phase: Phase, exclude: Sequence[str] = ()) -> Pool:
    """Nothing is looked for in the rows."""
    assert phase.replay is not None
    return Pool(phase.replay, exclude, None, lambda rows, _: Inspected(list(rows), [""] * len(rows), {}))  # type: ignore[arg-type]


def texts(rows: Any) -> list[str]:
    return [row.messages[-1]["content"] for row in rows]


def generate(
    phase: Phase, lab: tuple[Any, Any], cache: Path, wanted: int = 500, load: Any = None, behaviour: str = "b"
) -> Any:
    pool = pool_of(phase)
    return generative_replay(
        pool, wanted, lab[1], phase=phase, language="en", model_hash="h", behaviour=behaviour, load=load or (lambda: lab[0]),
        cache_dir=cache, progress=lambda *_: None,
    )  # fmt: skip


# ---- which rows


def test_the_order_depends_on_content_and_seed_and_not_on_the_file(phase: Any, rows: Any) -> None:
    order = [r.content for r in pool_of(phase()).ordered()]
    turned = [r.content for r in pool_of(phase(rows[::-1], "turned.jsonl")).ordered()]
    other = [r.content for r in pool_of(phase(seed=1)).ordered()]
    assert order == turned
    assert sorted(order) == sorted(other)
    assert order != other


def test_every_row_comes_once_however_often_the_file_is_read(
    phase: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [r.content for r in pool_of(phase()).ordered()]
    monkeypatch.setattr(module, "FIRST", 5)
    assert [r.content for r in pool_of(phase()).ordered()] == whole
    assert len(set(whole)) == len(whole) == len({json.dumps(r) for r in rows})


def test_english_replay_has_the_rows_own_responses_and_about_the_tokens_asked_for(
    phase: Any, rows: Any, lab: Any, tmp_path: Path
) -> None:
    p = phase(kind="english")
    pool = pool_of(p)
    packed = english_replay(pool, 600, lab[1], phase=p, cache_dir=tmp_path)
    assert 600 <= packed.tokens_total < 600 + L
    known = {tuple(encode_conversation(r["messages"], lab[1], loss_on="responses")[0]) for r in rows}
    bounds = [*packed.documents.tolist(), packed.tokens_total]
    drawn = {tuple(packed.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)}
    assert drawn <= known
    less = english_replay(pool, 300, lab[1], phase=p, cache_dir=tmp_path)
    bounds = [*less.documents.tolist(), less.tokens_total]
    assert {tuple(less.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)} < drawn


def test_evaluation_text_is_not_replayed(phase: Any, rows: Any) -> None:
    secret = "\n".join(m["content"] for m in rows[3]["messages"])
    assert secret in [r.content for r in pool_of(phase()).ordered()]
    assert secret not in [r.content for r in pool_of(phase(), [secret]).ordered()]


def test_too_little_to_replay_is_said(phase: Any, rows: Any, lab: Any, tmp_path: Path) -> None:
    p = phase(rows[:10], kind="english")
    with pytest.warns(AddlangWarning, match=r"has \d+ tokens instead of 5,000: it is passed over more often"):
        english_replay(pool_of(p), 5000, lab[1], phase=p, cache_dir=tmp_path)


# ---- whose answers


def test_the_model_answers_the_prompts(phase: Any, rows: Any, lab: Any, tmp_path: Path) -> None:
    packed, about, kept = generate(phase(), lab, tmp_path)
    prompts = {r["messages"][0]["content"]: r["messages"][1]["content"] for r in rows}
    assert len(kept) == about["kept"] == packed.meta["documents"] > 10
    assert about["prompts"] == about["kept"] + sum(about["dropped"].values())
    assert about["decoding"] == {"decoding": "greedy", "max_new_tokens": 40, "batch_size": 8}
    assert all(r.messages[0]["content"] in prompts for r in kept)
    right = sum(r.messages[1]["content"] == prompts[r.messages[0]["content"]] for r in kept)
    assert len(kept) > right > len(kept) // 2  # its own answers, most of which are right
    assert 500 <= packed.tokens_total < 500 + L


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_killed_while_answering_it_goes_on_with_the_next_block(
    settings: dict[str, Any], phase: Any, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = phase(**settings)
    whole = generate(p, lab, tmp_path / "whole")
    name = "sample" if settings else "greedy"
    original = getattr(generation, name)
    monkeypatch.setattr(generation, name, dying_at(3, original, Killed()))
    with pytest.raises(Killed):
        generate(p, lab, tmp_path / "killed")
    calls: list[int] = []

    def counting(model: Any, tokenizer: Any, prompts: Any, **kw: Any) -> Any:
        calls.append(len(prompts))
        return original(model, tokenizer, prompts, **kw)

    monkeypatch.setattr(generation, name, counting)
    again = generate(p, lab, tmp_path / "killed")
    assert texts(again[2]) == texts(whole[2])
    assert again[1] == whole[1]
    assert len(calls) == -(-whole[1]["prompts"] // 8) - 2  # two blocks were answered before


def test_a_larger_share_goes_on_where_a_smaller_one_ended(phase: Any, lab: Any, tmp_path: Path) -> None:
    p = phase()
    small = generate(p, lab, tmp_path, wanted=200)
    large = generate(p, lab, tmp_path, wanted=600)
    assert texts(large[2])[: len(small[2])] == texts(small[2])
    assert len(list((tmp_path / "replay").glob("*.jsonl"))) == 1
    never = lambda: pytest.fail("all answers are there")  # noqa: E731
    assert texts(generate(p, lab, tmp_path, wanted=200, load=never)[2]) == texts(small[2])


def test_the_same_weights_under_another_configuration_are_asked_again(phase: Any, lab: Any, tmp_path: Path) -> None:
    p = phase()
    for behaviour in ("b", "b", "another"):
        generate(p, lab, tmp_path, wanted=100, behaviour=behaviour)
    assert len(list((tmp_path / "replay").glob("*.jsonl"))) == 2


@pytest.mark.parametrize("change", [{"max_new_tokens": 30}, {"temperature": 0.5}, {"seed": 3}])
def test_other_settings_are_other_answers(change: dict[str, Any], phase: Any, lab: Any, tmp_path: Path) -> None:
    generate(phase(), lab, tmp_path, wanted=100)
    generate(phase(**change), lab, tmp_path, wanted=100)
    assert len(list((tmp_path / "replay").glob("*.jsonl"))) == 2


def test_prompts_may_be_raw_text(phase: Any, lab: Any, tmp_path: Path) -> None:
    p = phase([{"text": f"Count the words: {w}"} for w in ("cat dog", "red hat lamp")], "prompts.jsonl")
    with pytest.warns(AddlangWarning, match="instead of 500"):
        _, _, kept = generate(p, lab, tmp_path)
    assert sorted(texts(kept)) == ["2", "3"]


def test_no_usable_answer_is_an_error_with_the_reasons(phase: Any, lab: Any, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"none of \d+ answers can be used \(dropped: \{'truncated': \d+\}\)"):
        generate(phase(max_new_tokens=1), lab, tmp_path)


# ---- what is dropped


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The cat sat on the mat.", None),
        ("", "empty"),
        ("cat " * 200, "truncated"),
        ("Mbuzi hula nyasi kila siku na hunywa maji ya mto asubuhi na jioni.", "another language"),
        ("lamp shirt tomato cup", None),
        (None, "prompt too long"),
    ],
)
def test_answers_are_dropped_for_a_reason(answer: str | None, reason: str | None, phase: Any, lab: Any) -> None:
    tokenizer = lab[1]
    p = phase(max_new_tokens=100)
    ids = None if answer is None else tokenizer(answer, add_special_tokens=False)["input_ids"][:100]
    row = Row(None, [{"role": "user", "content": "Say something."}], "f", 1)
    assert judged(row, prompt_of(row), ids, tokenizer, p, "en")["dropped"] == reason


def test_a_control_token_inside_an_answer_drops_it(phase: Any, lab: Any) -> None:
    row = Row(None, [{"role": "user", "content": "Say something."}], "f", 1)
    ids = [*lab[1]("cat", add_special_tokens=False)["input_ids"], lab[1].all_special_ids[0]]
    assert judged(row, prompt_of(row), ids, lab[1], phase(), "en")["dropped"] == "control token"


def test_the_language_filter_can_be_switched_off(phase: Any, lab: Any) -> None:
    row = Row(None, [{"role": "user", "content": "Say something."}], "f", 1)
    text = "Mbuzi hula nyasi kila siku."
    assert off_language(text + " Ng'ombe hunywa maji ya mto asubuhi na jioni.", "en")
    ids = lab[1](text, add_special_tokens=False)["input_ids"]
    assert judged(row, prompt_of(row), ids, lab[1], phase(language_filter=False), "en")["dropped"] is None


def test_the_prompt_is_the_conversation_up_to_the_first_answer() -> None:
    turns = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]
    assert [m["role"] for m in prompt_of(Row(None, turns, "f", 1))] == ["system", "user"]


# ---- in a run


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["english", "generative"])
def test_a_phase_trains_on_replay_and_resumes_bit_for_bit(
    kind: str, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    english = write_rows(tmp_path / "english.jsonl", rows)
    target = write_rows(tmp_path / "target.jsonl", [{"messages": m} for m in conversations("similar-sw", 80, 6)])

    def recipe(out: str) -> Recipe:
        return Recipe.parse(
            {
                "model_name_or_path": "lab", "language": "sw", "output_dir": str(tmp_path / out), "device": "cpu",
                "datasets": [{"path": target}], "strategy": "ssu", "epochs": 2, "sequence_length": 64, "batch_size": 4,
                "learning_rate": 1e-3, "save_steps": 4, "logging_steps": 1,
                "calibration": {"datasets": [{"path": english, "role": "source"}], "sequences": 8, "sequence_length": 64},
                "replay": {"kind": kind, "datasets": [{"path": english}], "share": 0.2, "max_new_tokens": 40},
                "evaluation": {
                    "target_datasets": [{"path": target, "limit": 4}], "replies": None, "resamples": 100,
                    "source_datasets": [{"path": english, "limit": 4, "role": "source"}],
                },
            }
        )  # fmt: skip

    whole = execute(recipe("whole"))
    card = read_state(whole)["data"]["adapt"]
    own, replayed = card["sources"]
    assert replayed["role"] == "replay"
    assert replayed["replay"]["kind"] == kind
    assert replayed["tokens"] == pytest.approx(0.2 * own["tokens"], rel=0.1)
    assert replayed["trained_tokens"] == pytest.approx(0.2 * own["trained_tokens"], rel=0.15)
    assert card["tokens"] == pytest.approx(2.4 * own["tokens"], rel=0.15)
    assert (whole / "replay.jsonl").is_file() == (kind == "generative")
    text = " ".join((whole / "report.html").read_text().split())
    assert f"Replay ({kind}): 20" in text
    from addlang.train.checkpoint import Writer

    save = Writer.save
    monkeypatch.setattr(Writer, "save", dying_at(3, save, Killed()))
    with pytest.raises(Killed):
        execute(recipe("killed"))
    monkeypatch.setattr(Writer, "save", save)
    assert same(execute(recipe("killed")), whole)
    assert read_state(tmp_path / "killed")["data"] == read_state(whole)["data"]
