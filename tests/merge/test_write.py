"""Merges on disk: what is written, that nothing is cut or half-written, and that no tensor is ever held as a whole."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, save_model

from addlang.errors import AddlangError, AddlangWarning
from addlang.freeze.plan import FreezePlan, Frozen
from addlang.merge import sources, write
from addlang.merge.spec import load, parse
from addlang.merge.verify import verify_merge
from addlang.merge.write import merge_models
from addlang.models import Checkpoint, load_model
from tinyrun import listing, weights

SOURCE, TUNED, OTHER = "source", "tuned", "other"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source in two files, and two models near it."""
    root = tmp_path_factory.mktemp("models")
    source = make_model("llama").to(torch.bfloat16)
    for number, name in enumerate((SOURCE, TUNED, OTHER)):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(number * 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        source.save_pretrained(root / name, max_shard_size="40KB")
        make_tokenizer().save_pretrained(root / name)
    assert len(Checkpoint(root / SOURCE).files) > 1
    return root


def revert(models: Path, **parameters: Any) -> Any:
    data = {"model": str(models / TUNED), "source_model": str(models / SOURCE), "parameters": parameters}
    return parse({"merge_method": "revert", **data})


def linear(a: Path, b: Path, **more: Any) -> Any:
    return parse({"merge_method": "linear", "models": [str(a), str(b)], **more})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_the_ends_of_a_revert_are_the_two_models_bit_for_bit(models: Path, tmp_path: Path) -> None:
    merge_models(revert(models, scale=1.0), tmp_path / "one")
    merge_models(revert(models, scale=0.0), tmp_path / "zero")
    for out, same in (("one", TUNED), ("zero", SOURCE)):
        found, wanted = weights(tmp_path / out), weights(models / same)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_what_a_plan_freezes_goes_back_and_the_rest_stays(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns, rows, elements and whole tensors, across the blocks in which a tensor is read."""
    monkeypatch.setattr(sources, "BLOCK", 100)  # three rows at a time
    shapes = {n: tuple(t.shape) for n, t in weights(models / SOURCE).items()}
    mask = torch.rand(48, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    entries = {n: Frozen(shape, "none") for n, shape in shapes.items()}
    layer = "model.layers.0.{}.weight"
    own = {
        layer.format("self_attn.q_proj"): Frozen((32, 32), "columns", torch.tensor([0, 5, 31])),
        layer.format("self_attn.o_proj"): Frozen((32, 32), "rows", torch.tensor([3, 4])),
        layer.format("mlp.up_proj"): Frozen((48, 32), "elements", mask),
        layer.format("input_layernorm"): Frozen((32,), "all"),
    }
    FreezePlan({**entries, **own}, "").save(tmp_path / "plan.safetensors")
    merge_models(revert(models, plan=str(tmp_path / "plan.safetensors")), tmp_path / "out")
    out, source, tuned = (weights(d) for d in (tmp_path / "out", models / SOURCE, models / TUNED))
    for name in shapes:
        frozen = own[name].mask() if name in own else torch.zeros(shapes[name], dtype=torch.bool)
        assert torch.equal(out[name], torch.where(frozen, source[name], tuned[name])), name
    FreezePlan(entries, "").save(tmp_path / "none.safetensors")
    with pytest.raises(AddlangError, match="freezes nothing"):
        merge_models(revert(models, plan=str(tmp_path / "none.safetensors")), tmp_path / "no")
    FreezePlan(own, "").save(tmp_path / "other.safetensors")
    with pytest.raises(AddlangError, match="the plan is of another model"):
        merge_models(revert(models, plan=str(tmp_path / "other.safetensors")), tmp_path / "no")


def test_the_result_is_laid_out_like_the_stated_model_and_loads(models: Path, tmp_path: Path) -> None:
    merge_models(linear(models / TUNED, models / OTHER, config_from=str(models / OTHER)), tmp_path / "out")
    own, stated = Checkpoint(tmp_path / "out"), Checkpoint(models / OTHER)
    assert own.files == stated.files
    assert own.location == stated.location
    assert own.header == stated.header
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models / OTHER / name).read_bytes()
    model = load_model(tmp_path / "out")
    ids = torch.arange(6, 20)[None]
    expected = load_model(models / TUNED)
    with torch.no_grad():
        for (n, p), q in zip(expected.named_parameters(), load_model(models / OTHER).parameters(), strict=True):
            p.copy_((p.float() + q.float()) / 2)
            assert torch.equal(p, model.get_parameter(n))
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_small_blocks_give_the_same_bits_and_bound_what_is_held(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tensors' size, no more than a block of any model is read, and no tensor as a whole."""
    data = {"base_model": str(models / SOURCE), "models": [str(models / TUNED), str(models / OTHER)]}
    specs = {
        "ties": parse({"merge_method": "ties", **data}),
        "slerp": parse({"merge_method": "slerp", **data, "models": [str(models / TUNED)], "parameters": {"t": 0.3}}),
        "dare": parse({"merge_method": "dare_ties", **data, "parameters": {"density": 0.5, "rescale": "l1"}}),
        "revert": revert(models, density=0.3, scale=0.9),
    }
    for name, spec in specs.items():
        if name != "ties":  # whose draw among equal magnitudes goes block by block
            merge_models(spec, tmp_path / name)
    block, read = 800, []
    rows = Checkpoint.rows

    def watched(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        found = rows(self, name, start, stop)
        read.append(found.numel())
        return found

    monkeypatch.setattr(sources, "BLOCK", block)
    monkeypatch.setattr(Checkpoint, "rows", watched)
    for method in ("get", "tensors"):
        monkeypatch.setattr(Checkpoint, method, None)
    for name, spec in specs.items():
        merge_models(spec, tmp_path / f"{name}-small")
    assert max(read) <= block
    assert max(t.numel() for t in tensors(models / SOURCE).values()) > 10 * block
    for name in ("slerp", "dare"):
        found, wanted = tensors(tmp_path / f"{name}-small"), tensors(tmp_path / name)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_only_whole_results_appear_and_others_files_are_never_touched(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = revert(models, scale=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(AddlangError, match="holds no merge"):
        merge_models(spec, tmp_path / "mine", overwrite=True)
    out = tmp_path / "out"
    merge_models(spec, out)
    before = listing(out)
    with pytest.raises(AddlangError, match="--overwrite"):
        merge_models(spec, out)
    monkeypatch.setattr(write, "write_text", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        merge_models(revert(models, scale=0.1), out, overwrite=True)
    assert listing(out) == before
    with pytest.raises(OSError, match="disk full"):
        merge_models(spec, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    monkeypatch.undo()
    left = tmp_path / f".out.{2**22 + 1}.merging"  # of a process that is no more
    left.mkdir()
    merge_models(revert(models, scale=0.1), out, overwrite=True)
    assert listing(out)["merge.yaml"] != before["merge.yaml"]
    assert not left.exists()


def test_the_recipe_in_the_result_repeats_it_and_verify_recomputes_it(models: Path, tmp_path: Path) -> None:
    data = {"base_model": str(models / SOURCE), "models": [str(models / TUNED), str(models / OTHER)]}
    spec = parse({"merge_method": "dare_ties", **data, "seed": 5, "parameters": {"density": [0.3, 0.6]}})
    record = merge_models(spec, tmp_path / "out")
    again = merge_models(load(tmp_path / "out" / "merge.yaml"), tmp_path / "again")
    assert again["hash"] == record["hash"]
    assert verify_merge(tmp_path / "out")["ok"]
    file = tmp_path / "out" / Checkpoint(tmp_path / "out").location["model.norm.weight"]
    changed = load_file(file)
    changed["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(changed, file, metadata={"format": "pt"})
    assert verify_merge(tmp_path / "out")["differing"] == ["model.norm.weight"]


def test_verify_finds_models_that_were_named_from_elsewhere_and_refuses_changed_ones(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (SOURCE, TUNED):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    merge_models(parse({"merge_method": "revert", "model": TUNED, "source_model": SOURCE}), Path("out"))
    monkeypatch.chdir("/")
    assert verify_merge(tmp_path / "out")["ok"]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    record["models"][0]["hash"] = "0" * 16
    (tmp_path / "out" / "merge.json").write_text(json.dumps(record))
    with pytest.raises(AddlangError, match="is not the model that was merged"):
        verify_merge(tmp_path / "out")


def test_the_model_card_names_models_hashes_and_recipe(models: Path, tmp_path: Path) -> None:
    merge_models(revert(models, scale=0.25), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert Checkpoint(models / TUNED).hash in card
    assert Checkpoint(models / SOURCE).hash in card
    assert "scale: 0.25" in card
    assert "merge_method: revert" in card
    assert TUNED in card
    assert str(models) not in card  # it tells only where it was made


def test_another_type_is_written_where_it_is_asked_for(models: Path, tmp_path: Path) -> None:
    merge_models(linear(models / TUNED, models / OTHER, dtype="float32"), tmp_path / "out")
    assert Checkpoint(tmp_path / "out").dtype == torch.float32
    assert load_model(tmp_path / "out").dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_broken_model_is_named_and_nothing_is_written(models: Path, tmp_path: Path) -> None:
    broken = save_model(tmp_path / "broken")
    found = load_file(broken / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(found, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AddlangError, match=r"model.layers.1.mlp.up_proj.weight' is NaN or infinite"):
        merge_models(linear(broken, models / TUNED), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["broken"]


def test_a_merged_model_is_never_overwritten_by_the_result(models: Path, tmp_path: Path) -> None:
    merge_models(revert(models, scale=0.5), tmp_path / "half")
    with pytest.raises(AddlangError, match="that is merged"):
        merge_models(linear(tmp_path / "half", models / TUNED), tmp_path / "half", overwrite=True)


def test_quantised_weights_are_refused(models: Path, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small")
    found = load_file(small / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight"] = found["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(found, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AddlangError, match=r"up_proj.weight' of .* is of type F8_E4M3"):
        merge_models(linear(small, models / TUNED), tmp_path / "out")
    declared = save_model(tmp_path / "declared")
    config = json.loads((declared / "config.json").read_text())
    (declared / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(AddlangError, match=r"quantised, as its config\.json says"):
        merge_models(linear(declared, models / TUNED), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mistral"}, "model_type is 'llama' and 'mistral'"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight"),
        ({"intermediate_size": 64}, r"up_proj.weight \(\(48, 32\) and \(64, 32\)\)"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_attention_heads is 4 and 8"),
        ({"architecture": "llama_tied", "attention_bias": True, "mlp_bias": True}, "tie_word_embeddings is False and True"),
        ({"vocab_size": 320}, r"embeddings of other sizes: .* nothing is cut off"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_name(
    models: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = {"architecture": "llama", **changes}
    model = make_model(other.pop("architecture"), **{k: v for k, v in other.items() if k != "vocab_size"})
    if "vocab_size" in other:
        model.resize_token_embeddings(other["vocab_size"])
    model.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(AddlangError, match=message):
        merge_models(linear(models / SOURCE, tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_frequencies_that_a_file_holds_are_left_out(models: Path, tmp_path: Path) -> None:
    """Llama 2's files hold them; every model computes them from its configuration."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    holds = save_model(tmp_path / "holds", seed=1)
    plain = save_model(tmp_path / "plain", seed=1)
    source = save_model(tmp_path / "source")
    save_file({**tensors(holds), name: torch.arange(4.0)}, holds / "model.safetensors", {"format": "pt"})
    merge_models(linear(holds, source), tmp_path / "out")
    merge_models(linear(plain, source), tmp_path / "wanted")
    assert same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "wanted"))
    assert verify_merge(tmp_path / "out")["ok"]


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def test_settings_that_differ_are_told(models: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.warns(AddlangWarning, match="rms_norm_eps"):
        merge_models(linear(models / SOURCE, tmp_path / "other"), tmp_path / "out")


def test_a_tied_model_may_store_its_head_or_not(tmp_path: Path) -> None:
    """Old checkpoints store a tied head; it stays what the embedding is."""
    a, b = save_model(tmp_path / "a", "llama_tied"), save_model(tmp_path / "b", "llama_tied", seed=1)
    stored = load_file(a / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, a / "model.safetensors")
    merge_models(linear(a, b), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    merge_models(linear(b, a), tmp_path / "other")
    assert "lm_head.weight" not in load_file(tmp_path / "other" / "model.safetensors")


def test_special_rows_come_back_and_no_other_row_moves(models: Path, tmp_path: Path) -> None:
    data = {
        "merge_method": "special_tokens",
        "model": str(models / TUNED),
        "restore_special_tokens": str(models / SOURCE),
    }
    record = merge_models(parse(data), tmp_path / "out")
    assert record["restored_rows"] == 6
    out, source, tuned = tensors(tmp_path / "out"), tensors(models / SOURCE), tensors(models / TUNED)
    special = torch.zeros(len(make_tokenizer()), dtype=torch.bool)
    special[make_tokenizer().all_special_ids] = True
    for name in out:
        rows = special if name in ("model.embed_tokens.weight", "lm_head.weight") else torch.zeros(len(out[name])) == 1
        assert torch.equal(out[name][rows], source[name][rows])
        assert torch.equal(out[name][~rows], tuned[name][~rows])


def test_a_result_without_chat_template_is_told(models: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(models / SOURCE, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    data = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [str(models / TUNED)]}
    with pytest.warns(AddlangWarning, match="no chat template"):
        merge_models(parse(data), tmp_path / "out")
    chat = {"merge_method": "chat_vector", "model": str(tmp_path / "base"), "chat_model": str(models / TUNED)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_models(parse({**chat, "base_model": str(models / SOURCE)}), tmp_path / "chat")
    assert (tmp_path / "chat" / "chat_template.jinja").is_file()


def test_layers_are_swapped_whole(models: Path, tmp_path: Path) -> None:
    data = {"merge_method": "layer_swap", "task_model": str(models / TUNED), "language_model": str(models / OTHER)}
    merge_models(parse({**data, "parameters": {"bottom": 1, "top": 0, "transition": 0}}), tmp_path / "out")
    out, task, language = tensors(tmp_path / "out"), tensors(models / TUNED), tensors(models / OTHER)
    for name in out:
        bottom = "layers.0." in name or "embed_tokens" in name
        assert torch.equal(out[name], (language if bottom else task)[name])
    auto = {**data, "base_model": str(models / SOURCE), "parameters": {"auto": True}}
    record = merge_models(parse(auto), tmp_path / "auto")
    assert record["decided"]["bottom"] + record["decided"]["top"] >= 1
    with pytest.raises(AddlangError, match="more than the model's 2 layers"):
        merge_models(parse({**data, "parameters": {"bottom": 2, "top": 1}}), tmp_path / "no")
