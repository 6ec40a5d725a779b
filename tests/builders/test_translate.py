"""Selective translation against a server that answers, stalls, fails and lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from addlang.builders.budget import Budget, Prices
from addlang.builders.protect import Protector
from addlang.data.journal import Journal
from addlang.errors import AddlangError
from chatserver import GERMAN, ROWS, SPANISH, Answer, Job, Server, into, read
from tinyrun import Killed, dying_at

TEXTS = 8  # six instructions; with marks all inputs are the same, and so are all outputs


def test_prose_is_translated_and_the_rest_is_kept_in_the_order_of_the_input(job: Job, tmp_path: Path) -> None:
    server = Server(lambda text, number, request: Answer(stall=0.05 * ("number 0" in text)) and None)
    about = job(server)
    assert (about["rows"], about["translated"], about["rejected"], about["complete"]) == (6, 6, 0, True)
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for i, row in enumerate(rows):
        assert f"{150 + i} °C" in row["output"]
        assert row["output"].count("\n- ") == 2
        assert row["instruction"].startswith("Der alte Mann liest")
        assert (row["language"], row["translated_from"]) == ("de", "en")
        if i % 2 == 0:
            assert f"`step_{i}()`" in row["input"]
            assert f"https://example.org/{i}" in row["input"]
        else:
            assert row["input"] == ""
    assert not any("°C" in text or "step_" in text or "http" in text for text in server.texts)


def test_a_text_that_comes_twice_is_paid_for_once(job: Job, rows_file: Path, tmp_path: Path) -> None:
    rows_file.write_text("".join(json.dumps(ROWS[0]) + "\n" for _ in range(3)))
    server = Server()
    job(server)
    assert len(server.requests) == 3
    assert len(read(tmp_path / "out.jsonl")) == 3


def test_requests_run_side_by_side_but_never_more_than_allowed(job: Job) -> None:
    server = Server(lambda text, number, request: Answer(into(["wort"], text), stall=0.03))
    job(server, check_language=False)
    assert 2 <= server.most_at_once <= 3


def test_replies_that_lose_marks_are_asked_for_again_and_told_why(job: Job) -> None:
    def forgetful(text: str, number: int, request: dict[str, Any]) -> Answer | None:
        return None if number else Answer(into(SPANISH, text).replace("⟦1⟧", ""))

    server = Server(forgetful)
    assert job(server)["translated"] == 6
    again = [r for r in server.requests if "refused: lost ⟦1⟧" in r["messages"][0]["content"]]
    assert again
    assert all(r["temperature"] > 0 for r in again)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda text: text.replace("⟦1⟧", "⟦1⟧ ⟦1⟧"), "repeated"),
        (lambda text: text + " ⟦77⟧", "invented"),
        (lambda text: "", "empty"),
        (lambda text: into(SPANISH, text), "another language"),
        (lambda text: text, "still in"),
        (lambda text: into(["der", "und", "Wort", "nicht"], text) * 9, "repeated"),
    ],
)
def test_a_server_that_goes_on_lying_gets_its_rows_rejected_with_the_reason(
    job: Job, tmp_path: Path, lie: Any, reason: str
) -> None:
    server = Server(lambda text, number, request: Answer(lie(text)) if "⟦" in text and "\n" in text else None)
    about = job(server, attempts=2)
    assert (about["translated"], about["rejected"]) == (0, 6)
    assert about["reasons"] == {reason: 6}
    rejects = read(tmp_path / "out.jsonl.rejects.jsonl")
    assert [r["row"] for r in rejects] == [1, 2, 3, 4, 5, 6]
    assert all(r["place"] == ["output"] for r in rejects)
    assert rejects[0]["record"] == ROWS[0]
    asked = [text for text in server.texts if "\n" in text]
    assert len(asked) == 2 * len(set(asked))


def test_a_reply_that_is_cut_off_is_not_kept(job: Job) -> None:
    server = Server(lambda text, number, request: Answer("Der halbe", finish="length") if not number else None)
    about = job(server)
    assert about["translated"] == 6
    assert about["replies"] == 2 * about["texts"]


def test_a_reply_with_half_a_character_is_asked_for_again(job: Job) -> None:
    raw = b'{"choices": [{"message": {"content": "Der alte \\ud83d Mann"}, "finish_reason": "stop"}]}'
    about = job(Server(lambda text, number, request: None if number else Answer(raw=raw)), limit=1)
    assert about["translated"] == 1
    assert about["replies"] == 2 * about["texts"]


def test_what_passes_is_tried_again(job: Job) -> None:
    troubles = [
        Answer("slow down", status=429), Answer("oops", status=500), Answer(raw=b"{not json"), Answer(raw=b"[]"),
        Answer(torn=True), Answer("overloaded", status=503),
    ]  # fmt: skip

    def troubled(text: str, number: int, request: dict[str, Any]) -> Answer | None:
        return troubles[number] if number < len(troubles) else None

    about = job(Server(troubled), limit=1)
    assert about["translated"] == 1
    assert about["replies"] == about["texts"] == 3


def test_retry_after_holds_for_every_request(job: Job) -> None:
    first = True

    def busy(text: str, number: int, request: dict[str, Any]) -> Answer | None:
        nonlocal first
        if first:
            first = False
            return Answer("wait", status=429, headers={"Retry-After": "0.6"})
        times.append(monotonic())
        return None

    from time import monotonic

    times: list[float] = []
    begin = monotonic()
    job(Server(busy), concurrency=1, limit=1)
    assert times[0] - begin >= 0.6


def test_a_server_that_asks_for_an_hour_is_left_alone(job: Job) -> None:
    server = Server(lambda text, number, request: Answer("wait", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(AddlangError, match="asks to wait 3600 s"):
        job(server)


def test_a_server_that_stalls_is_given_up_and_nothing_is_lost(job: Job, tmp_path: Path) -> None:
    def stalling(text: str, number: int, request: dict[str, Any]) -> Answer | None:
        return Answer("late", stall=0.5) if "number 3" in text else None

    with pytest.raises(AddlangError, match=r"no answer within 0\.15 s(.|\n)*go on"):
        job(Server(stalling), timeout=0.15, retries=1, concurrency=1)
    assert not (tmp_path / "out.jsonl").exists()
    server = Server()
    about = job(server)
    assert about["complete"]
    before = about["replies"] - len(server.requests)
    assert before == 5, "what came before the stall is not asked for again"


def test_a_job_that_is_killed_goes_on_and_ends_like_one_that_was_not(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "append", dying_at(6, Journal.append, Killed()))
    with pytest.raises(Killed):
        job(Server(), concurrency=1)
    monkeypatch.undo()
    second = Server()
    about = job(second)
    assert len(second.requests) == TEXTS - 5
    resumed = (tmp_path / "out.jsonl").read_bytes()
    for name in ("out.jsonl", "out.jsonl.journal.jsonl"):
        (tmp_path / name).unlink()
    assert job(Server())["translated"] == about["translated"] == 6
    assert (tmp_path / "out.jsonl").read_bytes() == resumed


def test_a_torn_journal_loses_its_last_line_only(job: Job, tmp_path: Path) -> None:
    job(Server(), concurrency=1)
    journal = tmp_path / "out.jsonl.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    server = Server()
    job(server)
    assert len(server.requests) == 1


def test_finished_jobs_ask_nothing_again(job: Job) -> None:
    job(Server())
    server = Server()
    assert job(server)["complete"]
    assert server.requests == []


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        (Budget(max_tokens=1500), lambda a: a["tokens_in"] + a["tokens_out"] <= 1500),
        (Budget(max_cost=0.002, prices=Prices(1.0, 2.0)), lambda a: a["cost"] <= 0.002),
    ],
)
def test_the_cap_is_kept_and_the_rows_that_are_done_come_out(
    job: Job, tmp_path: Path, budget: Budget, spent: Any
) -> None:
    about = job(Server(), budget=budget)
    assert not about["complete"]
    assert spent(about)
    assert 0 < about["translated"] < 6
    assert about["translated"] + about["left"] == 6
    assert len(read(tmp_path / "out.jsonl")) == about["translated"]
    again = job(Server())
    assert again["complete"]
    assert again["replies"] == TEXTS


def test_what_earlier_sittings_spent_counts_towards_the_cap(job: Job) -> None:
    first = job(Server())
    used = first["tokens_in"] + first["tokens_out"]
    server = Server()
    about = job(server, budget=Budget(max_tokens=used))
    assert about["complete"]
    assert about["tokens_in"] + about["tokens_out"] == used


def test_missing_usage_is_estimated_and_said_so(job: Job) -> None:
    about = job(Server(lambda text, number, request: Answer(into(["Wort"], text), usage=False)), check_language=False)
    assert about["tokens_estimated"]
    assert about["tokens_in"] > 0


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -900, "completion_tokens": -900}, [], {"prompt_tokens": True}, "none"]
)
def test_a_usage_that_cannot_be_is_estimated_so_that_it_lifts_no_cap(job: Job, usage: Any) -> None:
    def lying(text: str, number: int, request: dict[str, Any]) -> Answer:
        choice = {"message": {"content": into(GERMAN, text)}, "finish_reason": "stop"}
        return Answer(raw=json.dumps({"choices": [choice], "usage": usage}).encode())

    about = job(Server(lying))
    assert about["tokens_estimated"]
    assert min(about["tokens_in"], about["tokens_out"]) > 0


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses access"), (404, "not found"), (302, "is moved"), (418, "status 418")],
)
def test_what_will_not_pass_ends_the_job_at_once(job: Job, status: int, message: str) -> None:
    server = Server(lambda text, number, request: Answer("no", status=status))
    with pytest.raises(AddlangError, match=message):
        job(server, concurrency=1)
    assert len(server.requests) == 1


def test_a_text_that_the_server_refuses_is_rejected_and_the_others_are_not(job: Job, tmp_path: Path) -> None:
    def picky(text: str, number: int, request: dict[str, Any]) -> Answer | None:
        return Answer("too long", status=400) if "number 4" in text else None

    server = Server(picky)
    about = job(server, concurrency=1)
    assert about["translated"] == 5
    assert len([text for text in server.texts if "number 4" in text]) == 1, "it would be refused again"
    assert read(tmp_path / "out.jsonl.rejects.jsonl")[0]["reason"] == "refused by the server: too long"


def test_a_server_that_refuses_everything_ends_the_job_with_a_hint(job: Job) -> None:
    server = Server(lambda text, number, request: Answer("unknown field max_tokens", status=400))
    with pytest.raises(AddlangError, match=r"unknown field max_tokens(.|\n)*--body"):
        job(server, concurrency=1)
    assert len(server.requests) == 5


def test_the_key_is_sent_and_stored_nowhere(job: Job, tmp_path: Path) -> None:
    server = Server()
    job(server, api_key="sk-secret", limit=1)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert not any("sk-secret" in p.read_text() for p in tmp_path.iterdir())


def test_fields_of_the_request_can_be_added_and_removed(job: Job) -> None:
    server = Server()
    job(server, body={"max_tokens": None, "top_p": 0.5}, limit=1)
    assert "max_tokens" not in server.requests[0]
    assert server.requests[0]["top_p"] == 0.5


def test_names_of_the_glossary_come_out_as_it_says(job: Job, rows_file: Path, tmp_path: Path) -> None:
    rows_file.write_text(
        json.dumps({"text": "The teacher in Addis Ababa uses PyTorch every day at the old school."}) + "\n"
    )
    job(Server(), names={"Addis Ababa": "አዲስ አበባ", "PyTorch": "PyTorch"})
    text = read(tmp_path / "out.jsonl")[0]["text"]
    assert "አዲስ አበባ" in text
    assert "PyTorch" in text
    assert "Addis" not in text


def test_only_prompts_or_only_responses(job: Job, tmp_path: Path) -> None:
    job(Server(), parts="responses")
    row = read(tmp_path / "out.jsonl")[0]
    assert row["instruction"] == ROWS[0]["instruction"]
    assert row["output"] != ROWS[0]["output"]


def test_columns_of_any_other_format_can_be_named(job: Job, rows_file: Path, tmp_path: Path) -> None:
    rows_file.write_text(
        json.dumps({"question": "How many apples are left?", "answer": "He ate them all.", "n": 3}) + "\n"
    )
    with pytest.raises(AddlangError, match="row 1: there is no column 'text'"):
        job(Server())
    job(Server(), columns=("question",))
    row = read(tmp_path / "out.jsonl")[0]
    assert row["question"].startswith("Der alte")
    assert (row["answer"], row["n"]) == ("He ate them all.", 3)
    with pytest.raises(AddlangError, match=r"rows\.jsonl, row 1: there is no column 'questions'"):
        job(Server(), columns=("questions",))


def test_sentences_are_asked_for_one_by_one_and_joined_as_they_were(job: Job, rows_file: Path, tmp_path: Path) -> None:
    text = "  The old man reads the paper.\n\n“Is it late?” she asked him. Yes."
    rows_file.write_text(json.dumps({"text": text}) + "\n")
    server = Server()
    job(server, unit="sentence", check_language=False)
    assert len(server.requests) == 4
    out = read(tmp_path / "out.jsonl")[0]["text"]
    assert out.startswith("  Der alte")
    assert out.count("\n\n") == 1
    assert out.count(" ") == text.count(" ")


def test_a_language_that_the_identifier_does_not_know_is_only_checked_for_the_source(job: Job) -> None:
    assert job(Server(), target="tlh")["translated"] == 6
    assert job(Server(lambda text, n, r: Answer(text)), target="xx", attempts=1)["translated"] == 0


def test_protection_is_lossless() -> None:
    protector = Protector()
    for text in (json.dumps(ROWS), "a ⟦3⟧ b", "```\ncode", "${A} {b} %s %(n)d <br/> **x** __y__ | 5 km/h, 10:30", ""):
        protected = protector.protect(text)
        assert protector.restore(protected.text, protected) == (text, None)
