"""Memory of training, by part and per device, before any weight is loaded; and what to change where it does not fit."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from addlang.errors import AddlangError
from addlang.train.shard import ALONE, World, sharding_of

if TYPE_CHECKING:
    import torch

    from addlang.freeze.plan import FreezePlan, Frozen
    from addlang.recipe import Phase

GIB = 2**30
USABLE = 0.93  # of a GPU's nominal memory: the CUDA context, the allocator's rounding and fragmentation take the rest
# of that, what resident weights may leave at most: on a CPU a process takes more than its tensors (docs/performance.md)
ROOM = {"cuda": 0.85, "cpu": 0.5}
Form = Literal["masked", "assemble", "resident"]


def estimate(
    config: Any,
    plan: FreezePlan,
    phase: Phase,
    *,
    micro: int,
    stored_bytes: int,
    compute_bytes: int,
    form: Form,
    shards: int = 1,
    besides: int = 0,
    accumulated: bool = False,
) -> dict[str, int]:
    """Bytes of every part of one training step on one device, at the moment when it needs most.

    Args:
        config: the model's configuration (widths, layers, heads, vocabulary).
        micro: sequences per forward pass.
        stored_bytes: bytes per element of the checkpoint (2 for bf16).
        compute_bytes: bytes per element of activations (2 under bf16 autocast, 4 in fp32).
        form: masked execution keeps whole tensors as masters as soon as one element of them is trained; the resident
            split form keeps dense weights in the compute type.
        shards: devices that weights, gradients and optimizer state are spread over (FSDP2).
        besides: trained elements that are none of the model's own (adapters).
        accumulated: a step has several forward passes, so that all but the first find every gradient there; with guards,
            which come before the target text, all of them do.

    Returns:
        ``frozen_weights``, ``trained_weights``, ``compute_copies``, ``gathered`` (of other devices' shards),
        ``gradients``, ``optimizer``, ``guards``, ``activations`` (what passes and loss need besides, less the gradients
        that are not yet there at that moment) and their ``total``.
    """
    outer = (config.vocab_size, config.hidden_size)
    if form != "masked" and not splits(config, plan):
        form = "masked"  # whole tensors only: every layer is an ordinary one
    trained, frozen, partly, restored = besides, 0, 0, 0
    for entry in plan.entries.values():
        free = entry.numel - entry.frozen_count
        n = entry.numel if free and (form == "masked" or entry.shape == outer) else free
        trained += n
        frozen += entry.numel - n
        if _partly(entry) and entry.shape != outer:
            partly += entry.numel
            if form == "masked":
                restored += entry.frozen_count  # their values are kept besides, to be put back after every step
    master = 4 if phase.master_weights == "fp32" else stored_bytes
    kept = stored_bytes if compute_bytes < 4 or phase.master_weights == "model" else max(stored_bytes, compute_bytes)
    head = config.vocab_size * config.hidden_size
    tied = bool(config.tie_word_embeddings)
    # the dense weight takes the place of a frozen part of the same type
    copies = 0
    if form == "resident":
        copies = partly * compute_bytes - (min(frozen, partly) * kept if kept == compute_bytes else 0)
    layers = max(1, config.num_hidden_layers)
    body = max(0, trained + frozen - (1 if tied else 2) * head)
    gathered = 0
    if shards > 1:
        # two layers (one is fetched ahead) in the compute type with one layer's gradients; embedding and head whole
        gathered = (2 * compute_bytes + master) * body // layers
        gathered += (1 if tied else 2) * head * 2 * master
    outside = [e for e in plan.entries.values() if e.shape == outer]  # one where they are tied
    embedding = outside[0] if outside else None
    # the 8-bit optimizer keeps fp32 moments for the input embedding, if that is trained
    wide = 6 * head if phase.optimizer == "adamw_8bit" and embedding and embedding.frozen_count < embedding.numel else 0
    first, *others = [master * (e.numel if e.frozen_count < e.numel else 0) // shards for e in outside] or [0]
    awake = trained - phase.strategy.asleep(plan)
    gradients = awake * master // shards
    guards = phase.all_guards
    kept_by_guards = [g.kept_bytes(stored_bytes, master) for g in guards]
    parts = {
        "frozen_weights": (frozen * kept + restored * master) // shards,
        "trained_weights": trained * master // shards,
        "compute_copies": max(0, copies),
        "gathered": gathered,
        "gradients": gradients,
        "optimizer": (round(awake * optimizer_bytes(phase, master)) + wide) // shards,
        "guards": trained * sum(kept_by_guards) // shards,
    }
    cast = 0  # 16-bit copies of trained weights that autocast makes for a product
    if form == "masked" and compute_bytes < master and shards == 1:
        cast = max(0, trained - besides - (1 if tied else 2) * head) * compute_bytes
    elif form == "assemble":
        cast = partly * compute_bytes  # dense weights; without checkpointing each lives inside one product only
    common: dict[str, Any] = {
        "residual_bytes": master,
        "checkpointing": phase.activation_checkpointing,
        "cast": cast,
        "cast_kept": form == "masked",
        "shared": form != "masked",
        "embedding": 0 if tied else first,
        "head": (others[0] if others else first) if outside else 0,
    }
    length = phase.sequence_length
    # the guards of a step run before its target text, so that this finds every gradient there
    missing = 0 if accumulated or guards else gradients
    eager = (phase.attn_implementation or getattr(config, "_attn_implementation", None)) == "eager"
    scores = config.num_attention_heads * length**2 * score_bytes(config, compute_bytes) if eager else 0
    moments = [passes(config, micro * length, compute_bytes, missing=missing, scores=micro * scores, **common)]
    rows = max((g.rows_per_pass(micro, length, config.vocab_size) for g in guards), default=0)
    if rows:
        common |= {"missing": 0, "scores": rows * scores, "whole_logits": True}
        moments.append(passes(config, rows * length, compute_bytes, **common))
    if any(kept_by_guards):  # the distance from the source, its multiple and its square, tensor by tensor
        moments.append(3 * max(e.numel for e in plan.entries.values() if e.frozen_count < e.numel) * master // shards)
    parts["activations"] = max(moments)
    if prepared := max((g.begin_bytes(stored_bytes, master) for g in guards), default=0):
        # before there is an optimizer, and before activations are checkpointed
        one = passes(
            config,
            length,
            compute_bytes,
            **{**common, "missing": 0, "scores": scores, "checkpointing": False, "whole_logits": True},
        )
        before = parts["frozen_weights"] + parts["trained_weights"] + trained * prepared // shards + one
        parts["guards_prepare"] = max(0, before - sum(parts.values()))
    return {**parts, "total": sum(parts.values())}


def splits(config: Any, plan: FreezePlan) -> list[Frozen]:
    """Matrices that are frozen in part; embedding and head are never split, a frozen row of them is laid over."""
    outer = (config.vocab_size, config.hidden_size)
    return [e for e in plan.entries.values() if len(e.shape) > 1 and e.shape != outer and _partly(e)]


def _partly(entry: Frozen) -> bool:
    return 0 < entry.frozen_count < entry.numel


def passes(
    config: Any,
    tokens: int,
    bytes_per: int,
    *,
    residual_bytes: int,
    checkpointing: bool,
    cast: int,
    cast_kept: bool,
    shared: bool,
    missing: int,
    embedding: int,
    head: int,
    scores: int = 0,
    whole_logits: bool = False,
) -> int:
    """The most that forward, loss and backward need beside weights, optimizer and all gradients, in bytes.

    Gradients come into being as activations go, so the sum of both is largest at one end of the backward pass: when it
    enters the last layer, or when it leaves the first. Measured against a GPU in ``docs/performance.md``.

    Args:
        tokens: of one forward pass.
        bytes_per: bytes per element of the compute type.
        residual_bytes: bytes per element of the residual stream, which has the type of the trained embedding.
        cast: bytes of all weights in the compute type, where they are made for the product.
        cast_kept: autocast keeps these until backward has used them.
        shared: layers with one input (q, k, v; gate, up) keep one copy of it.
        missing: bytes of all gradients, if none is there when backward begins.
        embedding: bytes of the gradient of an embedding that is not tied to the head; it comes last.
        head: bytes of the head's gradient, which the loss makes in the forward pass.
        scores: bytes of attention that each layer keeps for all pairs of query and key, where it is not fused.
        whole_logits: the loss is that of a guard, which takes the logits of all tokens at once.
    """
    from addlang.train.loss import CHUNK_ELEMENTS

    d, f, layers = config.hidden_size, config.intermediate_size, max(1, config.num_hidden_layers)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or d // heads
    q, kv = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    stream = tokens * d * residual_bytes
    narrow = bytes_per < residual_bytes
    inputs = (2 if shared else 5) * bytes_per * d if narrow else 0  # of attention and MLP, cast to the compute type
    # two norms keep their input and the normalised input; queries and keys before and after rotation, values and the
    # output of attention; gate, its activation, up, and the product of both, of which a split layer keeps half
    layer = (
        4 * stream
        + tokens * inputs
        + scores
        + tokens * bytes_per * (2 * (q + kv) + 2 * q + 2 * kv + 4 * f - (f // 2 if shared and not checkpointing else 0))
    )
    passing = 3 * tokens * f * bytes_per  # gradients inside one MLP
    rows = max(128, CHUNK_ELEMENTS // config.vocab_size)
    # a chunk's logits and their gradient; of a guard the logits, in fp32 their logarithms and the gradients of both
    chunk = min(tokens, rows) * config.vocab_size * (bytes_per + 4)
    if whole_logits:
        chunk = tokens * config.vocab_size * (bytes_per + 12)
    loss = (
        chunk + head // 4 * bytes_per + tokens * d * bytes_per
    )  # the weight in the compute type, gradient of the input
    stack = layers * (stream if checkpointing else layer)
    whole_cast = cast if cast_kept else 0
    one_cast = cast // layers if checkpointing or not cast_kept else 0
    inside = (layer if checkpointing else 0) + passing + one_cast
    later = max(0, missing - embedding - head) // layers  # gradients of one layer
    moments = (
        whole_cast + stack + loss + head - missing,  # at the end of the forward pass
        (0 if checkpointing else whole_cast) + stack + inside + head - missing,  # backward enters the last layer
        (layer if not checkpointing else 0) + inside - (embedding + later if missing else 0),  # and the first one
        2 * stream,  # the gradient of the embedding
    )
    return max(moments)


def score_bytes(config: Any, bytes_per: int) -> int:
    """Bytes that eager attention keeps for backward per head, query and key: the softmax in fp32, what was cast of it for
    the product with the values, and what Gemma 2's soft cap made."""
    cap = getattr(config, "attn_logit_softcapping", None) is not None
    return 4 + (bytes_per if bytes_per < 4 else 0) + (bytes_per if cap else 0)


def optimizer_bytes(phase: Phase, master: int) -> float:
    """Bytes of optimizer state per trained element."""
    if phase.optimizer == "adamw_8bit":
        return 2 * (1 + 4 / 256)  # two moments, each with one fp32 scale per block of 256
    return 8.0 if phase.optimizer == "adamw_bf16_sr" else 2.0 * master


@dataclass(frozen=True)
class Choice:
    """Settings of a phase and what they need.

    Attributes:
        changes: recipe keys with new values; empty: the recipe as it is.
        micro: sequences per forward pass.
        memory: see :func:`estimate`.
    """

    changes: Mapping[str, Any]
    micro: int
    memory: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.memory["total"]

    def __str__(self) -> str:
        said = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in self.changes.items())
        return f"{said or 'the recipe as it is'} ({self.total / GIB:.1f} GiB)"


