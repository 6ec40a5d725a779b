from __future__ import annotations

from typing import Any

import pytest
import torch

from addlang.errors import AddlangError
from addlang.evaluate.generation import greedy, inference, sample, stop_ids


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 30, 9, 2, 5, 12, 1, 40]
    return [torch.randint(5, 270, (n,), generator=generator).tolist() for n in lengths]


def stops_in_some(model: Any, tokenizer: Any, prompts: list[list[int]]) -> set[int]:
    """Stop ids such that some replies end early, at different steps, and others do not."""
    free = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=4, stop_ids=set())
    return {free[0][2], free[3][5], free[4][7]}


def test_greedy_does_not_depend_on_batch_size(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    stops = stops_in_some(model, tokenizer, prompts)
    results = [
        greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=b, stop_ids=stops) for b in (1, 2, 5, 11, 64)
    ]
    assert len({len(reply) for reply in results[0]}) > 2, "the test needs replies of different lengths"
    assert all(r == results[0] for r in results[1:])


def test_greedy_equals_generate(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    stops = stops_in_some(model, tokenizer, prompts)
    ours = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=4, stop_ids=stops)
    for prompt, reply in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert reply == (theirs[:-1] if theirs[-1] in stops else theirs)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Olmo2", {}),
        ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
        ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    ],
)
def test_greedy_is_right_for_other_architectures(
    family: str, changes: dict[str, Any], new_model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = new_model(tokenizer, family=family, initializer_range=0.2, **changes)
    free = greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=6, stop_ids=set())
    want: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            want.append(int(model(torch.tensor([prompts[4] + want])).logits[0, -1].argmax()))
    assert free[4] == want, "equal to recomputing every step without a cache"
    stops = {free[0][2], free[4][5]}
    one, many = (greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=b, stop_ids=stops) for b in (1, 11))
    assert one == many


def test_greedy_equals_recomputing_every_step_without_a_cache(model: Any, tokenizer: Any) -> None:
    prompt = [7, 100, 50]
    want: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            want.append(int(model(torch.tensor([prompt + want])).logits[0, -1].argmax()))
    assert greedy(model, tokenizer, [prompt], max_new_tokens=6, batch_size=3, stop_ids=set()) == [want]


def test_sampling_is_a_function_of_its_seed_and_leaves_the_random_state(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 8, "batch_size": 4, "stop_ids": {2}, "temperature": 5.0, "top_p": 1.0, "top_k": 0}
    first = sample(model, tokenizer, prompts, seed=1, **settings)
    assert first == sample(model, tokenizer, prompts, seed=1, **settings)
    assert first != sample(model, tokenizer, prompts, seed=2, **settings)
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_from_one_token_equals_greedy(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    want = greedy(model, tokenizer, prompts, max_new_tokens=8, batch_size=4, stop_ids={2})
    got = sample(
        model, tokenizer, prompts, max_new_tokens=8, batch_size=4, stop_ids={2}, seed=0, top_k=1, repetition_penalty=1.0
    )
    assert got == want


def test_stop_ids_are_those_of_tokenizer_and_generation_settings(model: Any, tokenizer: Any) -> None:
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_modes_are_restored_module_by_module(model: Any) -> None:
    model.train()
    model.lm_head.eval()
    with inference(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model.lm_head.training
    model.eval()


def test_prompts_that_cannot_be_continued_are_named(model: Any, tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match="prompt 1 has no tokens"):
        greedy(model, tokenizer, [[5], []], max_new_tokens=2, batch_size=1, stop_ids=set())
    with pytest.raises(AddlangError, match="exceeds the model's 256"):
        greedy(model, tokenizer, [[5] * 255], max_new_tokens=2, batch_size=1, stop_ids=set())
