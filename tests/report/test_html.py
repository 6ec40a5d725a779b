"""The report: complete, escaped, offline, readable."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import many_rows, write_json, write_lab, write_run

from addlang.errors import AddlangError
from addlang.report import lab_html, report_html, write_report
from addlang.report import model_card as card_of

VOID = {"meta", "link", "br", "hr", "img", "input", "circle", "rect", "line", "path", "polyline", "polygon"}
EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x.png onerror=alert(1)>"


class Checker(HTMLParser):
    """Collects tags and checks that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID or (tag in VOID and self.get_starttag_text() and not self._closed(tag)):
            self.open.append(tag)

    def _closed(self, tag: str) -> bool:
        text = self.get_starttag_text() or ""
        return text.endswith("/>") or tag in {"meta", "br", "hr", "img"}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def poisoned(value: Any) -> Any:
    """The same data with every string replaced by markup."""
    if isinstance(value, str):
        return EVIL
    if isinstance(value, dict):
        fixed = ("role", "unit", "metric", "status", "name", "phase", "model")
        return {k: v if k in fixed else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return value


def poison(run: Path) -> None:
    for path in [*run.glob("*.json"), *run.glob("**/*.jsonl")]:
        if path.suffix == ".jsonl":
            rows = [poisoned(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        else:
            write_json(path, poisoned(json.loads(path.read_text(encoding="utf-8"))))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe = {**poisoned(recipe), "model_name_or_path": EVIL, "language": EVIL, "source_language": EVIL}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    rows = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    write_json(run / "comparison.json", [{**r, "metric": EVIL, "unit": EVIL} for r in rows])
    proof = json.loads((run / "proof.json").read_text(encoding="utf-8"))
    proof["phases"][0]["phase"] = EVIL
    for tensor in proof["phases"][0]["tensors"]:
        tensor["name"] = EVIL
    write_json(run / "proof.json", proof)


@pytest.mark.parametrize("phases", [("adapt",), ("first", "second")])
def test_the_report_is_balanced_html_and_loads_nothing(tmp_path: Path, phases: tuple[str, ...]) -> None:
    html = report_html(write_run(tmp_path, rows=many_rows(), phases=phases))
    page = Checker(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    loads = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action", "data", "srcset")]
    assert all((v or "").startswith("#") for v in loads)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_the_report_shows_everything(tmp_path: Path) -> None:
    page = Checker(report_html(write_run(tmp_path, rows=many_rows())))
    for text in (
        "−2.3\u00a0points",
        "[−3.8, −0.8]",
        "Mitigating Catastrophic Forgetting",
        "calibration used 480 of 500 sequences",
        "the data set could not be loaded offline",
        "data/cpt/ig.jsonl",
        "CC-BY-4.0 (20,000), ODC-BY (431)",
        "not stated",
        "model.layers.2.down_proj.weight",
        "✗ not counted as right",
        "loss (nats per token)",
        "learning_rate: 5.0e-05",
        "addlang verify",
        "exact McNemar",
        "0123456789abcdef",
    ):
        assert text in page.text, text


def test_light_dark_phone_and_print(tmp_path: Path) -> None:
    html = report_html(write_run(tmp_path))
    for text in ("prefers-color-scheme: dark", "max-width: 640px", "@media print", 'name="viewport"', "tabular-nums"):
        assert text in html
    assert html.count('class="wide"') == html.count('class="narrow"') > 3
    figures = html[html.index("<main>") :]
    assert "fill:#" not in figures.replace(" ", "")
    assert 'stroke="' not in figures


def test_every_string_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows=many_rows())
    poison(run)
    html = report_html(run)
    page = Checker(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert html.count("&lt;script&gt;") > 40
    card = card_of(run)
    assert "<script" not in card.partition("\n---\n")[2]
    assert "<img" not in card.partition("\n---\n")[2]


def test_the_lab_report_is_escaped(tmp_path: Path) -> None:
    run = write_lab(tmp_path)
    data = json.loads((run / "lab.json").read_text(encoding="utf-8"))
    for experiment in data["experiments"]:
        experiment["title"] = EVIL
        for arm in experiment["arms"]:
            arm["label"] = arm["note"] = EVIL
    write_json(run / "lab.json", {**data, "notes": [EVIL], "versions": {EVIL: EVIL}, "language": EVIL})
    page = Checker(lab_html(run))
    assert "script" not in page.tags
    assert "img" not in page.tags


@pytest.mark.parametrize(
    "missing",
    ["recipe.yaml", "metrics.jsonl", "results.jsonl", "comparison.json", "samples", "proof.json", "state.json"],
)
def test_a_missing_file_is_shown_as_not_run(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path)
    path = run / missing
    if path.is_dir():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()
    Checker(report_html(run))
    assert card_of(run)


def test_an_empty_directory_is_a_report_of_what_was_not_run(tmp_path: Path) -> None:
    page = Checker(report_html(tmp_path))
    for text in ("there is no comparison", "there is no proof", "there are no replies", "No data card", "not finished"):
        assert text in page.text


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="does not exist"):
        report_html(tmp_path / "nowhere")


def test_a_torn_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "results.jsonl").write_text('{"a": 1}\n{"b": \n{"c": 2}\n', encoding="utf-8")
    with pytest.raises(AddlangError, match=r"results\.jsonl, line 2"):
        report_html(run)


def test_the_last_line_of_a_running_log_may_be_torn(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 12')
    assert "loss (nats per token)" in report_html(run)


def test_stored_measurements_serve_as_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for path in list(run.glob("samples/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        write_json(path.with_name("lab.exact_match.json"), {"format": 1, "task": "lab", "items": rows})
        path.unlink()
    text = Checker(report_html(run)).text
    assert "Sort these words" in text
    assert "item sort-5" in text


def test_it_is_written_atomically(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert write_report(run) == run / "report.html"
    assert not list(run.glob("*.tmp"))


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path, something_new={"a": 1})
    rows = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    write_json(run / "comparison.json", [{**r, "new": 1} for r in rows])
    assert "97.1" in report_html(run)


def test_the_report_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = (
        "import sys; from addlang.report import *; "
        f"write_report({str(tmp_path)!r}); write_model_card({str(tmp_path)!r}); summary_rows({str(tmp_path)!r}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
