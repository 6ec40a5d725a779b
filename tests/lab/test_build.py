"""The lab's base model: what is shipped is what it says it is, and it can be made again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from addlang.errors import AddlangError
from addlang.lab import build, lab_model_path, world

SHIPPED = lab_model_path()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def stated() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((SHIPPED / "lab.json").read_text())
    return facts


def test_shipped_weights_have_the_stated_hash_and_size(stated: dict[str, Any]) -> None:
    assert build.sha256(SHIPPED / "model.safetensors") == stated["sha256"]
    assert (SHIPPED / "model.safetensors").stat().st_size < 2_500_000
    assert 850_000 < stated["parameters"] < 950_000
    assert stated["steps"] == 3600
    assert stated["tokens"] == 3600 * 768


def test_shipped_score_is_neither_poor_nor_saturated(stated: dict[str, Any]) -> None:
    assert stated["exact_match"]["items"] == 480
    assert 0.75 <= stated["exact_match"]["value"] <= 0.87


def test_shipped_directory_is_an_ordinary_checkpoint(stated: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.dtype is torch.bfloat16
    assert model.config.model_type == "llama"
    assert not model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == stated["parameters"]
    files = {p.name for p in SHIPPED.iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "lab.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "Amina ana mbuzi watatu. Ng'ombe hula nyasi.",
        "मीरा के पास दो भेड़ें हैं। ऊँट रेगिस्तान में रहता है।",
        "ኢትዮጵያ በአፍሪካ ቀንድ የምትገኝ አገር ናት።",
        "Nke a bụ asụsụ Igbo; ọ na-aga ahịa ụbọchị niile.",
        "  two  spaces\n\nand\tlines 12,345 ",
    ],
)
def test_tokenizer_round_trips(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "Count the words: cat dog"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Copy: cat"},
        {"role": "assistant", "content": "cat"},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "2<|end|>cat<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt + "2<|end|>")
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_training_text_is_what_the_chat_template_writes(tokenizer: Any) -> None:
    chats = world.conversations("english", 20, 0)
    written = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert build._texts("english", 20, 0, 0) == written


def test_training_data_has_the_stated_mixture(tokenizer: Any) -> None:
    data = build.training_data(tokenizer, 200, 0)
    assert data.tokens.shape == data.weights.shape == data.documents.shape == (200, 3, 256)
    light = (data.weights < 1).float().mean().item()
    assert 0.3 < light < 0.8  # users' turns
    again = build.training_data(tokenizer, 200, 0)
    assert all((a == b).all() for a, b in zip(data, again, strict=True))
    assert (build.training_data(tokenizer, 200, 1).tokens != data.tokens).any()


def test_packed_documents_do_not_see_each_other() -> None:
    import torch

    mask, positions = build.isolate(torch.tensor([[4, 4, 5, 5, 5, 6]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_build_refuses_a_directory_with_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AddlangError, match="not an empty directory"):
        build.build(tmp_path, steps=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_shipped_model_reaches_its_stated_score(tokenizer: Any, stated: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    score = stated["exact_match"]
    right = build.evaluate_exact_match(model, tokenizer, world.exact_match_items(score["items"], score["items_seed"]))
    assert sum(right) / len(right) == pytest.approx(score["value"], abs=0.02)


@pytest.mark.slow
def test_short_rebuild_is_bit_identical_and_learns(tmp_path: Path) -> None:
    losses: list[float] = []
    first = build.build(tmp_path / "a", seed=5, steps=40, threads=1, progress=lambda step, loss: losses.append(loss))
    second = build.build(tmp_path / "b", seed=5, steps=40, threads=1)
    assert first == second
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(build.VOCABULARY), abs=0.5)  # uniform before the first step
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.slow
def test_another_seed_gives_another_model_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    import torch

    torch.use_deterministic_algorithms(False)  # runs of other tests in this process turn it on
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    one = build.build(tmp_path / "a", seed=1, steps=2, threads=1)
    two = build.build(tmp_path / "b", seed=2, steps=2, threads=1)
    assert one["sha256"] != two["sha256"]
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
