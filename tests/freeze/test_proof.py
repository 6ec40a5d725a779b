"""The proof of what is in the files besides a model's parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import save_model

from addlang.export import write_checkpoint
from addlang.freeze.plan import FreezePlan
from addlang.freeze.proof import prove
from addlang.models import Checkpoint, load_model


def test_rotary_frequencies_that_the_source_stores_are_copied_and_proven_frozen(tmp_path: Path) -> None:
    """Llama 2's files hold them; no model has them as parameters."""
    directory = save_model(tmp_path / "source")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**load_file(directory / "model.safetensors"), name: torch.arange(4.0)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    source = Checkpoint(directory)
    model = load_model(directory, dtype=torch.float32)
    plan = FreezePlan.empty(model)
    trained = {n: p.detach() + 1 for n, p in model.named_parameters()}
    write_checkpoint(source, trained, plan, tmp_path / "out")
    adapted = Checkpoint(tmp_path / "out")
    assert adapted.header == source.header
    proof = prove(source, adapted, plan)
    assert (proof["ok"], proof["frozen_elements"], proof["frozen_changed"]) == (True, 4, 0)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert not prove(source, Checkpoint(tmp_path / "out"), plan)["ok"]
