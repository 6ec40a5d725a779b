"""The sum of the token losses of a batch, without ever holding the logits of the whole batch.

fp32 logits of 16 k tokens and a vocabulary of 100 k take 6.1 GiB, and their gradient as much again. Here the head runs
over a chunk of tokens at a time and each chunk leaves only its share of the gradients of the head's input and weight.
These are computed in the forward pass, because the loss of a batch is a plain sum: nothing is computed twice, so the
arithmetic is that of the plain path (the idea is that of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).

The model is called as a whole and its head is told to hand over its input, so that the hooks of FSDP2, DDP and peft see
an ordinary forward pass, whose output carries the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addlang.errors import AddlangWarning

IGNORED = -100
CHUNK_ELEMENTS = 1 << 26  # of the logits of one chunk: 256 MiB in fp32
INPUTS = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True)
class _Form:
    """What the model does with the head's output: ``logits = scale * cap * tanh(output / cap)``; no cap: identity."""

    softcap: float | None
    scale: float


_forms: WeakKeyDictionary[nn.Module, _Form | None] = WeakKeyDictionary()


def token_loss(model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int | None = None) -> tuple[Tensor, int]:
    """Cross-entropy of a causal language model, summed over the tokens that carry a label.

    Args:
        model: a causal LM of transformers, also inside peft, DDP or FSDP2.
        batch: ``input_ids`` [B, T] and ``labels`` [B, T] (label of position t is predicted from t - 1, -100: no loss);
            optional ``position_ids`` (restart them to isolate packed documents), ``attention_mask`` and ``weights`` [B, T],
            by which each label's loss is multiplied.
        chunk_tokens: tokens that go through the head at a time; by default as many as 256 MiB of fp32 logits hold.

    Returns:
        The sum of the token losses (fp32 scalar, float64 for a float64 model) and the number of label tokens.
    """
    inputs = {k: batch[k] for k in INPUTS if batch.get(k) is not None}
    labels = batch["labels"][:, 1:]
    where = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[where]
    weights = None if batch.get("weights") is None else batch["weights"][:, 1:][where]
    inner = _inner(model)
    form, head = _form(inner, inputs), _head(inner)
    if form is None or head is None:
        logits = model(**inputs, use_cache=False).logits[where]
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        each = nn.functional.cross_entropy(wide, targets, reduction="none")
        return (each if weights is None else each * weights).sum(), targets.numel()

    steps = batch["labels"].shape[1]
    rows = where[0] * steps + where[1]  # positions in the flattened batch
    loss: list[Tensor] = []

    def head_loss(head: nn.Linear, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        picked = flat if rows.numel() == flat.shape[0] else flat.index_select(0, rows)
        settings = (form.softcap, form.scale, chunk_tokens, weights)
        loss.append(linear_cross_entropy(picked, head.weight, head.bias, targets, *settings))
        return loss[-1].detach().view(1, 1, 1)  # stands in for the logits: models go on to scale them

    with _head_replaced(head, head_loss), _loss_function_replaced(inner, lambda *_, **__: loss[-1]):
        # labels make the model return our loss as its own, so that wrappers find it in the output and hook it
        output = model(**inputs, labels=batch["labels"], use_cache=False, return_dict=True)
    # sharding may cast a model's outputs to 16 bits; the loss itself is returned then
    return (output.loss if output.loss.dtype == loss[-1].dtype else loss[-1]), targets.numel()


@torch.no_grad()
def token_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of every label on its own: (losses [n] fp32, rows [n], columns [n] of the labels in the batch)."""
    inputs = {k: batch[k] for k in INPUTS if batch.get(k) is not None}
    labels = batch["labels"][:, 1:]
    where = (labels != IGNORED).nonzero(as_tuple=True)
    targets, steps = labels[where], batch["labels"].shape[1]
    inner = _inner(model)
    form, head = _form(inner, inputs), _head(inner)
    if form is None or head is None:
        logits = model(**inputs, use_cache=False).logits[where].float()
        return nn.functional.cross_entropy(logits, targets, reduction="none"), where[0], where[1] + 1
    out: list[Tensor] = []

    def each(head: nn.Linear, hidden: Tensor) -> Tensor:
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where[0] * steps + where[1])
        chunk = chunk_tokens or max(128, CHUNK_ELEMENTS // head.weight.shape[0])
        for i in range(0, max(len(targets), 1), chunk):
            logits = nn.functional.linear(picked[i : i + chunk], head.weight, head.bias)
            if form.softcap is not None:
                logits = (logits / form.softcap).tanh() * form.softcap
            out.append(
                nn.functional.cross_entropy((logits * form.scale).float(), targets[i : i + chunk], reduction="none")
            )
        return hidden[..., :1]  # stands in for the logits

    with _head_replaced(head, each):
        model(**inputs, use_cache=False, return_dict=True)
    return torch.cat(out), where[0], where[1] + 1


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of ``cross_entropy(scale * cap(hidden @ weight.T + bias), targets)``.

    Args:
        hidden: [n, d].
        weight: [V, d].
        bias: [V] or None.
        targets: int64 [n].
        softcap: the output is first mapped to ``softcap * tanh(output / softcap)`` (Gemma 2).
        chunk_tokens: rows of ``hidden`` per chunk.
        weights: [n], of every row in the sum.
    """
    if chunk_tokens is None:
        chunk_tokens = max(128, CHUNK_ELEMENTS // weight.shape[0])
    compute = hidden.dtype
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, softcap, scale, chunk_tokens, compute, weights
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunked; the gradients are made in forward and multiplied by the incoming scalar in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int,
        compute: torch.dtype,
        weights: Tensor | None,
    ) -> Tensor:
        want_h, want_w, want_b = ctx.needs_input_grad[:3]
        n = hidden.shape[0]
        wide = torch.float64 if compute == torch.float64 else torch.float32
        w = weight.to(compute)
        b = None if bias is None else bias.to(compute)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        one = n <= chunk
        dh = torch.empty_like(hidden) if want_h and not one else None
        dw = None if one or not want_w else torch.zeros(weight.shape, dtype=wide, device=weight.device)
        db = torch.zeros(w.shape[0], dtype=wide, device=weight.device) if want_b else None
        with torch.autocast(hidden.device.type, enabled=False):  # the types are chosen above
            for i in range(0, max(n, 1), chunk):
                h, t = hidden[i : i + chunk].to(compute), targets[i : i + chunk].unsqueeze(1)
                z = nn.functional.linear(h, w, b)  # [c, V]
                tanh = None
                if softcap is not None:
                    tanh = (z / softcap).tanh_()
                    z = tanh * softcap
                if scale != 1.0:
                    z = z * scale
                p = torch.log_softmax(z, -1, dtype=wide)
                del z
                picked = p.gather(1, t)
                v = None if weights is None else weights[i : i + chunk].to(wide).unsqueeze(1)
                total -= picked.sum() if v is None else (picked * v).sum()
                if not (want_h or want_w or want_b):
                    continue
                p = p.exp_().scatter_(1, t, picked.exp_().sub_(1.0))  # d loss / d logits
                if v is not None:
                    p.mul_(v)
                if scale != 1.0:
                    p.mul_(scale)
                if tanh is not None:
                    p.mul_(1 - tanh.to(wide).square_())
                if db is not None:
                    db += p.sum(0)
                dz = p.to(compute)
                del p, tanh  # memory is shortest here
                if want_h and one:
                    dh = (dz @ w).to(hidden.dtype)
                elif dh is not None:
                    dh[i : i + chunk] = dz @ w
                if want_w and one:
                    dw = dz.t() @ h
                elif dw is not None:
                    if compute == wide:
                        dw.addmm_(dz.t(), h)
                    else:  # chunks are added in fp32: sums of bf16 chunks would round once per chunk
                        add_product(dw, dz, h)
                del dz
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None or bias is None else db.to(bias.dtype)
        ctx.gradients = (dh, dw, db)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the token loss was backpropagated a second time; the first has used its gradients up")
        gradients, ctx.gradients = ctx.gradients, None
        # a 0-dim factor keeps each gradient's type
        return (*(None if g is None else g.mul_(grad) for g in gradients), None, None, None, None, None, None)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a.T @ b`` for a 16-bit product, which is never there as a whole; out: fp32 [V, d], a: [n, V], b: [n, d]."""
    rows = max(1, CHUNK_ELEMENTS // b.shape[1])
    for i in range(0, out.shape[0], rows):
        out[i : i + rows] += a[:, i : i + rows].t() @ b


def _inner(model: nn.Module) -> Any:
    """The transformers model inside DDP and peft."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _head(inner: Any) -> nn.Linear | None:
    """The linear layer that makes the logits; None where the head is anything else."""
    if isinstance(inner, torch._dynamo.OptimizedModule):  # its forward is compiled and cannot be told anything
        return None
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is not None and hasattr(head, "modules_to_save"):  # peft's wrapper around a trained head
        head = head.modules_to_save[head.active_adapters[0]] if head.active_adapters else head.original_module
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return head if plain else None


def _form(inner: Any, inputs: Mapping[str, Tensor]) -> _Form | None:
    """What :func:`_probe` found out about a model, once."""
    if inner not in _forms:
        _forms[inner] = _probe(inner, inputs)
    return _forms[inner]


def _probe(inner: Any, inputs: Mapping[str, Tensor]) -> _Form | None:
    """How the model turns its head's output into logits, found by handing it a known output; None: unknown."""
    head = _head(inner)
    reason = "its head is not a plain linear layer"
    if head is not None:
        sent: list[Tensor] = []

        def known(head: nn.Linear, hidden: Tensor) -> Tensor:
            width = head.weight.shape[0]
            values = torch.linspace(-40.0, 40.0, width, dtype=torch.float64, device=hidden.device)
            sent.append(values.expand(*hidden.shape[:-1], width))
            return sent[-1]

        short = {k: v[:1, :2] for k, v in inputs.items() if v.dim() == 2}
        devices = [head.weight.device] if head.weight.is_cuda else []
        # dropout must draw here what it would have drawn without the probe, or a resumed run would differ
        with torch.random.fork_rng(devices), torch.no_grad(), _head_replaced(head, known):
            logits = inner(**short, use_cache=False, return_dict=True).logits
        reason = "the head's output becomes logits in a way that is not known"
        if len(sent) == 1 and logits.shape == sent[0].shape:
            softcap = getattr(inner.config, "final_logit_softcapping", None)
            capped = sent[0] if softcap is None else (sent[0] / softcap).tanh() * softcap
            scale = float((logits.double() * capped).sum() / capped.square().sum())
            same = torch.allclose(logits.double(), scale * capped, rtol=1e-6, atol=1e-6)
            if same and hasattr(type(inner), "loss_function"):
                return _Form(softcap, 1.0 if abs(scale - 1.0) < 1e-12 else scale)
    warnings.warn(
        f"{type(inner).__name__}: {reason}, so the logits of a whole batch are held in memory",
        AddlangWarning,
        stacklevel=3,
    )
    return None


@contextmanager
def _head_replaced(head: nn.Linear, forward: Callable[[nn.Linear, Tensor], Tensor]) -> Iterator[None]:
    """Within this context ``head(x)`` is ``forward(head, x)``; its module hooks, such as FSDP2's, still run."""
    head.forward = lambda x: forward(head, x)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def _loss_function_replaced(inner: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    before = inner.__dict__.get("_loss_function")
    inner._loss_function = function
    try:
        yield
    finally:
        if before is None:
            del inner._loss_function
        else:
            inner._loss_function = before
