"""The same numbers as mergekit, on tiny models (docs/parity.md)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mergekit_reference import CASES, case, drawn, run_mergekit, stored, write_inputs
from safetensors.torch import load_file

from addlang.merge import arithmetic
from addlang.merge.spec import parse
from addlang.merge.write import merge_models

TENSORS, VERSION = stored()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    write_inputs(folder, TENSORS)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_results_are_mergekits(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "keep_at_random", lambda shape, density, rng: drawn(shape))
    merge_models(parse({**case(name, root), "tokenizer_source": "ids"}), tmp_path / "out")
    own = load_file(tmp_path / "out" / "model.safetensors")
    expected = {n.removeprefix(f"{name}/"): t for n, t in TENSORS.items() if n.startswith(f"{name}/")}
    assert own.keys() == expected.keys()
    assert max(float((own[n] - t).abs().max()) for n, t in expected.items()) < 2e-6


def test_the_cases_are_not_all_alike() -> None:
    """A comparison of results that hardly differ from the base would prove nothing."""

    def distance(name: str) -> float:
        pairs = [(t, TENSORS[n.replace(f"{name}/", "base/")]) for n, t in TENSORS.items() if n.startswith(f"{name}/")]
        return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))

    found = [distance(name) for name in CASES]
    assert min(found) > 1e-2
    assert len({round(d, 4) for d in found}) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_stored_numbers_are_those_of_mergekit(name: str, root: Path) -> None:
    pytest.importorskip("mergekit")
    for tensor, value in run_mergekit(name, root).items():
        torch.testing.assert_close(value, TENSORS[f"{name}/{tensor}"], rtol=0, atol=1e-6)
