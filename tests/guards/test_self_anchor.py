"""The stored teacher, its divergence, and the self anchor's sampling, budget and resume."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

from addlang.errors import AddlangError, AddlangWarning
from addlang.guards import GuardContext, make_guard
from addlang.guards.anchored import rows_at_a_time
from addlang.guards.sampling import turn_frame
from addlang.guards.teacher import RowOrder, Teacher, ask, divergence, model_positions, pack_rows
from addlang.strategies import PlanInputs, make_strategy
from tinyrun import Killed, dying_at

LOOSE = {"max_instruction_tokens": 24, "max_answer_tokens": 24, "attempts": 40}


def context(model: Any, cache: Path, **kw: Any) -> GuardContext:
    settings: dict[str, Any] = {
        "model": model, "model_hash": "h", "tokenizer": make_tokenizer(), "seed": 0, "device": torch.device("cpu"),
        "cache_dir": cache, "language": "en", "sequence_length": 64, "batch": 4, "micro": 4, "steps": 10,
        "autocast": contextlib.nullcontext, "calibration": lambda: None, "progress": lambda *_: None,
        "read_by_guards": 0.3,
    }  # fmt: skip
    return GuardContext(**{**settings, **kw})


def test_divergence_is_the_full_kl_when_every_token_is_stored() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    best = torch.log_softmax(p, -1).topk(7, -1)
    got = divergence(q, best.indices, best.values)
    want = torch.nn.functional.kl_div(
        torch.log_softmax(q, -1), torch.log_softmax(p, -1), log_target=True, reduction="none"
    ).sum(1)
    assert torch.allclose(got, want, atol=1e-12)


def test_divergence_with_one_bucket_for_the_rest_worked_by_hand() -> None:
    """p = (.5, .25, .125, .125) of which two are stored, q = (.25, .25, .25, .25)."""
    logits = torch.zeros(1, 4, dtype=torch.float64)
    ids, logp = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    want = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    assert float(divergence(logits, ids, logp)) == pytest.approx(want, abs=1e-12)


def test_fewer_stored_tokens_never_overstate_the_divergence() -> None:
    torch.manual_seed(1)
    p, q = torch.randn(20, 50, dtype=torch.float64) * 2, torch.randn(20, 50, dtype=torch.float64)
    values = []
    for k in (1, 5, 20, 50):
        best = torch.log_softmax(p, -1).topk(k, -1)
        values.append(divergence(q, best.indices, best.values))
    for fewer, more in itertools.pairwise(values):
        assert bool((fewer <= more + 1e-12).all())


def test_packed_conversations_do_not_see_each_other_and_every_position_predicts_its_own() -> None:
    model = make_model("llama").double()
    conversations = [[7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
    tokens, positions = pack_rows(conversations, 8, 0)
    teacher = ask(
        model, tokens, positions, top_k=300, rows_at_a_time=1, autocast=contextlib.nullcontext, progress=lambda *_: None
    )
    assert teacher.valid.sum() == sum(len(c) - 1 for c in conversations)
    row = 0
    for r in range(len(tokens)):
        for t in np.nonzero(teacher.valid[r])[0]:
            start = t - int(positions[r, t])
            alone = torch.tensor(tokens[r, start : t + 1]).unsqueeze(0)
            want = torch.log_softmax(model(alone).logits[0, -1], -1)
            got = torch.full_like(want, -torch.inf).scatter(
                0, torch.tensor(teacher.ids[row]).long(), torch.tensor(teacher.logp[row]).to(want.dtype)
            )
            assert torch.allclose(got, want, atol=5e-3)  # stored in half precision
            row += 1
    assert row == len(teacher.ids)


def test_padding_positions_restart() -> None:
    assert model_positions(np.array([[0, 1, 2, -1, -1]])).tolist() == [[0, 1, 2, 0, 1]]


def test_rows_of_a_step_are_a_pure_function_of_the_step_and_cover_every_row_once_a_pass() -> None:
    order = RowOrder(7, 1.75, seed=3)
    drawn = np.concatenate([order.at(s) for s in range(1, 5)])
    assert sorted(drawn.tolist()) == list(range(7))
    again = RowOrder(7, 1.75, seed=3)
    assert np.array_equal(again.at(3), order.at(3))
    assert [len(order.at(s)) for s in range(1, 5)] == [1, 2, 2, 2]


class Writer:
    """Stands in for sampling: says what the test tells it to, and remembers what it was asked."""

    def __init__(self, instructions: list[str], answers: list[str], limit: int = 24) -> None:
        self.turns = [instructions, answers]
        self.prompts: list[list[list[int]]] = []
        self.limit = limit

    def __call__(self, _model: Any, tokenizer: Any, prompts: Any, **kw: Any) -> list[list[int]]:
        start = tokenizer(turn_frame(tokenizer).prompt, add_special_tokens=False)["input_ids"]
        turn = self.turns[0 if list(prompts[0]) == start else 1]
        self.prompts.append([list(p) for p in prompts])
        offset = 1000 * (len(self.prompts) // 2)
        out = []
        for i in range(len(prompts)):
            text = turn[i % len(turn)].replace("#", str(offset + i))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            out.append(ids if text != "ENDLESS" else ids[:1] * kw["max_new_tokens"])
        return out


def test_conversations_are_sampled_in_the_chat_template_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    writer = Writer(["the cat #"], ["sat #"])
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    guard = make_guard("self_anchor", {"conversations": 8, **LOOSE})
    active = guard.start(context(model, tmp_path))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    start, end = turn_frame(make_tokenizer()).before, turn_frame(make_tokenizer()).after
    assert make_tokenizer().decode(writer.prompts[0][0]) == start
    assert make_tokenizer().decode(writer.prompts[1][0]) == f"{start}the cat 0{end}"
    text = make_tokenizer().decode(active.teacher.tokens[0].tolist())
    assert text.startswith(f"{start}the cat")
    assert end in text
    calls = len(writer.prompts)
    again = guard.start(context(model, tmp_path))
    assert len(writer.prompts) == calls
    assert np.array_equal(again.teacher.tokens, active.teacher.tokens)


def test_conversations_that_are_read_too_often_are_warned_of_with_the_number_that_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.evaluate.generation.sample", Writer(["the cat ran to #"], ["the hat #"]))
    guard, model = make_guard("self_anchor", {"conversations": 8, **LOOSE}), make_model("llama")
    with pytest.warns(AddlangWarning, match=r"^self_anchor: its 8 conversations are read \d+ times") as caught:
        active = guard.start(context(model, tmp_path, steps=100))
    times, enough = re.findall(r"read (\d+) times.*raise conversations \(with (\d+) it", str(caught[0].message))[0]
    rows = np.concatenate([active.order.at(step) for step in range(1, 101)])
    assert np.bincount(rows).mean() == pytest.approx(int(times), abs=1)
    assert int(enough) == pytest.approx(8 * int(times) / 10, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AddlangWarning)
        guard.start(context(model, tmp_path, steps=100 * 9 // int(times)))


def test_poor_samples_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(["the cat #", "", "the same", "ENDLESS"], ["sat #", "ENDLESS", ""])
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    about = (
        make_guard("self_anchor", {"conversations": 8, **LOOSE})
        .start(context(make_model("llama"), tmp_path))
        .describe()
    )
    dropped = about["sampled_dropped"]
    assert about["sampled_conversations"] == 8
    assert dropped["empty turn"] > 0
    assert dropped["unfinished turn"] > 0
    assert dropped["repeated instruction"] > 0


def test_a_model_that_writes_nothing_usable_is_an_error_with_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.evaluate.generation.sample", Writer(["ENDLESS"], ["x"]))
    with pytest.raises(AddlangError, match=r"only 0 of 8 conversations .*'unfinished turn'"):
        make_guard("self_anchor", {"conversations": 8, **LOOSE}).start(context(make_model("llama"), tmp_path))


def fixed(tmp_path: Path, model: Any, **options: Any) -> Any:
    """An active anchor on conversations written here, so that no sampling is involved."""
    from addlang.guards.anchored import Anchored

    guard = make_guard("self_anchor", options)
    r = np.random.default_rng(0)
    conversations = [r.integers(6, 200, n).tolist() for n in (20, 31, 12, 40, 25)]
    tokens, positions = pack_rows(conversations, 64, 0)
    teacher = ask(
        model, tokens, positions, top_k=64, rows_at_a_time=2, autocast=contextlib.nullcontext, progress=lambda *_: None
    )
    return Anchored(guard, teacher, RowOrder(len(teacher), 1.5, 0), {}, context(model, tmp_path))


def test_the_source_itself_has_no_divergence_and_a_changed_model_has_some(tmp_path: Path) -> None:
    model = make_model("llama")
    active = fixed(tmp_path, model, weight=1.0)
    attached = make_strategy("full", {}).attach(model, make_strategy("full", {}).plan(model, PlanInputs()), "masked")
    assert active.backward(attached, 2) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert active.backward(attached, 2) > 0.01


def test_the_anchors_gradient_pulls_back_to_the_source(tmp_path: Path) -> None:
    model = make_model("llama")
    active = fixed(tmp_path, model, weight=1.0)
    attached = make_strategy("full", {}).attach(model, make_strategy("full", {}).plan(model, PlanInputs()), "masked")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    first = active.backward(attached, 1)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = active.backward(attached, 1)
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("schedule", "first", "last"), [("constant", 0.3, 0.3), ("decay", 0.3, 0.0), ("ramp", 0.0, 0.3)]
)
def test_the_weight_follows_its_schedule(schedule: str, first: float, last: float, tmp_path: Path) -> None:
    active = fixed(tmp_path, make_model("llama"), weight=0.3, schedule=schedule)
    assert active.weight(1) == pytest.approx(first)
    assert active.weight(10) == pytest.approx(last)


def templated(template: str) -> Any:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}User: {{ m['content'] }}{% endfor %}", "no end of a user turn"),
        ("{% for m in messages %}{{ m['content'] }}\nBot:{% endfor %}", "nothing before a user's words"),
        ("{% for m in messages %}<|user|>{{ m['content'] | length }}<|end|>{% endfor %}", "does not keep a user turn"),
    ],
)
def test_a_template_from_which_no_instruction_can_be_sampled_is_refused(template: str, message: str) -> None:
    with pytest.raises(AddlangError, match=f"{message}(.|\n)*guard kl"):
        turn_frame(templated(template))


OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|helper|>\n{{ m['content'] + eos_token }}"
    "{% else %}<|human|>\n{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|helper|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "stop_text", "marks"),
    [
        (OLMO2, "<|bos|><|human|>\n", "\n<|helper|>", ("<|human|>", "<|helper|>")),  # as OLMo 2's: no control tokens
        ("alpaca", "### Instruction:\n", "\n### Response:", ("### Instruction:", "### Response:")),
        ("mistral", "<|bos|>[INST]", "[/INST]", ("[INST]", "[/INST]")),
    ],
)
def test_a_turn_that_ends_in_plain_text_ends_at_that_text_and_not_at_its_first_token(
    template: str, prompt: str, stop_text: str, marks: tuple[str, ...]
) -> None:
    """The first token of OLMo 2's end of turn is a line break: instructions of several lines would be cut, and one that
    ends in a full stop, which forms one token with the line break, would run on into the answer."""
    from addlang.data.builtin_sets import builtin_template

    file = builtin_template(template)
    frame = turn_frame(templated(template if file is None else file.read_text(encoding="utf-8")))
    assert (frame.prompt, frame.stop_text, frame.stop_ids) == (prompt, stop_text, frozenset())
    assert frame.marks == marks
    assert frame.words(f" Sort:\n3, 1, 2.{stop_text}\n1, 2, 3") == ("Sort:\n3, 1, 2.", True)
    assert frame.words("Sort:\n3, 1") == ("Sort:\n3, 1", False)


def test_a_turn_that_ends_in_a_control_token_ends_there() -> None:
    frame = turn_frame(make_tokenizer())
    assert (frame.prompt, frame.stop_ids, frame.stop_text) == ("<|user|>", {make_tokenizer().eos_token_id}, None)


def test_sampling_stops_at_a_text_wherever_its_tokens_end() -> None:
    from addlang.evaluate.generation import sample

    tokenizer, model = make_tokenizer(), make_model("llama")
    settings: dict[str, Any] = {
        "max_new_tokens": 40,
        "batch_size": 4,
        "stop_ids": set(),
        "seed": 3,
        "top_k": 0,
        "top_p": 1.0,
    }
    prompts = [[7, 8], [9, 10], [11, 12], [13, 14]]
    free = sample(model, tokenizer, prompts, **settings)
    text = tokenizer.decode(free[1][9:12])
    stopped = sample(model, tokenizer, prompts, stop_text=text, **settings)
    assert len(stopped[1]) < 40
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == whole[: len(cut)]
        assert (text in tokenizer.decode(cut)) == (text in tokenizer.decode(whole))
        assert text not in tokenizer.decode(cut[:-1])


def test_of_a_plain_text_template_whole_turns_are_kept_and_other_turns_inside_them_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = ["sort these\nplease #\n<|helper|>", "what is # <|human|>\nyes?\n<|helper|>"]
    writer = Writer(says, ["sat #", "sat # <|human|>\nmore"])
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    tokenizer = templated(OLMO2)
    guard = make_guard("self_anchor", {"conversations": 4, **LOOSE, "max_instruction_tokens": 64})
    active = guard.start(context(make_model("llama"), tmp_path, tokenizer=tokenizer))
    about = active.describe()
    assert about["sampled_dropped"]["another turn inside a turn"] > 0
    assert about["sampled_examples"][0] == {"instruction": "sort these\nplease 0", "answer": "sat 1000"}
    assert tokenizer.decode(writer.prompts[1][0]) == "<|bos|><|human|>\nsort these\nplease 0\n<|helper|>\n"


def test_sampling_that_is_killed_goes_on_with_the_turns_that_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(["the cat #", ""], ["sat #"])
    guard = make_guard("self_anchor", {"conversations": 8, **LOOSE})
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    want = guard.start(context(make_model("llama"), tmp_path / "whole")).teacher.tokens
    calls = len(writer.prompts)
    writer.prompts.clear()
    monkeypatch.setattr("addlang.evaluate.generation.sample", dying_at(3, writer, Killed()))
    with pytest.raises(Killed):
        guard.start(context(make_model("llama"), tmp_path / "killed"))
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    got = guard.start(context(make_model("llama"), tmp_path / "killed")).teacher.tokens
    assert np.array_equal(got, want)
    assert len(writer.prompts) == calls


def test_a_cache_without_its_last_file_counts_as_absent(tmp_path: Path) -> None:
    active = fixed(tmp_path, make_model("llama"))
    active.teacher.save(tmp_path / "t", {"rows": 3})
    found = Teacher.load(tmp_path / "t")
    assert found is not None
    assert found[1] == {"rows": 3}
    assert np.array_equal(found[0].logp, active.teacher.logp)
    (tmp_path / "t" / "about.json").unlink()
    assert Teacher.load(tmp_path / "t") is None


def test_skipped_instructions_and_full_openings_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(["sort the words #", "count the fish #", "what is it #"], ["sat #"])
    monkeypatch.setattr("addlang.evaluate.generation.sample", writer)
    options = {"conversations": 8, **LOOSE, "skip": ["^count"], "max_per_opening": 4}
    about = make_guard("self_anchor", options).start(context(make_model("llama"), tmp_path)).describe()
    assert about["sampled_dropped"]["skipped"] > 0
    assert about["sampled_dropped"]["opening that others have"] > 0
    assert (about["sampled_openings"], about["sampled_largest_opening"]) == (2, 0.5)


def test_openings_are_those_of_the_conversations_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch gives more than are wanted."""
    monkeypatch.setattr("addlang.evaluate.generation.sample", Writer(["sort # now please"], ["sat #"]))
    options = {"conversations": 6, **LOOSE, "sampling_batch_size": 5}
    about = make_guard("self_anchor", options).start(context(make_model("llama"), tmp_path)).describe()
    assert (about["sampled_drawn"], about["sampled_conversations"], about["sampled_openings"]) == (10, 6, 6)
    assert about["sampled_largest_opening"] == pytest.approx(1 / 6)


