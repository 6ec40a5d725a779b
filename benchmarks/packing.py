"""Tokens per second of our packing against ``datasets.map``: tokenise, then group, as in the well-known run_clm recipe.

    python benchmarks/packing.py [--text FILE] [--tokenizer DIR] [--repeat 3] [--json FILE]

Both sides start from the same jsonl file and end with token sequences on disk; the token streams must be identical. The
recipe is timed twice, with two worker processes and with the tokenizer's own threads, and the faster one counts. Both
are timed in turn, the best of all repetitions is reported.

Tokens per core-second (processor time of all processes and threads) are reported beside tokens per second: they hardly
depend on what else the machine does.

Two changes to the recipe make the streams comparable, neither slows it down: eos is appended to every text, and the
remainder of a batch is kept as a short sequence (run_clm drops it, up to one sequence per thousand texts).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from addlang.data.memo import LLAMA3
from addlang.data.packing import pack_texts
from addlang.data.readers import read_records
from addlang.data.sources import read_rows
from addlang.recipe import DatasetSpec

LENGTH = 512


def generated_text(path: Path, documents: int = 24_000) -> None:
    """Documents of words whose frequencies follow Zipf's law."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 10))) for _ in range(50_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            drawn = rng.choices(words, weights, k=rng.randint(50, 500))
            sentences = [" ".join(drawn[i : i + 12]).capitalize() + "." for i in range(0, len(drawn), 12)]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")


def trained_tokenizer(path: Path) -> Any:
    """A byte-level BPE of 32,000 tokens, cut like that of Llama 3 and OLMo 2, trained on the first 20,000 rows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = (record["text"] for _, (_, record) in zip(range(20_000), read_records(path), strict=False))
    backend.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_max_length=10**9)


def ours(path: Path, tokenizer: Any, directory: Path) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    rows = read_rows(DatasetSpec.model_validate({"path": str(path)}))
    packed = pack_texts(rows, tokenizer, sequence_length=LENGTH, cache_dir=directory, fingerprint_parts=[])
    seconds = time.perf_counter() - begin
    return seconds, np.asarray(packed.tokens)


def recipe(path: Path, tokenizer: Any, directory: Path, workers: int | None) -> tuple[float, np.ndarray]:
    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer([text + tokenizer.eos_token for text in examples["text"]])

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain.from_iterable(values)) for key, values in examples.items()}
        total = len(joined["input_ids"])
        result = {key: [t[i : i + LENGTH] for i in range(0, total, LENGTH)] for key, t in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    begin = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(directory))
    tokens = raw.map(tokenize, batched=True, remove_columns=raw.column_names, num_proc=workers)
    grouped = tokens.map(group, batched=True, num_proc=workers)
    seconds = time.perf_counter() - begin
    stream = grouped.with_format("arrow")[:]["input_ids"].combine_chunks().flatten().to_numpy()
    return seconds, stream


def ratio(rates: dict[str, float]) -> float:
    """Ours to the better of the others."""
    return rates["addlang"] / max(rate for name, rate in rates.items() if name != "addlang")


def processor_seconds() -> float:
    """Of this process, its threads and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="jsonl file with a text column; default: generated text")
    parser.add_argument(
        "--tokenizer", help="directory of a tokenizer; default: a BPE of 32,000 tokens trained on the text"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        path = given.text or Path(scratch) / "text.jsonl"
        if given.text is None:
            generated_text(path)
        if given.tokenizer:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
        else:
            tokenizer = trained_tokenizer(path)
        sides: dict[str, tuple[str, Callable[[Path], tuple[float, np.ndarray]]]] = {
            "addlang": ("true", lambda d: ours(path, tokenizer, d)),
            "map, 2 processes": ("false", lambda d: recipe(path, tokenizer, d, 2)),
            "map, threads": ("true", lambda d: recipe(path, tokenizer, d, None)),
        }
        best: dict[str, float] = {}
        busy: dict[str, float] = {}
        reference: np.ndarray | None = None
        for _ in range(given.repeat):
            for name, (parallel, run) in sides.items():
                os.environ["TOKENIZERS_PARALLELISM"] = parallel
                directory = Path(tempfile.mkdtemp(dir=scratch))
                before = processor_seconds()
                seconds, stream = run(directory)
                used = processor_seconds() - before
                shutil.rmtree(directory)
                best[name] = min(seconds, best.get(name, seconds))
                busy[name] = min(used, busy.get(name, used))
                reference = stream if reference is None else reference
                assert np.array_equal(stream, reference), f"{name}: another token stream"
    assert reference is not None
    rates = {name: len(reference) / seconds for name, seconds in best.items()}
    per_core = {name: len(reference) / seconds for name, seconds in busy.items()}
    result = {
        "tokens": len(reference),
        "cores": len(os.sched_getaffinity(0)),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "tokens_per_core_second": {name: round(rate) for name, rate in per_core.items()},
        "ratio": round(ratio(rates), 2),
        "ratio_per_core_second": round(ratio(per_core), 2),
        "identical_streams": True,
    }
    for name, rate in rates.items():
        print(f"{name:>18}: {rate:12,.0f} tokens/s {per_core[name]:12,.0f} tokens per core-second")
    print(f"{'ratio':>18}: {result['ratio']:12} {'':8} {result['ratio_per_core_second']:12}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
