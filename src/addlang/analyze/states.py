"""Mean hidden states: one vector per text and layer, reduced inside the forward pass so that no state is kept.

What is averaged: the real tokens of a text. Pads and a leading beginning-of-sequence token are left out: the latter
draws huge activations in many models (attention sinks) and would dominate every mean. Layer 0 is the embedding, layer k
the output of decoder layer k; the final norm is not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    import torch

    from addlang.analyze.base import Context

BATCH = 16
PROMPTS = ("prompt", "turns", "question")  # columns, in order of preference; MT-Bench keeps turns in a list


@dataclass(frozen=True)
class Chosen:
    """Texts to run models on.

    Attributes:
        texts: at least one.
        template: ask them as a user through the chat template, or give them as they are.
        max_tokens: longer ones are cut.
        source: where they come from, in words.
    """

    texts: tuple[str, ...]
    template: bool
    max_tokens: int
    source: str


def choose_prompts(
    context: Context,
    names: Sequence[str],
    path: str | None,
    *,
    limit: int | None,
    template: bool | None,
    max_tokens: int,
) -> Chosen:
    """Prompts of a file, see :func:`prompt_rows`, or the built-in English ones.

    Args:
        template: None: use the chat template if every model has one.
    """
    from addlang.data.builtin_sets import builtin

    rows, source = prompt_rows(path or str(builtin("prompts_en")), context.base_dir), path or "built-in English prompts"
    rows = rows[:limit] if limit else rows
    if template is None:
        template = all(_has_template(context.model(name)) for name in names)
    return Chosen(tuple(rows), template, max_tokens, f"{source} ({len(rows)})")


def choose_texts(context: Context, name: str, *, limit: int | None, max_tokens: int) -> Chosen:
    """The rows of a data set, as plain text."""
    from addlang.data.sources import read_rows

    spec = context.text(name)
    if limit:
        spec = spec.model_copy(update={"limit": limit if spec.limit is None else min(limit, spec.limit)})
    texts = [row.content for row in read_rows(spec, base_dir=context.base_dir)]
    return Chosen(tuple(texts), False, max_tokens, f"{spec.path} ({len(texts)})")


def prompt_rows(path: str, base_dir: Path | None = None) -> list[str]:
    """What the user says first, row by row: of prompts, of MT-Bench's turns, or of conversations.

    Raises:
        AddlangError: a row without any of these.
    """
    from addlang.data.readers import read_records, row_error
    from addlang.data.sources import read_rows
    from addlang.schema import DatasetSpec

    rows = read_rows(DatasetSpec.model_validate({"path": path}), base_dir=base_dir)
    records = [(file, line, record) for file in rows.files or [] for line, record in read_records(file)]
    if not records or _prompt_of(records[0][2]) is None:
        return [next((m["content"] for m in row.messages or () if m["role"] == "user"), row.content) for row in rows]
    out = []
    for file, line, record in records:
        prompt = _prompt_of(record)
        if prompt is None:
            raise row_error(str(file), line, "there is no prompt", f"give one of the columns {', '.join(PROMPTS)}")
        out.append(prompt)
    return out


def _prompt_of(record: dict[str, Any]) -> str | None:
    value = next((record[k] for k in PROMPTS if record.get(k)), None)
    first = value[0] if isinstance(value, list) else value
    return first if isinstance(first, str) else None


def _has_template(directory: Path) -> bool:
    from addlang.models import load_tokenizer

    return bool(getattr(load_tokenizer(directory), "chat_template", None))


def states_of(directory: Path, chosen: Chosen, *, device: str = "cpu") -> torch.Tensor:
    """Load a model and run it over the texts: [layers + 1, n, d] float64."""
    import torch

    from addlang.models import load_model, load_tokenizer
    from addlang.progress import progress

    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype=torch.float32 if device == "cpu" else None, device=device)
    ids = encode(tokenizer, chosen)
    with progress(f"states of {directory.name}", total=len(ids), unit="texts") as bar:
        return mean_states(model, ids, bos=tokenizer.bos_token_id, progress=bar.update)


def encode(tokenizer: Any, chosen: Chosen) -> list[list[int]]:
    """Token ids of every text.

    Raises:
        AddlangError: a text of no tokens.
    """
    from addlang.evaluate.exact_match import chat_prompt

    if chosen.template:
        ids = [chat_prompt(tokenizer, text) for text in chosen.texts]
    else:
        ids = [list(tokenizer(text, verbose=False)["input_ids"]) for text in chosen.texts]
    for text, tokens in zip(chosen.texts, ids, strict=True):
        if not tokens:
            raise AddlangError(f"the text {text[:40]!r} has no tokens", "remove empty rows")
    return [tokens[: chosen.max_tokens] for tokens in ids]


def mean_states(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    bos: int | None = None,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Token means of every layer, [layers + 1, n, d] float64, rows in the order of ``sequences``.

    Args:
        sequences: token ids; longer than the model's positions is an error.
        bos: id that is left out where it stands first (unless it is the only token).

    Raises:
        AddlangError: NaN or infinite activations, or a sequence that is too long.
    """
    import torch

    from addlang.evaluate.generation import inference
    from addlang.train.shard import decoder_layers

    layers = decoder_layers(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences))
    if limit is not None and longest > limit:
        raise AddlangError(f"a text of {longest} tokens exceeds the model's {limit} positions", "lower max_tokens")
    means: list[torch.Tensor | None] = [None] * (len(layers) + 1)
    weight: torch.Tensor | None = None  # [B, 1, T], rows sum to 1

    def reduce(index: int, hidden: torch.Tensor) -> None:
        wide = torch.float64 if hidden.device.type == "cpu" and hidden.dtype == torch.float64 else torch.float32
        means[index] = torch.bmm(weight.to(wide), hidden.to(wide)).squeeze(1).double().cpu()  # type: ignore[union-attr]

    def before_first(_module: Any, args: Any, kwargs: Any) -> None:
        reduce(0, args[0] if args else kwargs["hidden_states"])

    def after(index: int) -> Callable[..., None]:
        return lambda _module, _args, output: reduce(index, output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(i + 1)) for i, layer in enumerate(layers)]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    out: torch.Tensor | None = None
    try:
        with inference(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask, counted = _padded([sequences[i] for i in rows], bos)
                weight = (counted / counted.sum(1, keepdim=True)).unsqueeze(1).to(model.device)
                padded = not bool(mask.all())
                model.base_model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device) if padded else None,
                    use_cache=False,
                )
                stacked = torch.stack([m for m in means if m is not None])
                if out is None:
                    out = torch.empty(len(means), len(sequences), stacked.shape[-1], dtype=torch.float64)
                out[:, rows] = stacked
                if progress is not None:
                    progress(start + len(rows))
    finally:
        for handle in handles:
            handle.remove()
    assert out is not None
    if not bool(torch.isfinite(out).all()):
        raise AddlangError("the model's activations are NaN or infinite on these texts", "check the checkpoint")
    return out


def _padded(sequences: Sequence[Sequence[int]], bos: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and attention mask (B, T) int64, padded on the right, and which tokens count (B, T) float64."""
    import torch

    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    counted = torch.zeros(ids.shape, dtype=torch.float64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        first = int(len(tokens) > 1 and tokens[0] == bos)
        counted[row, first : len(tokens)] = 1.0
    return ids, mask, counted
