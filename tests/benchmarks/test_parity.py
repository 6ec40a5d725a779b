"""benchmarks/parity.py: it says what it did not compare, and fails where public code disagrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarking import load

ROOT = Path(__file__).parents[2]
STAND_IN = """
class WrappedGPT:
    def __init__(self, layer):
        self.layer, self.total, self.n = layer, 0.0, 0

    def add_batch(self, inp, out):
        self.n += inp.shape[0]
        self.total = self.total + inp.reshape(-1, inp.shape[-1]).double().square().sum(0)

    @property
    def scaler_row(self):
        return (self.total / self.n).float() * FACTOR
"""


def test_a_clone_that_is_missing_is_named_as_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    parity = load("parity")
    assert parity.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"{repository}: not compared" in said for repository in parity.REPOSITORIES.values())


@pytest.mark.parametrize(("factor", "status"), [("1.0", 0), ("1.001", 1)])
def test_the_status_is_that_of_the_agreement(
    factor: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the authors' class: right, and off by a thousandth."""
    file = tmp_path / "lib" / "layerwrapper.py"
    file.parent.mkdir()
    file.write_text(STAND_IN.replace("FACTOR", factor), encoding="utf-8")
    assert load("parity").main(["--wanda", str(tmp_path)]) == status
    said = capsys.readouterr()
    assert "| q_proj |" in said.out
    assert ("no agreement: Wanda's scores of q_proj" in said.err) == bool(status)


def test_the_page_names_the_repositories_that_the_script_compares_with() -> None:
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    assert all(f"https://github.com/{repository}" in page for repository in load("parity").REPOSITORIES.values())
