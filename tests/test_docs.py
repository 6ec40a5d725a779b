"""The documentation is true: its commands run, its reference is that of the code, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
RUNNABLE = sorted(p for p in PAGES if "<!-- run -->" in p.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"<!-- run -->\n```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: p.name)
def test_every_command_of_a_page_runs_in_order(page: Path, tmp_path: Path) -> None:
    env = {**os.environ, "ADDLANG_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for line in commands(page):
        words = shlex.split(line, comments=True)
        assert words[0] == "addlang", f"{page.name}: '{line}' is no addlang command"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"


def test_there_are_commands_to_run() -> None:
    assert any(len(commands(p)) >= 5 for p in RUNNABLE)


def test_the_reference_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("lab", "test"):
        block = re.search(rf"<!-- {name} -->\n```sh\n(.+?)\n```", text)
        assert block
        assert block[1].startswith("scripts/bootstrap")
        assert f"command_of {name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda p: p.stem)
def test_every_method_page_says_where_our_studies_have_it(page: Path) -> None:
    """And the sections of the results that it names are there."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\(\.\./results\.md(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    assert links
    assert {a for a in links if a} <= anchors


def test_pure_bf16_rounds_away_the_shares_that_the_pages_name() -> None:
    """4 of 10 weights stay where an update is as large as the paper's learning rate, 85 % where it is a fifth of it."""
    g = torch.Generator().manual_seed(0)
    weights = (torch.randn(400_000, generator=g) * 0.02).bfloat16()
    signs = torch.randn(400_000, generator=g).sign()
    stay = [float(((weights.float() + 5e-5 * size * signs).bfloat16() == weights).float().mean()) for size in (1, 0.2)]
    assert stay == pytest.approx([0.43, 0.85], abs=0.01)
    assert "43 % do not move" in (ROOT / "docs" / "methods" / "full.md").read_text(encoding="utf-8")
    assert "about 4 of 10 weights do not move" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