# from what changes nothing in the result to what changes most; each set stands for itself
PRECISION: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_bf16_sr", "master_weights": "model"},
    {"optimizer": "adamw_8bit", "master_weights": "model"},
)


PASS = ("per_device_train_batch_size", "gradient_accumulation_steps", "batch_size")  # how a step is divided


def choices(
    config: Any,
    plan: FreezePlan,
    phase: Phase,
    *,
    micro: int,
    batch: int,
    stored: torch.dtype,
    forms: tuple[Form, ...],
    room: float,
    **about: Any,
) -> Iterator[Choice]:
    """Settings that need less and less, the most faithful first: smaller passes, checkpointing, then precision.

    Each is one that a run accepts, with as many sequences per optimizer step as the recipe has.

    Args:
        micro: sequences per forward pass of the recipe; smaller ones are tried too.
        batch: sequences per optimizer step, over all devices.
        stored: type of the checkpoint.
        forms, room: see :func:`taken`.
        about: the remaining arguments of :func:`estimate`.
    """
    executions: tuple[dict[str, Any], ...] = ({}, {"execution": "split_assemble"}) if forms == ("resident",) else ({},)
    for precision in PRECISION:
        if precision.get("master_weights") == "model" and stored.itemsize > 2:
            continue  # a checkpoint in fp32 stays fp32
        for checkpointing in (False, True) if not phase.activation_checkpointing else (True,):
            passes = [d for d in range(micro, 0, -1) if micro % d == 0]
            for execution, sequences in itertools.product(executions, passes):
                changes = {k: v for k, v in precision.items() if getattr(phase, k) != v} | execution
                if checkpointing and not phase.activation_checkpointing:
                    changes["activation_checkpointing"] = True
                changes |= smaller_passes(phase, micro, sequences, batch)
                changed = accepted(phase, changes, stored)
                if changed is None:
                    continue
                now = {
                    **about,
                    "stored_bytes": stored.itemsize,
                    "compute_bytes": stored.itemsize if changed.master_weights == "model" else about["compute_bytes"],
                    "accumulated": about.get("accumulated", False) or sequences < micro,
                }
                own: tuple[Form, ...] = ("assemble",) if execution else forms
                _, memory = taken(config, plan, changed, forms=own, room=room, micro=sequences, **now)
                yield Choice(changes, sequences, memory)


