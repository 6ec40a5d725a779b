"""What a method costs here: seconds and peak memory of an optimizer step, beside full fine-tuning."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addlang.guards import ActiveGuard, Guard

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False}  # fmt: skip
SHAPE = (2, 256)  # sequences per step, tokens
STEPS = 5
CONVERSATIONS = (16, 32)  # of random tokens, for guards: how many, tokens each; so short that every step reads some


def measured(options: Mapping[str, Mapping[str, Any]], guards: Sequence[str] = ()) -> dict[str, dict[str, float | str]]:
    """Steps of every strategy on a Llama of 34 million random weights, each in a process of its own.

    Args:
        options: strategy -> its options.
        guards: to measure on top of full fine-tuning, with their defaults.

    Returns:
        strategy, or ``full + guard`` -> ``time_ratio`` and ``memory_ratio`` to ``full`` (median processor time of a step on a
        CPU, its duration on a GPU, per token that is read; peak memory of a step), or ``why`` it was not measured. Guards
        read random conversations; what they prepare beforehand is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    runs: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
        **{name: (name, dict(options.get(name, {})), ()) for name in ["full", *options]},
        **{f"full + {guard}": ("full", {}, (guard,)) for guard in guards},
    }
    for name, run in runs.items():
        with context.Pool(1) as pool:
            found[name] = pool.apply(one, run)
    full = found["full"]
    return {
        name: {f"{key}_ratio": f[key] / full[key] for key in ("time", "memory")} if "why" not in f else f
        for name, f in found.items()
    }


def one(name: str, options: dict[str, Any], guards: Sequence[str] = ()) -> dict[str, Any]:
    """Median time of a step per token that is read, peak memory, and the share of tokens that guards read; in this process."""
    from addlang.progress import quiet_libraries

    quiet_libraries()
    import torch
    import transformers

    from addlang.errors import AddlangError
    from addlang.guards import make_guard
    from addlang.strategies.base import PlanInputs, make_strategy
    from addlang.train.loss import token_loss
    from addlang.train.peak import Peak

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(device)
    model.config.use_cache = False
    for p in model.parameters():  # the values of a 16-bit checkpoint, in fp32 masters
        p.data.copy_(p.data.bfloat16())
    ids = torch.randint(0, SIZES["vocab_size"], SHAPE, device=device)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(SHAPE[1], device=device).expand(SHAPE)}
    try:
        strategy = make_strategy(name, options)
        calibration: Any = Calibration(SIZES["vocab_size"])
        inputs = PlanInputs(calibration=lambda: calibration, target=lambda: itertools.repeat([batch]))
        if "reference_model" in strategy.requires():
            with tempfile.TemporaryDirectory() as directory:
                strategy = strategy.model_copy(update={"reference_model": before(model, directory)})
                plan = strategy.plan(model, inputs)
        else:
            plan = strategy.plan(model, inputs)
        attached = strategy.attach(model, plan, "auto")
        active = started([*strategy.guards(), *(make_guard(g, {}) for g in guards)], model)
    except AddlangError as error:
        return {"why": error.message}
    model.train()
    optimizer = torch.optim.AdamW(attached.param_groups(0.01), lr=5e-5, fused=True)
    attached.bind(optimizer, 100)
    for guard in active:
        guard.begin(attached)

    def step(number: int) -> float:
        started = time.perf_counter() if device.type == "cuda" else time.process_time()
        term = attached.loss_term()
        if term is not None:
            term.backward()  # type: ignore[no-untyped-call]
        loss, tokens = token_loss(model, batch)
        (loss / tokens).backward()
        for guard in active:
            guard.backward(attached, number)
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
        with Peak() as peak:
            step(2)
            peak.begin()
            step(3)
        memory = peak.bytes
    numbers = range(4, 4 + STEPS)
    target = SHAPE[0] * SHAPE[1]
    read = {n: sum(guard.tokens(n) for guard in active) for n in numbers}
    per_token = statistics.median(step(n) / (1 + read[n] / target) for n in numbers)
    total = sum(read.values())
    return {"time": per_token, "memory": memory, "read": total / (total + target * STEPS)}


def before(model: Any, directory: str) -> str:
    """Saves the model as that before the last phase, and changes the model a little, as that phase did."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory)
    with torch.no_grad():
        for number, p in enumerate(model.parameters(), 1):
            p.mul_(1 + 1e-3 * number)
    return directory


def started(guards: Sequence[Guard], model: Any) -> list[ActiveGuard]:
    """Guards at work on random conversations; one that samples its own reads them as KL does those that it is given."""
    import torch

    from addlang.data.calibration import CalibrationSet
    from addlang.guards import GuardContext
    from addlang.guards.kl import KL
    from addlang.guards.self_anchor import SelfAnchor

    count, length = CONVERSATIONS
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1, SIZES["vocab_size"], (count, length), generator=g).tolist()
    given = CalibrationSet(tuple(map(tuple, ids)), count, 0, "random tokens", "random")
    alike = [KL(**{f: getattr(s, f) for f in KL.model_fields}) if isinstance(s, SelfAnchor) else s for s in guards]
    with tempfile.TemporaryDirectory() as directory:
        context = GuardContext(
            model=model,
            model_hash="random",
            tokenizer=SimpleNamespace(pad_token_id=0),
            seed=0,
            device=next(model.parameters()).device,
            cache_dir=Path(directory),
            language="en",
            sequence_length=length,
            batch=SHAPE[0] * SHAPE[1] // length,
            micro=SHAPE[0] * SHAPE[1] // length,
            steps=100,
            autocast=contextlib.nullcontext,
            calibration=lambda: given,
            progress=lambda done, total, what: None,
            read_by_guards=sum(guard.token_share for guard in alike),
        )
        return [guard.start(context) for guard in alike]


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
