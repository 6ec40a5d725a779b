"""torch_compile: each decoder layer is compiled, and the numbers stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import attach, run, weights

ONE = {"num_hidden_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["masked", "split_assemble"])
def test_compiled_layers_train_what_plain_ones_train(execution: str, tmp_path: Path) -> None:
    want = weights(run(tmp_path / "plain", attach(execution=execution, changes=ONE), steps=3))
    attached = attach(execution=execution, changes=ONE)
    got = weights(run(tmp_path / "compiled", attached, steps=3, torch_compile=True))
    assert attached.model.model.layers[0]._compiled_call_impl is not None
    for name in want:
        assert torch.allclose(want[name], got[name], rtol=1e-3, atol=1e-4), name
