"""What mergekit makes of three tiny models, kept as numbers so that parity is tested where mergekit is not installed.

``python tests/merge/mergekit_reference.py`` (with mergekit installed) writes ``mergekit.safetensors`` anew: inputs under
``base/``, ``a/``, ``b/``, ``far/``, results under the name of a case. Everything is fp32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).with_name("mergekit.safetensors")
MODELS = ("base", "a", "b", "far")
CONFIG = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def _models(first: dict[str, Any], second: dict[str, Any] | None = None, names: str = "ab") -> list[dict[str, Any]]:
    return [{"model": m, "parameters": p} for m, p in zip(names, (first, second or first), strict=True)]


CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": _models({"weight": 0.3}, {"weight": 0.9})},
    "linear_sum": {
        "merge_method": "linear", "models": _models({"weight": 0.3}, {"weight": 0.9}), "parameters": {"normalize": False},
    },
    "slerp_far": {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "far"}], "parameters": {"t": 0.3},
    },
    "slerp_near": {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "a"}], "parameters": {"t": 0.3},
    },
    "slerp_filters": {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "far"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0.0, 0.5, 0.3, 1.0]}, {"filter": "mlp", "value": [1.0, 0.2]}, {"value": 0.5}]},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": _models({"weight": 0.5}, {"weight": 0.8}),
        "parameters": {"lambda": 0.7},
    },
    "ties": {
        "merge_method": "ties", "base_model": "base", "models": _models({"weight": 1.0, "density": 0.3}, {"weight": 0.6, "density": 0.5}),
    },
    "ties_sum": {
        "merge_method": "ties", "base_model": "base", "models": _models({"weight": 0.5, "density": 0.2}),
        "parameters": {"normalize": False, "lambda": 1.5},
    },
    "dare_linear": {
        "merge_method": "dare_linear", "base_model": "base", "models": _models({"weight": 0.5, "density": 0.5}),
        "parameters": {"rescale": True},
    },
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "base", "models": _models({"weight": 0.5, "density": 0.5}, {"weight": 0.9, "density": 0.5}),
        "parameters": {"rescale": True},
    },
}  # fmt: skip


def drawn(shape: tuple[int, ...]) -> torch.Tensor:
    """The elements that DARE keeps, in both programs: half of them, in an order that depends on the shape alone."""
    n = int(torch.tensor(shape).prod())
    return ((torch.arange(n) * 7919 + n) % 10 < 5).view(shape)


def stored() -> tuple[dict[str, torch.Tensor], str]:
    """The fixture, and the version of mergekit that made it."""
    with safe_open(FIXTURE, "pt") as f:
        return {n: f.get_tensor(n) for n in f.keys()}, f.metadata()["mergekit"]  # noqa: SIM118


def write_inputs(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The fixture's inputs as model directories below ``root``, without tokenizers."""
    from transformers import LlamaConfig

    for name in MODELS:
        own = {n.removeprefix(f"{name}/"): t for n, t in tensors.items() if n.startswith(f"{name}/")}
        (root / name).mkdir(parents=True)
        save_file(own, root / name / "model.safetensors", metadata={"format": "pt"})
        LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"], dtype="float32").save_pretrained(root / name)


def case(name: str, root: Path) -> dict[str, Any]:
    """A case with the models' directories in place of their names."""

    def place(value: Any) -> Any:
        return str(root / value) if value in MODELS else value

    data = {**CASES[name]}
    data["models"] = [{**m, "model": place(m["model"])} for m in data["models"]]
    return {k: place(v) if isinstance(v, str) else v for k, v in data.items()}


def run_mergekit(name: str, root: Path) -> dict[str, torch.Tensor]:
    """One case through mergekit, with DARE's draw replaced by :func:`drawn`."""
    from unittest.mock import patch

    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    out = root / "mergekit" / name
    config = MergeConfiguration.model_validate({**case(name, root), "dtype": "float32"})
    with patch("torch.bernoulli", lambda p: drawn(tuple(p.shape)).to(p.dtype)):
        run_merge(config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
    return {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}


def _inputs() -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shapes = {n: p.shape for n, p in LlamaForCausalLM(LlamaConfig(**CONFIG)).named_parameters()}
    base = {n: torch.randn(s) for n, s in shapes.items()}
    tensors = {f"base/{n}": t for n, t in base.items()}
    for name, size in (("a", 0.02), ("b", 0.02), ("far", 2.0)):
        tensors |= {f"{name}/{n}": t + size * torch.randn(t.shape) for n, t in base.items()}
    return tensors


if __name__ == "__main__":
    from importlib.metadata import version

    tensors = _inputs()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), tensors)
        results = {f"{c}/{n}": t for c in CASES for n, t in run_mergekit(c, Path(folder)).items()}
    save_file({**tensors, **results}, FIXTURE, metadata={"mergekit": version("mergekit")})
