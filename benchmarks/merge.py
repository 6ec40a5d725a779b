"""Memory and time of merging two models of the shapes of a 7B Llama, each method in a process of its own.

    python benchmarks/merge.py [--layers 32] [--shard 5] [--methods linear,ties] [--folder DIR] [--json FILE]

The models are random and written here: with 32 layers they have 6.7 billion parameters, 13.5 GB each, and the result as
much again. ``growth`` is the peak of the resident memory over what the process had after its imports. It includes pages of
the input files that happen to be mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 10**9
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"models": ["a", "b"]},
    "slerp": {"base_model": "a", "models": ["b"]},
    "task_arithmetic": {"base_model": "a", "models": ["b"], "parameters": {"weight": 0.5}},
    "ties": {"base_model": "a", "models": ["b"]},
    "dare_linear": {"base_model": "a", "models": ["b"], "parameters": {"density": 0.5}},
    "revert": {"model": "b", "source_model": "a", "parameters": {"scale": 0.8}},
}


def write_models(folder: Path, layers: int, shard: float) -> dict[str, Any]:
    """Two model directories, ``a`` and ``b``, without tokenizers; returns their size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from addlang.merge.write import SafetensorsFile

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0.0
    for name, shape in shapes.items():
        if size and size + 2 * torch.Size(shape).numel() > shard * GB:
            files.append({})
            size = 0
        files[-1][name] = ("BF16", shape)
        size += 2 * torch.Size(shape).numel()
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for number, model in enumerate("ab"):
        (folder / model).mkdir(parents=True)
        config.save_pretrained(folder / model)
        where = {}
        for k, table in enumerate(files, 1):
            file = f"model-{k:05d}-of-{len(files):05d}.safetensors"
            where |= dict.fromkeys(table, file)
            with SafetensorsFile(folder / model / file, table) as writer:
                for i, name in enumerate(writer.names):
                    values = (0.02 * noise.roll(977 * i) + number * 1e-3 * noise.roll(31 * i + 7)).bfloat16()
                    left = torch.Size(shapes[name]).numel()
                    while left:
                        writer.append(name, values[:left])
                        left -= min(left, len(values))
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = [p.stat().st_size for p in (folder / "a").glob("*.safetensors")]
    return {
        "parameters": sum(torch.Size(s).numel() for s in shapes.values()),
        "model_bytes": sum(sizes),
        "shard_bytes": max(sizes),
        "largest_tensor_bytes": max(2 * torch.Size(s).numel() for s in shapes.values()),
    }


def measure(method: str, folder: Path) -> dict[str, Any]:
    """One merge in this process: its peak of resident memory over what the imports took, and its time."""
    from addlang.merge.spec import parse
    from addlang.merge.write import merge_models, open_models

    names = {"models", "base_model", "model", "source_model"}
    data = {
        k: ([str(folder / n) for n in v] if isinstance(v, list) else str(folder / v)) if k in names else v
        for k, v in MERGES[method].items()
    }
    spec = parse({"merge_method": method, **data, "tokenizer_source": "ids"})
    open_models(spec)  # what is imported then belongs to the program, not to the models
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.monotonic()
    merge_models(spec, folder / "out")
    seconds = time.monotonic() - start
    return {"method": method, "growth": resident("VmHWM") - before, "seconds": round(seconds, 1)}


def resident(key: str) -> int:
    """Bytes, from /proc (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard", type=float, default=5.0, help="GB of one weight file")
    parser.add_argument("--methods", default=",".join(MERGES))
    parser.add_argument("--folder", type=Path, help="where to write the models; default: a temporary directory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        about = write_models(folder, args.layers, args.shard)
        print(
            f"{about['parameters'] / 1e9:.2f} billion parameters, {about['model_bytes'] / GB:.1f} GB; largest file "
            f"{about['shard_bytes'] / GB:.2f} GB, largest tensor {about['largest_tensor_bytes'] / GB:.2f} GB"
        )
        rows = []
        for method in args.methods.split(","):
            command = [sys.executable, __file__, "--one", method, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{method:16s} memory {rows[-1]['growth'] / GB:6.3f} GB  time {rows[-1]['seconds']:7.1f} s", flush=True
            )
            shutil.rmtree(folder / "out")
        if args.json:
            args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
