"""Specifications: every problem at once, models of a run, results in the report, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import save_model
from typer.testing import CliRunner

from addlang.analyze.base import KINDS, load_kind
from addlang.analyze.spec import execute_spec, load_spec, models_of_run, parse_spec
from addlang.analyze.states import prompt_rows
from addlang.cli import app
from addlang.errors import AddlangError
from addlang.report import report_html
from addlang.run import execute
from tinyrun import World


def test_every_problem_of_a_specification_is_named_at_once() -> None:
    with pytest.raises(AddlangError) as caught:
        parse_spec(
            {
                "model": {},
                "analyses": [{"kind": "drfit"}, {"kind": "drift", "norms": "x"}, {"kind": "mpd"}, {"kind": "mpd"}],
            }
        )
    text = str(caught.value)
    for part in ("'model'", "Did you mean 'models'", "Did you mean 'drift'", "Did you mean 'norm'", "stands twice"):
        assert part in text


def test_a_specification_needs_an_analysis() -> None:
    with pytest.raises(AddlangError, match="analyses"):
        parse_spec({"analyses": []})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_its_paper_and_what_it_does(kind: str) -> None:
    cls = load_kind(kind)
    assert cls.kind == kind
    assert cls.paper
    assert cls.summary
    assert all(
        f.description or n in ("seed", "resamples", "max_tokens", "limit", "pooling", "perplexity")
        for n, f in cls.model_fields.items()
    )


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDLANG_CACHE", str(shared_cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return execute(world.recipe(tmp_path_factory.mktemp("analysed") / "run", tokens=768))


def test_the_models_of_a_run_are_compared_and_enter_its_report(finished: Path) -> None:
    spec, analyses = parse_spec(
        {"run": str(finished), "analyses": [{"kind": "drift", "limit": 5}, {"kind": "mpd"}, {"kind": "scores"}]}
    )
    assert list(models_of_run(finished)) == ["before", "after"]
    written = execute_spec(spec, analyses)
    assert [p.parent for p in written] == [finished / "analysis"] * 3
    html = report_html(finished)
    assert html.count('class="plot"') == 2
    assert "Difference of parameters (MPD)" in html
    assert not re.search(r'(src|href)="https?:', html)
    about = json.loads(written[0].read_text(encoding="utf-8"))
    assert about["data"]["drift"]["after"][1]["spectral"] > 0
    assert about["settings"]["prompts"] == "built-in English prompts (5)"


def test_text_in_an_analysis_cannot_become_markup(finished: Path) -> None:
    folder = finished / "analysis"
    folder.mkdir(exist_ok=True)
    evil = {"title": "<script>1</script>", "sentence": "<b>", "columns": ["<i>"], "rows": [["<u>"]], "notes": ["<s>"]}
    path = folder / "evil.json"
    path.write_text(json.dumps({**evil, "settings": {"<a>": "<p>"}, "figure": "../../x.svg"}), encoding="utf-8")
    try:
        html = report_html(finished)
    finally:
        path.unlink()
    assert "<script>1" not in html
    for tag in ("<u>", "<s>", "<a>", "<i>"):
        assert tag not in html.split("Analyses</h2>")[1].split("Data</h2>")[0]


def test_a_torn_result_is_named(finished: Path) -> None:
    path = finished / "analysis" / "torn.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}", encoding="utf-8")
    try:
        with pytest.raises(AddlangError, match=r"torn\.json is no analysis"):
            report_html(finished)
    finally:
        path.unlink()


def test_a_specification_file_names_its_own_models(tmp_path: Path) -> None:
    save_model(tmp_path / "one", seed=0)
    save_model(tmp_path / "two", seed=1)
    (tmp_path / "spec.yaml").write_text(
        f"models: {{one: {tmp_path}/one, two: {tmp_path}/two}}\noutput_dir: {tmp_path}/out\n"
        "analyses: [{kind: cka, limit: 5}, {kind: mpd, name: weights}]\n"
    )
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "spec.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [a["name"] for a in found] == ["cka", "weights"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "cka.json",
        "cka.svg",
        "weights.json",
        "weights.svg",
    ]
    before = (tmp_path / "out" / "weights.svg").read_bytes()
    spec, analyses = load_spec(tmp_path / "spec.yaml")
    execute_spec(spec, analyses, tmp_path)
    assert (tmp_path / "out" / "weights.svg").read_bytes() == before, "the same data give the same figure"


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path", [p for p in (ROOT / "recipes").rglob("*.yaml") if "analyses:" in p.read_text()], ids=lambda p: str(p.name)
)
def test_a_shipped_specification_is_valid_and_names_what_it_uses(path: Path) -> None:
    spec, analyses = load_spec(path)
    for analysis in analyses:
        named = {*getattr(analysis, "models", ()), *filter(None, [getattr(analysis, "reference", None)])}
        assert named <= {*spec.models, *spec.datasets, "lab"}, analysis.name


def test_prompts_are_found_in_the_layouts_of_their_sources(tmp_path: Path) -> None:
    layouts = {
        "hub": {"prompt": ["first", "second"], "prompt_id": 1},
        "fastchat": {"turns": ["first", "second"], "question_id": 1},
        "plain": {"prompt": "first"},
        "chat": {"messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "x"}]},
        "text": {"text": "first"},
    }
    for name, row in layouts.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        assert prompt_rows(f"{name}.jsonl", tmp_path) == ["first"], name
    (tmp_path / "gap.jsonl").write_text('{"prompt": "a"}\n{"other": 1}\n')
    with pytest.raises(AddlangError, match="row 2"):
        prompt_rows("gap.jsonl", tmp_path)


def test_kinds_and_their_keys_are_given_on_the_command_line(tmp_path: Path) -> None:
    one, two = save_model(tmp_path / "one", seed=0), save_model(tmp_path / "two", seed=1)
    out = tmp_path / "out"
    words = ["analyze", "drift", f"a={one}", f"b={two}", "--reference", "b", "--limit", "4", "--output_dir", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "drift.json").read_text())["data"]["reference"] == "b"
    assert "Did you mean" in str(CliRunner().invoke(app, ["analyze", "drifts", str(one)]).exception)
    assert "norm" in CliRunner().invoke(app, ["analyze", "drift", "--help-keys", "true"]).stdout
