"""What measuring drift costs against the bare forward passes.

    python benchmarks/drift.py [--width 4096] [--layers 2] [--prompts 48] [--tokens 128]

A random-weight Llama of the given width and few layers: per layer, cost and ratio are those of a deep one. Two models'
worth of states are reduced to means and compared; the bare passes run the same decoder on the same batches. On the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 4096), ("layers", 2), ("prompts", 48), ("tokens", 128), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(measure(parser.parse_args()), indent=1))


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Seconds of the passes, of passes with means, and of the comparison; ratio of all to the passes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from addlang.analyze.drift import covariance_change
    from addlang.analyze.states import BATCH, mean_states

    config = LlamaConfig(
        vocab_size=1000, hidden_size=given.width, intermediate_size=int(2.6875 * given.width) // 64 * 64,
        num_hidden_layers=given.layers, num_attention_heads=max(1, given.width // 128), max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rng = random.Random(0)
    ids = [[rng.randrange(1000) for _ in range(given.tokens)] for _ in range(given.prompts)]
    batches = [torch.tensor(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(input_ids=batch, use_cache=False)

    bare()
    passes, means, comparison = [], [], []
    for _ in range(given.repeats):
        passes.append(seconds(bare))
        means.append(seconds(lambda: mean_states(model, ids)))
    states = mean_states(model, ids)
    for _ in range(given.repeats):
        comparison.append(seconds(lambda: [covariance_change(a, a + 0.01 * a.roll(1, 0)) for a in states]))
    plain, reduced, compared = min(passes), min(means), statistics.median(comparison)
    layers = given.layers
    return {
        "width": given.width,
        "layers": layers,
        "prompts": given.prompts,
        "tokens": given.tokens,
        "passes_seconds": round(plain, 3),
        "with_means_seconds": round(reduced, 3),
        "comparison_seconds": round(compared, 4),
        # two models are run, one comparison is made
        "ratio": round((2 * reduced + compared) / (2 * plain), 4),
    }


def seconds(run: Callable[[], object]) -> float:
    """Processor time: a busy machine does not change it."""
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