def smaller_passes(phase: Phase, micro: int, sequences: int, batch: int) -> dict[str, Any]:
    """Recipe keys for ``sequences`` in place of ``micro`` per forward pass, with the same ``batch`` per optimizer step."""
    if sequences == micro:
        return {}
    passes = phase.gradient_accumulation_steps
    if passes is None:
        # without a batch_size the recipe's own passes may be what makes the step as large as it is
        pinned = phase.batch_size is None and phase.per_device_train_batch_size is not None
        return {"per_device_train_batch_size": sequences, **({"batch_size": batch} if pinned else {})}
    size = {} if phase.per_device_train_batch_size is None else {"per_device_train_batch_size": sequences}
    return {**size, "gradient_accumulation_steps": passes * micro // sequences}


def accepted(phase: Phase, changes: Mapping[str, Any], stored: torch.dtype) -> Phase | None:
    """The phase with other settings, or None where a run would refuse them."""
    from addlang.train.optimizers import check_types

    if not changes:
        return phase
    given = {k: getattr(phase, k) for k in phase.model_fields_set}
    try:
        changed = type(phase).model_validate({**given, **changes})
        check_types(changed, stored)
    except (ValueError, AddlangError):  # pydantic's is a ValueError
        return None
    return changed


def that_fit(found: Iterator[Choice], available: float, count: int = 3) -> list[Choice]:
    """The first ``count`` choices within ``available`` bytes that differ in more than the size of a pass."""
    kept: list[Choice] = []
    seen: set[str] = set()
    for choice in found:
        key = str({k: v for k, v in choice.changes.items() if k not in PASS})
        if choice.total <= available and choice.changes and key not in seen:
            seen.add(key)
            kept.append(choice)
        if len(kept) == count:
            break
    return kept


@contextlib.contextmanager
def explain_out_of_memory(
    model: Any,
    plan: FreezePlan,
    phase: Phase,
    *,
    micro: int,
    device: torch.device,
    stored: torch.dtype,
    world: World = ALONE,
    batch: int | None = None,
) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what needs how much and which settings would fit.

    Args:
        batch: sequences per optimizer step over all processes; None: one forward pass of each.

    Raises:
        AddlangError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
        if not ran_out(error):
            raise
        kept, besides = phase.strategy.footprint(model, plan)
        raise out_of_memory(
            model.config, kept, phase, micro=micro, device=device, stored=stored, world=world, besides=besides,
            batch=batch,
        ) from error  # fmt: skip


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the host."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def out_of_memory(
    config: Any,
    plan: FreezePlan,
    phase: Phase,
    *,
    micro: int,
    device: torch.device,
    stored: torch.dtype,
    world: World = ALONE,
    besides: int = 0,
    batch: int | None = None,
) -> AddlangError:
    """The error with the estimate and at most three settings that would fit."""
    from addlang.train.loop import compute_dtype

    batch = batch or micro * world.size
    available = device_memory(device) * USABLE
    about: dict[str, Any] = {
        "besides": besides,
        "accumulated": batch > micro * world.size,
        "compute_bytes": (compute_dtype(phase, device) or stored).itemsize,
        "forms": forms_of(config, plan, phase, devices=world.size),
        "room": ROOM[device.type] * available,
        "shards": world.size if sharding_of(phase, world) == "fsdp" else 1,
    }
    _, need = taken(config, plan, phase, micro=micro, stored_bytes=stored.itemsize, **about)
    fits = that_fit(choices(config, plan, phase, micro=micro, batch=batch, stored=stored, **about), available)
    parts = ", ".join(f"{k.replace('_', ' ')} {v / GIB:.1f}" for k, v in need.items() if v and k != "total")
    if fits:
        fix = "one of: " + "; ".join(map(str, fits))
    else:
        fix = "no setting of one device would fit: shard over more devices (torchrun --nproc-per-node N), or raise the strategy's ratio"
    return AddlangError(
        f"memory ran out in phase '{phase.name}': training needs about {need['total'] / GIB:.1f} GiB per device "
        f"({parts}), and {available / GIB:.1f} GiB can be used",
        fix,
    )


