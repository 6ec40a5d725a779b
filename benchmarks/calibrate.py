"""What scoring costs: the forward passes with statistics against the bare forward passes, in one run.

    python benchmarks/calibrate.py --tokens 1M --json calibrate.json
    python benchmarks/calibrate.py --preset 1b --device cuda

The bare passes run the decoder without the head, as scoring does. Goal: a ratio of at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from addlang.recipe import parse_count
from addlang.scoring.activations import InputStatistics

PRESETS: dict[str, dict[str, int]] = {
    "20m": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "vocab_size": 8192,
    },
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 16384,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 50304,
    },
}


@dataclass
class Batches:
    """Random ids, every second sequence padded by a tenth, as a calibration set."""

    tokens: int
    length: int
    batch: int
    vocabulary: int

    @property
    def sequences(self) -> int:
        return self.tokens // self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.sequences // self.batch):
            ids = torch.randint(self.vocabulary, (self.batch, self.length), generator=generator)
            mask = torch.ones_like(ids)
            mask[::2, -self.length // 10 :] = 0
            yield {"input_ids": ids, "attention_mask": mask}


def bare(model: Any, data: Batches, device: torch.device) -> float:
    """Seconds of the forward passes alone."""
    start = clock(device)
    with torch.inference_mode():
        for batch in data:
            model.base_model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            )
    return clock(device) - start


def scored(model: Any, data: Batches, device: torch.device) -> float:
    """Seconds of the same passes with statistics of every layer's inputs."""
    start = clock(device)
    InputStatistics().collect(model, data)  # type: ignore[arg-type]
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Wall time on a GPU, processor time of this process elsewhere (other processes do not count)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="20m")
    parser.add_argument("--tokens", type=parse_count, default=1_000_000)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3, help="the tokens are divided over so many alternating pairs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.manual_seed(0)
    config = LlamaConfig(**PRESETS[given.preset], max_position_embeddings=4096)
    with device:  # random weights of a billion take a minute to draw elsewhere
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    data = Batches(given.tokens // given.repeat, given.sequence_length, given.batch, config.vocab_size)
    bare(
        model,
        Batches(4 * given.batch * given.sequence_length, given.sequence_length, given.batch, config.vocab_size),
        device,
    )
    pairs = [(bare(model, data, device), scored(model, data, device)) for _ in range(given.repeat)]
    result = {
        "preset": given.preset,
        "tokens": given.tokens,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "bare_seconds": sum(b for b, _ in pairs),
        "scored_seconds": sum(s for _, s in pairs),
        "ratio": statistics.median(s / b for b, s in pairs),
        "ratios": [s / b for b, s in pairs],
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
