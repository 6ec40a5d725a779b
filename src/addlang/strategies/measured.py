"""What a method costs here: seconds and peak memory of an optimizer step, beside full fine-tuning."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False}  # fmt: skip
SHAPE = (2, 256)  # sequences per step, tokens
STEPS = 5


def measured(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | str]]:
    """Steps of every strategy on a Llama of 34 million random weights, each in a process of its own.

    Args:
        options: strategy -> its options.

    Returns:
        strategy -> ``time_ratio`` and ``memory_ratio`` to ``full`` (median processor time of a step on a CPU, its duration on
        a GPU; peak memory of a step), or ``why`` it was not measured. Guards that belong to a strategy are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    for name in dict.fromkeys(["full", *options]):
        with context.Pool(1) as pool:
            found[name] = pool.apply(one, (name, dict(options.get(name, {}))))
    full = found["full"]
    return {
        name: {f"{key}_ratio": f[key] / full[key] for key in ("time", "memory")} if "why" not in f else f
        for name, f in found.items()
    }


def one(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Median time of a step and peak memory, of one strategy in this process."""
    import torch
    import transformers

    from addlang.errors import AddlangError
    from addlang.strategies.base import PlanInputs, make_strategy
    from addlang.train.loss import token_loss
    from addlang.train.peak import Peak, resident_bytes

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    empty = resident_bytes()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(device)
    model.config.use_cache = False
    ids = torch.randint(0, SIZES["vocab_size"], SHAPE, device=device)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(SHAPE[1], device=device).expand(SHAPE)}
    try:
        strategy = make_strategy(name, options)
        calibration: Any = Calibration(SIZES["vocab_size"])
        inputs = PlanInputs(calibration=lambda: calibration, target=lambda: itertools.repeat([batch]))
        attached = strategy.attach(model, strategy.plan(model, inputs), "auto")
    except AddlangError as error:
        return {"why": error.message}
    model.train()
    optimizer = torch.optim.AdamW(attached.param_groups(0.01), lr=5e-5, fused=True)
    attached.bind(optimizer, 100)

    def step(number: int) -> float:
        started = time.perf_counter() if device.type == "cuda" else time.process_time()
        term = attached.loss_term()
        if term is not None:
            term.backward()  # type: ignore[no-untyped-call]
        loss, tokens = token_loss(model, batch)
        (loss / tokens).backward()
        attached.before_clip(number)
        torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 1.0)
        optimizer.step()
        attached.after_step(number)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() if device.type == "cuda" else time.process_time()) - started

    step(1)  # makes the optimizer's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(2)
        memory = torch.cuda.max_memory_allocated()
    else:
        resident_bytes()
        with Peak() as peak:
            step(2)
        memory = peak.bytes - empty
    return {"time": statistics.median(step(n) for n in range(3, 3 + STEPS)), "memory": memory}


class Calibration:
    """Random sequences in the form that scorers take: what they say does not matter here."""

    sequences = 4

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __iter__(self) -> Any:
        import torch

        ids = torch.randint(0, self.vocabulary, (self.sequences, 64), generator=torch.Generator().manual_seed(1))
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def describe(self) -> dict[str, Any]:
        """Plain data for plans."""
        return {"source": "random tokens", "sequences": self.sequences}


def cells(name: str, found: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Time and memory of a strategy as text."""
    f = found[name]
    return ["not measured", "-"] if "why" in f else [f"{f['time_ratio']:.2f}", f"{f['memory_ratio']:.2f}"]