def test_a_skip_that_finds_nothing_or_is_no_expression_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.evaluate.generation.sample", Writer(["sort the words #"], ["sat #"]))
    guard = make_guard("self_anchor", {"conversations": 8, **LOOSE, "skip": ["translate"]})
    with pytest.raises(AddlangError, match="'translate' is found in none"):
        guard.start(context(make_model("llama"), tmp_path))
    with pytest.raises(AddlangError, match="no regular expression"):
        make_guard("self_anchor", {"skip": ["("]})


def test_rows_of_a_forward_pass_keep_logits_small_and_conversations_apart(tmp_path: Path) -> None:
    from types import SimpleNamespace

    def rows(vocabulary: int, attention: str, device: str) -> int:
        head = SimpleNamespace(weight=SimpleNamespace(shape=(vocabulary, 8)))
        config = SimpleNamespace(_attn_implementation=attention)
        model = SimpleNamespace(get_output_embeddings=lambda: head, config=config)
        return rows_at_a_time(context(model, tmp_path, sequence_length=512, device=torch.device(device)))

    assert rows(300, "sdpa", "cpu") == 8
    assert rows(300, "sdpa", "cuda") == 32
    assert rows(100_352, "sdpa", "cuda") == 5  # 5 x 512 x 100,352 fp32 numbers are 0.96 GiB
    assert rows(10**9, "sdpa", "cuda") == 1
    assert rows(300, "flash_attention_2", "cuda") == 1
