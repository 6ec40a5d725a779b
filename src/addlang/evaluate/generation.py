"""Batched decoding for evaluation: greedy by an explicit loop, sampling through transformers.

The greedy loop exists because evaluation generates a few hundred short replies many times: prompts are sorted by length
(little padding), only the last position goes through the head, and rows that are finished leave the batch.
Padding is on the left, masked, and positions count from the first real token, so a reply does not depend on which
other prompts stand in its batch (up to floating-point rounding of differently shaped products).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from addlang.evaluate.measurement import NotMeasuredError

if TYPE_CHECKING:
    import torch


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a reply: the end-of-sequence tokens of the tokenizer and of the model's generation settings.

    Chat models often end a turn with another token than the tokenizer's ``eos_token`` (Llama 3: ``<|eot_id|>``);
    that one stands in ``generation_config.eos_token_id``.
    """
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (getattr(tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(v) for v in value)
    return found


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Collection[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Most likely continuation, token by token.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; only the padding id is used.
        prompts: token ids per prompt, none empty.
        max_new_tokens: tokens, at most, per reply.
        batch_size: prompts per batch; does not change the result.
        stop_ids: ids that end a reply.
        progress: called with the number of prompts done and of all prompts.

    Returns:
        New token ids per prompt, in input order, without the prompt and without the stop token. A reply of
        ``max_new_tokens`` tokens was cut off.

    Raises:
        NotMeasuredError: an empty prompt, or prompt and reply do not fit into the model's positions.
    """
    import torch

    _check(model, prompts, max_new_tokens)
    replies: list[list[int]] = [[] for _ in prompts]
    finished = 0
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    with inference(model):
        for rows in _batches(prompts, batch_size):
            ids, mask, positions = _left_padded(prompts, rows, _padding_id(tokenizer), model.device)
            position = mask.sum(1, keepdim=True)  # (B, 1): position of the next token
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **extra,
            )
            live = list(rows)  # input index of each row of the batch; a finished one stays until the batch is compacted
            done = [False] * len(live)
            for step in range(max_new_tokens):
                token = output.logits[:, -1].argmax(-1)  # (B,)
                ended = torch.isin(token, stops).tolist()
                for row, new in enumerate(token.tolist()):
                    if not done[row] and not ended[row]:
                        replies[live[row]].append(new)
                    done[row] = done[row] or ended[row]
                if all(done) or step == max_new_tokens - 1:
                    break
                cache = output.past_key_values
                if 2 * sum(done) >= len(done):
                    keep = [row for row, ended_row in enumerate(done) if not ended_row]
                    index = torch.tensor(keep, device=model.device)
                    cache.batch_select_indices(index)
                    token, mask, position = token[index], mask[index], position[index]
                    live, done = [live[row] for row in keep], [False] * len(keep)
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
                output = model(
                    input_ids=token[:, None],
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                    **extra,
                )
                position = position + 1
            finished += len(rows)
            if progress is not None:
                progress(finished, len(prompts))
    return replies


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Collection[int],
    seed: int,
    stop_text: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int = 40,
    repetition_penalty: float = 1.1,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Random continuations through ``model.generate``; the defaults are Table 9 of the SSU paper.

    Every setting is passed explicitly, so the checkpoint's own ``generation_config`` cannot change it. The global
    random state is left as it was. The result depends on ``seed``, on ``batch_size`` and on the prompts in a batch.

    Args and Returns: as :func:`greedy`, and ``temperature`` > 0, ``top_p`` in (0, 1], ``top_k`` (0: all tokens),
    ``repetition_penalty`` (1: none). ``stop_text`` ends a reply too; the token that completes it is returned, since text
    need not end where a token does.
    """
    import torch
    from transformers import GenerationConfig

    _check(model, prompts, max_new_tokens)
    pad = _padding_id(tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        eos_token_id=sorted(stop_ids) or None,
        stop_strings=None if stop_text is None else [stop_text],
        pad_token_id=pad,
    )
    extra = {} if stop_text is None else {"tokenizer": tokenizer}
    replies: list[list[int]] = [[] for _ in prompts]
    finished = 0
    devices = [model.device] if model.device.type == "cuda" else []
    own, model.generation_config = model.generation_config, settings
    try:
        with inference(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for rows in _batches(prompts, batch_size):
                ids, mask, _ = _left_padded(prompts, rows, pad, model.device)
                output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **extra)
                for row, new in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                    end = next((i for i, token in enumerate(new) if token in stop_ids), len(new))
                    replies[row] = _until(new[:end], stop_text, tokenizer)
                finished += len(rows)
                if progress is not None:
                    progress(finished, len(prompts))
    finally:
        model.generation_config = own
    return replies


def _until(ids: list[int], text: str | None, tokenizer: Any) -> list[int]:
    """The shortest beginning of ``ids`` whose words contain ``text``; all of them where it does not occur."""
    if text is None or text not in tokenizer.decode(ids):
        return ids
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if text in tokenizer.decode(ids[:middle]) else (middle + 1, high)
    return ids[:low]


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had."""
    import torch

    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts, longest first: memory runs out in the first batch or not at all."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padding_id(tokenizer: Any) -> int:
    """Any id would do: padded positions are masked."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else 0


def _left_padded(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], pad: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and position ids, all (B, L) int64."""
    import torch

    width = max(len(prompts[i]) for i in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, i in enumerate(rows):
        n = len(prompts[i])
        ids[row, width - n :] = torch.tensor(prompts[i], dtype=torch.long)
        mask[row, width - n :] = 1
    positions = (mask.cumsum(1) - 1).clamp_(min=0)  # on the CPU: CUDA's cumsum is not deterministic
    return ids.to(device), mask.to(device), positions.to(device)


def _check(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise NotMeasuredError(f"prompt {i} has no tokens, so there is nothing to continue", "remove empty prompts")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise NotMeasuredError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's {limit}",
                "lower max_new_tokens or shorten the prompt",
            )
