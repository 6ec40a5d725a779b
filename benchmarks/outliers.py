"""Outlier features: how much larger the largest input feature of each layer is than the middling one.

    python benchmarks/outliers.py MODEL [MODEL ...] --calibration chat.jsonl

Wanda differs from magnitude only where input features differ in norm. Large language models have features tens to hundreds of times
the median (Sun et al., 2024, section 2); this says whether a model at hand has them. Per module type, over layers: median and
largest of max / median of the root mean square of the input features, and how many of the columns that Wanda freezes at
ratio 0.5 magnitude would freeze too.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from addlang.data.calibration import calibration_batches
from addlang.models import load_model, load_tokenizer, parameter_kinds, resolve
from addlang.schema import Calibration
from addlang.scoring.activations import InputStatistics


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", type=Path, help="source-language chat data; default: the built-in English set")
    parser.add_argument("--sequences", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        directory = resolve(name)
        model: Any = load_model(directory, dtype=torch.float32, device="cpu")
        data = ({"path": str(args.calibration.resolve()), "role": "source"},) if args.calibration else ()
        settings = Calibration.model_validate(
            {"datasets": data, "sequences": args.sequences, "sequence_length": 256, "allow_fewer": True}
        )
        given = calibration_batches(settings, load_tokenizer(directory), language="en", base_dir=None)
        found = InputStatistics()
        found.collect(model, given)
        print(f"\n{name}: {given.sequences} conversations, {found.tokens:,} tokens\n")
        print(
            "| input of | largest / median feature, median over layers | worst layer | columns frozen by Wanda that magnitude freezes too |"
        )
        print("|---|---|---|---|")
        groups: dict[str, list[tuple[float, float]]] = {}
        for parameter, info in parameter_kinds(model).items():
            if info.kind != "linear":
                continue
            norm = found.squares[info.module].sqrt()
            weight = model.get_parameter(parameter).detach().abs().sum(0).double()
            half = len(norm) // 2
            wanda, plain = set((norm * weight).topk(half).indices.tolist()), set(weight.topk(half).indices.tolist())
            groups.setdefault(info.group, []).append((float(norm.max() / norm.median()), len(wanda & plain) / half))
        for group, values in groups.items():
            ratios, overlaps = zip(*values, strict=True)
            print(
                f"| {group} | {statistics.median(ratios):.1f} | {max(ratios):.1f} | {statistics.mean(overlaps):.0%} |"
            )


if __name__ == "__main__":
    main()
