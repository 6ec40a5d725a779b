"""The commands under 'addlang data' as a new user tries them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from addlang import cli, progress
from chatserver import Server

pytestmark = pytest.mark.usefixtures("offline")

TEXT = [
    f"The {a} teacher reads {i} old books about the long river in the north of the country."
    for i, a in enumerate("abcdef")
]
MANY = [f"{text[:-1]} number {i}." for i in range(3) for text in TEXT]
ITEM = "Which of these long rivers flows through the very old capital city in the north of Hungary?"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Data = Callable[..., Outcome]


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Data:
    """Run 'addlang data ...' in this process, in the test's directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        import warnings

        monkeypatch.setattr(sys, "argv", ["addlang", "data", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
            finally:
                progress.set_quiet(False)
        return Outcome(code, *capsys.readouterr())

    return call


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_card_prints_tables_and_json(data: Data) -> None:
    rows = write("text.jsonl", [{"text": t, "license": "CC BY-NC 4.0"} for t in [*MANY, MANY[0]]])
    done = data("card", rows, "--language", "ig", "--tokenizer", "lab", "--deduplicate", "exact")
    assert done.code == 0
    assert "CC BY-NC 4.0" in done.out
    assert "forbids commercial use" in done.err
    assert "declared as 'ig', but" in done.err
    found = data("card", rows, "--language", "en", "--tokenizer", "lab", "--json").json
    assert found["sources"][0]["duplicates"] == 1
    assert found["sources"][0]["languages"]["detected"] == {"en": 1.0}
    assert any("commercial" in message for message in found["warnings"])


def test_card_exits_with_1_where_a_row_contains_an_item(data: Data) -> None:
    rows = write("text.jsonl", [{"text": t} for t in [*TEXT, f"Quiz: {ITEM} The Danube."]])
    items = write("items.jsonl", [{"question": ITEM}])
    command = ("card", rows, "--language", "en", "--tokenizer", "lab", "--tasks", items)
    done = data(*command)
    assert done.code == 1
    assert "text.jsonl, row 7: task items.jsonl, item 1, question" in done.err
    found = data(*command, "--json")
    assert found.code == found.json["exit_code"] == 1
    assert found.json["overlap"]["found"][0]["row"] == 7
    assert data(*command, "--allow-contamination").code == 0


def test_card_wants_one_language_per_file_or_one_for_all(data: Data) -> None:
    rows = write("text.jsonl", [{"text": t} for t in TEXT])
    done = data("card", rows, rows, rows, "--language", "en", "--language", "de", "--tokenizer", "lab")
    assert done.code == 1
    assert "3 files, but --language 2 times" in done.err


def test_translate_end_to_end(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write("text.jsonl", [{"text": t} for t in TEXT])
    monkeypatch.setenv("MY_KEY", "sk-1")
    server = Server()
    with server.serving() as url:
        command = (
            "translate", rows, "--source", "en", "--target", "de", "--output", "out/de.jsonl", "--base_url", url,
            "--model", "m", "--api_key_env", "MY_KEY", "--price_in", "1", "--price_out", "2", "--max_cost", "1",
        )  # fmt: skip
        done = data(*command)
        assert done.code == 0, done.err
        assert "out/de.jsonl: 6 of 6 rows translated" in done.out
        assert "cost 0.00" in done.out
        again = data(*command, "--json")
    assert again.json["complete"]
    assert again.json["cost"] > 0
    assert len(server.requests) == 6
    assert server.headers[0]["Authorization"] == "Bearer sk-1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --base_url"),
        (["--base_url", "http://x", "--local", "lab"], "give either --base_url"),
        (["--base_url", "http://x"], "--model"),
        (["--base_url", "x:80", "--model", "m"], "no address"),
        (["--base_url", "http://x", "--model", "m", "--max_cost", "3"], "needs both prices"),
        (["--base_url", "http://x", "--model", "m", "--max_tokens", "many"], "is not a count"),
        (["--base_url", "http://x", "--model", "m", "--body", "{"], "--body is no JSON"),
        (["--base_url", "http://x", "--model", "m", "--parts", "prompt"], "Did you mean 'prompts'?"),
        (["--base_url", "http://x", "--model", "m", "--api_key_env", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["--base_url", "http://x", "--model", "m", "--prompt", "p.txt"], "unknown field {language}"),
        (["--local", "gone/model/dir"], "does not exist"),
        (["--local", "lab", "--max_tokens", "5k"], "caps are for endpoints"),
    ],
)
def test_translate_says_what_is_wrong_with_its_options(data: Data, options: list[str], message: str) -> None:
    rows = write("text.jsonl", [{"text": t} for t in TEXT])
    Path("p.txt").write_text("Into {language}")
    done = data("translate", rows, "--source", "en", "--target", "de", "--output", "out.jsonl", *options)
    assert done.code == 1
    assert message in done.err
    assert not Path("out.jsonl").exists()


def test_translation_tasks_and_their_errors(data: Data) -> None:
    pairs = write("pairs.jsonl", [{"source": t, "target": t[::-1]} for t in TEXT])
    command = ("translation-tasks", pairs, "--source", "en", "--target", "ha", "--output", "out.jsonl")
    found = data(*command, "--json").json
    assert (found["rows"], found["directions"]) == (12, {"en-ha": 6, "ha-en": 6})
    assert "Hausa" in Path("out.jsonl").read_text()
    assert "12 rows" in data(*command).out
    assert "there must be two" in data(*command, "--columns", "source").err
    assert "Did you mean 'forward'?" in data(*command, "--direction", "forwards").err


def test_bilingual_answers_and_translate_then_answer(data: Data) -> None:
    english = write("en.jsonl", [{"prompt": t, "completion": "Yes, that is right."} for t in TEXT])
    other = write("ha.jsonl", [{"prompt": t[::-1], "completion": "I, haka ne."} for t in TEXT])
    for command, words in (("bilingual-answers", "English: Yes"), ("translate-then-answer", "English: The a teacher")):
        found = data(command, english, other, "--target", "ha", "--output", "out.jsonl", "--json").json
        assert (found["rows"], found["pairs"]) == (6, {"joined": 6})
        assert json.loads(Path("out.jsonl").read_text().splitlines()[0])["messages"][1]["content"].startswith(words)
    data("bilingual-answers", english, other, "--target", "ha", "--output", "out.jsonl", "--turns", "2")
    assert len(json.loads(Path("out.jsonl").read_text().splitlines()[0])["messages"]) == 4


def test_codeswitch_reports_how_mixed_its_sentences_are(data: Data) -> None:
    pairs = write(
        "pairs.jsonl", [{"source": t, "target": " ".join(w[::-1] for w in t[:-1].split()) + "."} for t in TEXT * 5]
    )
    found = data(
        "codeswitch", pairs, "--source", "en", "--target", "xx", "--output", "out.jsonl", "--ratio", "0.4", "--json"
    ).json
    assert found["rows"] == 6
    assert 10 < found["CMI"] < 50
    assert found["pairs"]["duplicate"] == 24
    Path("words.tsv").write_text("teacher\trehcaet\n")
    data("codeswitch", pairs, "--source", "en", "--target", "xx", "--output", "out.jsonl", "--dictionary", "words.tsv")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert all(row["tags"].count("xx") == 1 and "rehcaet" in row["text"] for row in rows)
    done = data("codeswitch", pairs, "--source", "en", "--target", "xx", "--output", "out.jsonl", "--ratio", "0")
    assert done.code == 1
    assert "no sentence could be mixed" in done.err
