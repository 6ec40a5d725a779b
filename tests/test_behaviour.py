"""What a model computes besides its weights, as caches know it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer, save_model

from addlang.guards import GuardContext, make_guard
from addlang.guards.sampling import Sampling, sampled_by
from addlang.models import behaviour, load_model, stored_behaviour


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "source")


def edited(saved: Path, to: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(saved, to)
    data = json.loads((to / file).read_text(encoding="utf-8")) if (to / file).is_file() else {}
    (to / file).write_text(json.dumps({**data, **changes}), encoding="utf-8")
    return to


def of(model: Any) -> str:
    return behaviour(model.config, model.generation_config)


def test_types_places_versions_and_attention_kernels_are_no_behaviour(saved: Path, tmp_path: Path) -> None:
    want = of(load_model(saved))
    assert of(load_model(saved, dtype=torch.float32, attn_implementation="eager")) == want
    quiet = {"transformers_version": "1.0", "dtype": "float32", "use_cache": False, "attention_dropout": 0.5}
    there = edited(saved, tmp_path / "there", "config.json", **quiet)
    assert of(load_model(there)) == want
    assert stored_behaviour(there) == stored_behaviour(saved)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("generation_config.json", {"eos_token_id": [2, 3]}),
        ("generation_config.json", {"repetition_penalty": 1.05}),
    ],
)
def test_what_changes_the_output_of_the_same_weights_is_behaviour(
    saved: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    there = edited(saved, tmp_path / "there", file, **changes)
    assert stored_behaviour(there) != stored_behaviour(saved)
    assert of(load_model(there)) != of(load_model(saved))


class Given:
    ids = ([7, 8, 9, 10, 11], [12, 13, 14])
    fingerprint = "f"
    source = "two sequences"


def context(model: Any, cache: Path) -> GuardContext:
    return GuardContext(
        model=model, model_hash="h", tokenizer=make_tokenizer(), seed=0, device=torch.device("cpu"), cache_dir=cache,
        language="en", sequence_length=64, batch=4, micro=4, steps=10, autocast=contextlib.nullcontext,
        calibration=lambda: Given(), progress=lambda *_: None, read_by_guards=0.3,
    )  # type: ignore[arg-type]  # fmt: skip


def test_probabilities_and_conversations_of_another_configuration_are_not_those_of_the_model(tmp_path: Path) -> None:
    one, other = make_model("llama"), make_model("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    for model in (one, one, other):
        make_guard("kl", {}).start(context(model, tmp_path))
    assert len([p for p in (tmp_path / "anchors").iterdir() if p.is_dir()]) == 2
    names = [sampled_by(Sampling(), context(model, tmp_path)) for model in (one, one, other)]
    assert names[0] == names[1] != names[2]
    one.generation_config.eos_token_id = [2, 3]
    assert sampled_by(Sampling(), context(one, tmp_path)) not in names
