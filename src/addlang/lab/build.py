"""The lab's base model, from nothing: a tokenizer, a Llama of 0.9 million parameters, one plain training loop.

The model learns English instructions and English text of the lab world; the other two languages are a trace (0.3 % of
the tokens each), as in a real model that has met a language without knowing it. Bit-identical for a seed on one machine
and thread count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from addlang.errors import AddlangError
from addlang.lab import world

if TYPE_CHECKING:
    import torch

VOCABULARY = 900
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# One token ends turns and documents, and separates packed documents. There is no token for the beginning.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}
{%- elif message['role'] in ('user', 'system') -%}
<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{%- else -%}
{{ raise_exception('the lab model knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""
ROWS, ROW_LENGTH = 3, 256  # 768 tokens per step
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, CLIP = 3e-3, 0.1, 0.05, 1.0
MIXTURE = {"english": 0.8, "en": 0.194, "sw": 0.003, "hi": 0.003}  # shares of the training tokens
USER_WEIGHT = 0.2  # of the loss on a user's turn: enough to write instructions too, without drowning the answers
ITEMS, ITEMS_SEED = 480, 1  # what the stated score is measured on


def build(
    output_dir: str | os.PathLike[str],
    seed: int = 0,
    steps: int = 3600,
    threads: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train the base model and write it as an ordinary Hugging Face directory.

    Args:
        output_dir: must not exist or be empty; appears only when complete.
        seed: decides data, order and initial weights.
        steps: of 768 tokens.
        threads: of torch; default: as many as it uses already. Another number gives slightly other weights.
        progress: called after every step with the number of steps done and the loss (nats per token).

    Returns:
        The contents of ``lab.json``: settings, sizes, score and hash of the weights.
    """
    import torch

    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AddlangError(
            f"'{output}' exists and is not an empty directory", "give another directory for the lab model"
        )
    if steps < 1:
        raise AddlangError(f"the lab model needs at least one step, not {steps}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _deterministic(seed, threads):
        tokenizer = make_tokenizer(seed)
        model = make_model(tokenizer)
        train(model, training_data(tokenizer, steps, seed), progress)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            model.to(torch.bfloat16).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            facts = _describe(temporary, seed, steps, torch.get_num_threads())
            (temporary / "lab.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            temporary.chmod(0o755)  # both mkdtemp and safetensors leave what only their owner can read
            for file in temporary.iterdir():
                file.chmod(0o644)
            if output.exists():
                output.rmdir()
            temporary.rename(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return facts


def make_tokenizer(seed: int) -> Any:
    """Byte-level BPE, mostly English like the model, with some of the other scripts so that Hindi is not all bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    # Digits stand alone, which makes arithmetic learnable; combining marks belong to words, or Devanagari would be cut
    # at every vowel sign.
    words = Regex(r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [m["content"] for c in world.conversations("english", 8000, seed) for m in c]
    texts += world.documents("en", 2000, seed) + world.documents("sw", 200, seed) + world.documents("hi", 200, seed)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any) -> Any:
    """A Llama with untied embeddings, initialised from torch's current random state."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=3,
            intermediate_size=384,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


class TrainingData(NamedTuple):
    """All tokens in the order of training, (steps, rows, row length) each."""

    tokens: torch.Tensor
    weights: torch.Tensor  # of each token in the loss
    documents: torch.Tensor  # number of the document or conversation that the token belongs to


def training_data(tokenizer: Any, steps: int, seed: int) -> TrainingData:
    """Whole documents and conversations, shuffled, packed and cut into rows."""
    import torch

    needed = steps * ROWS * ROW_LENGTH
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    pieces: list[tuple[list[int], list[float]]] = []
    for source, share in MIXTURE.items():
        have, batch = 0, 0
        while have < share * needed:
            for ids in tokenizer(_texts(source, 2000, seed, batch), add_special_tokens=False)["input_ids"]:
                if have >= share * needed:
                    break
                asked = ids.index(assistant) + 1 if source == "english" else 0
                pieces.append((ids, [USER_WEIGHT] * asked + [1.0] * (len(ids) - asked)))
                have += len(ids)
            batch += 1
    random.Random(f"order/{seed}").shuffle(pieces)
    shape = (steps, ROWS, ROW_LENGTH)
    tokens = torch.tensor([token for ids, _ in pieces for token in ids][:needed])
    weights = torch.tensor([weight for _, row in pieces for weight in row][:needed])
    documents = torch.tensor([i for i, (ids, _) in enumerate(pieces) for _ in ids][:needed])
    return TrainingData(tokens.view(shape), weights.view(shape), documents.view(shape))


def _texts(source: str, n: int, seed: int, batch: int) -> list[str]:
    """A batch of one source as text with its special tokens, conversations as the chat template writes them."""
    batch_seed = 1000 * seed + batch
    if source != "english":
        return [text + END for text in world.documents(source, n, batch_seed)]
    return [
        f"{USER}{user['content']}{END}{ASSISTANT}{assistant['content']}{END}"
        for user, assistant in world.conversations(source, n, batch_seed)
    ]


def train(model: Any, data: TrainingData, progress: Callable[[int, float], None] | None = None) -> None:
    """AdamW on the weighted mean of next-token losses, in place and in float32; ``progress`` as for :func:`build`."""
    import torch

    steps = len(data.tokens)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    model.train()
    for step, (tokens, weight, document) in enumerate(zip(*data, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        mask, positions = isolate(document)
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = output.logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * weight[:, 1:]).sum() / weight[:, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval()


def isolate(document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each packed document only: without it the model learns to copy from its prompt far more slowly.

    Args:
        document: number of each token's document, (B, L).

    Returns:
        The mask, (B, 1, L, L) and true where attended, and positions that begin anew in every document, (B, L).
    """
    import torch

    B, L = document.shape
    mask = (document[:, :, None] == document[:, None, :]).tril()
    index = torch.arange(L).expand(B, L)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    first = torch.where(begins, index, 0).cummax(1).values
    return mask[:, None], index - first


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def evaluate_exact_match(model: Any, tokenizer: Any, items: list[world.Item], batch_size: int = 64) -> list[bool]:
    """Whether each item is answered exactly, by greedy decoding."""
    from addlang.evaluate.exact_match import chat_prompt
    from addlang.evaluate.generation import greedy, stop_ids

    prompts = [chat_prompt(tokenizer, item.prompt) for item in items]
    replies = greedy(
        model, tokenizer, prompts, max_new_tokens=48, batch_size=batch_size, stop_ids=stop_ids(model, tokenizer)
    )
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
    return [world.score_exact_match(text, item) for text, item in zip(texts, items, strict=True)]


def _describe(directory: Path, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Measure the model as it was written: its bfloat16 weights, computing in float32."""
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    right = evaluate_exact_match(model, tokenizer, world.exact_match_items(ITEMS, ITEMS_SEED))
    return {
        "seed": seed,
        "steps": steps,
        "tokens": steps * ROWS * ROW_LENGTH,
        "threads": threads,
        "exact_match": {
            "items": ITEMS,
            "items_seed": ITEMS_SEED,
            "language": "en",
            "value": round(sum(right) / len(right), 4),
            "compute": "float32",
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "dtype": "bfloat16",
        "sha256": sha256(directory / "model.safetensors"),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _deterministic(seed: int, threads: int | None) -> Iterator[None]:
    """Seeded, deterministic torch; afterwards everything is as it was."""
    import torch

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])
