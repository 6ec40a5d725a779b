"""Tiny random models of every supported architecture, and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 64},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 64},
    ),
}


@functools.cache
def make_tokenizer() -> Any:
    """Byte-level BPE of 300 tokens; encodes every language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the cat sat on the mat and the rat ran to the other hat"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE,
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )  # fmt: skip


def make_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32, eval mode; norms and biases are made non-trivial."""
    import torch
    import transformers

    family, special = ARCHITECTURES[architecture]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    tokenizer = make_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config_class(vocab_size=len(tokenizer), **{**SMALL, **special, **ids, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def save_model(directory: Path, architecture: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Path:
    """An ordinary model directory with tokenizer."""
    import torch

    make_model(architecture, **changes).to(getattr(torch, dtype)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def calibration(sequences: int = 6, seed: int = 0, length: int = 20) -> Any:
    """A small calibration set with padding, in the form that scorers take."""
    import torch

    class Fixed:
        def __init__(self) -> None:
            g = torch.Generator().manual_seed(seed)
            self.sequences = sequences
            self.batches = []
            for start in range(0, sequences, 2):
                ids = torch.randint(6, 260, (2, length), generator=g)
                mask = torch.ones_like(ids)
                mask[1, length - 3 - start :] = 0
                self.batches.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})

        def __iter__(self) -> Any:
            return iter(self.batches)

        def describe(self) -> dict[str, Any]:
            return {"source": "random ids", "sequences": self.sequences}

    return Fixed()
