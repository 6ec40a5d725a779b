"""Memory of training, by part, before any weight is loaded (bytes per device)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addlang.freeze.plan import FreezePlan
    from addlang.recipe import Phase


def estimate(
    config: Any, plan: FreezePlan, phase: Phase, *, micro: int, stored_bytes: int, compute_bytes: int, masked: bool
) -> dict[str, int]:
    """Bytes of every part of one training step.

    Args:
        config: the model's configuration (widths, layers, heads, vocabulary).
        micro: sequences per forward pass.
        stored_bytes: bytes per element of the checkpoint (2 for bf16).
        compute_bytes: bytes per element of activations (2 under bf16 autocast, 4 in fp32).
        masked: masked execution keeps whole tensors as masters as soon as one element of them is trained.

    Returns:
        ``frozen_weights``, ``trained_weights``, ``compute_copies``, ``gradients``, ``optimizer``, ``activations``,
        ``logits`` and their ``total``.
    """
    trained = frozen = 0
    for entry in plan.entries.values():
        n = entry.numel if masked and entry.kind != "all" else entry.numel - entry.frozen_count
        trained += n
        frozen += entry.numel - n
    master = 4 if phase.master_weights == "fp32" else stored_bytes
    # autocast keeps one low-precision copy of every trained matrix during forward and backward
    copies = trained * compute_bytes if compute_bytes < master else 0
    tokens = micro * phase.sequence_length
    parts = {
        "frozen_weights": frozen * (stored_bytes if compute_bytes < 4 else max(stored_bytes, compute_bytes)),
        "trained_weights": trained * master,
        "compute_copies": copies,
        "gradients": trained * master,
        "optimizer": 2 * trained * master,
        "activations": activations(config, tokens, compute_bytes, checkpointing=phase.activation_checkpointing),
        "logits": logits(config, tokens),
    }
    return {**parts, "total": sum(parts.values())}


def activations(config: Any, tokens: int, bytes_per: int, *, checkpointing: bool) -> int:
    """What the backward pass needs of all layers: 2 norms' inputs, attention's q, k, v and output, three of the MLP."""
    d, f = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or d // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    q = heads * head
    # residual stream twice and normalised inputs twice; q, k, v after rotation; attention output; gate, up, act, product
    one_layer = tokens * bytes_per * (4 * d + 2 * q + 2 * kv + q + 4 * f) + 2 * tokens * 4 * d
    layers = config.num_hidden_layers
    if checkpointing:
        return tokens * bytes_per * d * layers + one_layer
    return one_layer * layers


def logits(config: Any, tokens: int) -> int:
    """The chunked head holds at most 256 MiB of fp32 logits and their gradient at a time."""
    return min(tokens * config.vocab_size * 4, 256 * 2**20) * 2