def forms_of(
    config: Any, plan: FreezePlan, phase: Phase, *, splittable: bool = True, devices: int = 1
) -> tuple[Form, ...]:
    """Forms of execution that the phase may take, the fastest first; see :func:`taken`.

    Args:
        splittable: whether split execution can run the plan.
    """
    parts = splits(config, plan)
    if phase.execution == "masked" or not splittable or any(e.kind == "elements" for e in parts):
        return ("masked",)
    if phase.execution == "split_resident":
        return ("resident",)
    if phase.execution == "split_assemble" or devices > 1 or not parts:  # resident weights cannot be sharded
        return ("assemble",)
    return ("resident", "assemble")


def taken(
    config: Any, plan: FreezePlan, phase: Phase, *, forms: tuple[Form, ...], room: float, **about: Any
) -> tuple[Form, dict[str, int]]:
    """The first of the forms that needs at most ``room`` bytes, or else the last, and its :func:`estimate`."""
    for form in forms:
        memory = estimate(config, plan, phase, form=form, **about)
        if memory["total"] <= room:
            break
    return form, memory


def settle(
    model: Any,
    plan: FreezePlan,
    phase: Phase,
    *,
    micro: int,
    device: torch.device,
    stored: torch.dtype,
    world: World = ALONE,
    batch: int | None = None,
    began: str | None = None,
) -> Phase:
    """The phase with an ``execution`` that leaves nothing to choose: what ``auto`` and ``split`` come to on this device.

    Args:
        model: loaded, and not attached yet.
        batch: as of :func:`explain_out_of_memory`.
        began: the ``execution`` that this came to when the run began. It is kept where it is possible: assembled always, resident on
            one process with room for it.
    """
    from addlang.freeze.split import why_not_split
    from addlang.train.loop import compute_dtype

    kept, besides = phase.strategy.footprint(model, plan)
    if phase.execution not in ("auto", "split") or besides or not splits(model.config, plan):
        return phase
    splittable = why_not_split(model, plan) is None
    if not splittable and phase.execution == "split":
        return phase  # it is refused when it is attached, with the reason
    forms = forms_of(model.config, kept, phase, splittable=splittable, devices=world.size)
    form, _ = taken(
        model.config,
        kept,
        phase,
        forms=("assemble",) if began == "split_assemble" and "assemble" in forms else forms,
        room=(1.0 if began == "split_resident" else ROOM[device.type]) * free_memory(device, model),
        micro=micro,
        stored_bytes=stored.itemsize,
        compute_bytes=(compute_dtype(phase, device) or stored).itemsize,
        accumulated=(batch or micro) > micro,
    )
    return phase.model_copy(update={"execution": form if form == "masked" else f"split_{form}"})


def device_memory(device: torch.device) -> int:
    """All memory of the device, or of the host for the CPU, in bytes."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device, model: Any = None) -> float:
    """What of :func:`device_memory` training can use: what other processes leave, with what this one holds already.

    Args:
        model: on the device, if it is loaded.
    """
    import torch

    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device)
        return min(USABLE * device_memory(device), torch.cuda.mem_get_info(device)[0] + own)
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0.0
    own = 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
    return min(USABLE * device_memory(device), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + own)
