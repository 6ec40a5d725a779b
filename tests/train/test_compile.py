"""torch_compile: each decoder layer is compiled, and the numbers stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import attach, run, weights

ONE = {"num_hidden_layers": 1}


@pytest.mark.parametrize("execution", ["split_assemble", "split_resident"])
def test_a_split_layer_is_one_graph(execution: str) -> None:
    model = attach(execution=execution, changes=ONE).model
    layer = model.model.layers[0]
    x = torch.randn(1, 8, model.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(8)[None])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (layer, compiled):
        x.grad = None
        call(x, position_embeddings=positions).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["masked", "split_assemble"])
def test_compiled_layers_train_what_plain_ones_train(execution: str, tmp_path: Path) -> None:
    want = weights(run(tmp_path / "plain", attach(execution=execution, changes=ONE), steps=3))
    attached = attach(execution=execution, changes=ONE)
    got = weights(run(tmp_path / "compiled", attached, steps=3, torch_compile=True))
    assert attached.model.model.layers[0]._compiled_call_impl is not None
    for name in want:
        assert torch.allclose(want[name], got[name], rtol=1e-3, atol=1e-4), name
