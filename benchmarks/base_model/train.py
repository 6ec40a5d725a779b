"""Train a small English instruct model, from nothing, in one command.

    python benchmarks/base_model/train.py --corpus ../shared/corpus --preset 5m --minutes 30 --output base-5m
    python benchmarks/base_model/train.py --data data.npz --preset 30m --device cuda --minutes 8 --output base-30m

Prose at a constant learning rate; then instructions in chat format with some prose, longer sequences, and the learning
rate going to zero. The speed of the first steps decides how many fit into ``--minutes``; the number of epochs over the
prose is limited, because more of them would only be learnt by heart. Interrupted, the same command continues from the
latest checkpoint. On a processor ``MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296`` in the environment
saves a fifth of the time. The result is an ordinary Hugging Face directory with ``train.json``: data and licences, settings,
tokens, seconds, and bits per byte on held-out text; ``heldout_en.jsonl`` is the English that it has not seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import prepare
from streams import Chats, Prepared, Prose, Rows

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "Name three animals that live in the sea.",
    "Write a short story about a king and his daughter.",
    "What is the capital of France?",
    "Rewrite the sentence in the past tense.\n\nShe walks to school with her brother.",
    "Anna has 5 apples and buys 7 more. How many apples does she have?",
)


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    learning_rate: float
    step_tokens: int
    lengths: tuple[int, int] = (512, 512)  # of sequences, in the first and the second stage
    warm_up: int = 100
    second_stage: float = 0.25  # share of the steps
    chat_share: float = 0.75  # of the second stage's sequences
    prose_epochs: float = 8
    weight_decay: float = 0.1
    clip: float = 1.0


PRESETS = {
    "tiny": Preset(64, 2, 128, 2, 3e-3, 1024, (64, 128), warm_up=4),  # for tests
    "5m": Preset(256, 4, 704, 4, 3e-3, 4096, (256, 512)),  # 5.3 M with 8,192 tokens
    "20m": Preset(448, 7, 1216, 7, 2e-3, 65536, warm_up=200),  # 20.7 M
    "30m": Preset(512, 8, 1408, 8, 2e-3, 65536, warm_up=200),  # 29.9 M
}


@dataclass(frozen=True)
class Plan:
    """Fixed once the speed is known."""

    steps: int
    second: int  # step at which the second stage begins
    tokens_per_second: float


def make_tokenizer(core: str, length: int) -> Any:
    """The tokenizer of transformers around the trained one."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core),
        eos_token=prepare.END,
        pad_token=prepare.PAD,
        additional_special_tokens=[prepare.SYSTEM, prepare.USER, prepare.ASSISTANT],
        chat_template=prepare.CHAT_TEMPLATE,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def make_model(preset: Preset, architecture: str, tokenizer: Any, tied: bool) -> Any:
    """Random weights from torch's current random state."""
    import transformers

    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    family = {"llama": "Llama", "olmo2": "Olmo2"}[architecture]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        intermediate_size=preset.intermediate_size,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_attention_heads,
        max_position_embeddings=preset.lengths[1],
        tie_word_embeddings=tied,
        **ids,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **ids)
    return model


class Batches:
    """The rows of every step."""

    def __init__(self, data: Prepared, preset: Preset, seed: int, pad: int) -> None:
        first, second = preset.lengths
        self.preset = preset
        self.prose = Prose(data.prose, first, seed), Prose(data.prose, second, seed + 1)
        self.chats = Chats(data, second, seed, pad)
        self.per_step = preset.step_tokens // first, preset.step_tokens // second

    def split(self) -> tuple[int, int]:
        """Rows of conversations and of prose in a step of the second stage."""
        rows = self.per_step[1]
        chats = min(rows - 1, round(rows * self.preset.chat_share)) if rows > 1 else 1
        return chats, rows - chats

    def step(self, step: int, plan: Plan | None) -> Rows:
        """Tokens and labels of a step."""
        if plan is None or step < plan.second:
            return self.prose[0].rows(step * self.per_step[0], self.per_step[0])
        chats, prose = self.split()
        at = step - plan.second
        parts = [self.chats.rows(at * chats, chats)]
        if prose:
            parts.append(self.prose[1].rows(at * prose, prose))
        tokens, labels = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(labels)

    def epochs(self, plan: Plan) -> dict[str, float]:
        """How often the data are seen in all."""
        chats, prose = self.split()
        second = plan.steps - plan.second
        return {
            "prose": round(
                plan.second * self.per_step[0] / self.prose[0].per_epoch + second * prose / self.prose[1].per_epoch,
                3,
            ),
            "instructions": round(self.chats.epochs(second * chats), 3),
        }


def make_plan(preset: Preset, data: Prepared, speed: float, seconds_left: float, steps: int | None) -> Plan:
    """As many steps as fit into the time, and as the prose allows.

    Args:
        speed: tokens per second.
        seconds_left: for training.
        steps: instead of what the time allows.
    """
    if steps is None:
        steps = int(speed * seconds_left / preset.step_tokens)
        share = 1 - preset.second_stage * preset.chat_share  # of the tokens that are prose
        steps = min(steps, int(preset.prose_epochs * len(data.prose) / share / preset.step_tokens))
    steps = max(steps, 2)
    return Plan(steps, min(steps - 1, round(steps * (1 - preset.second_stage))), round(speed, 1))


def rate(preset: Preset, step: int, plan: Plan | None) -> float:
    """Warm-up, constant, and linear to zero in the second stage."""
    warm = min(1.0, (step + 1) / preset.warm_up)
    if plan is None or step < plan.second:
        return preset.learning_rate * warm
    return preset.learning_rate * warm * (plan.steps - step) / (plan.steps - plan.second)


class Run:
    """One training run in a working directory beside the output."""

    def __init__(self, given: argparse.Namespace) -> None:
        import torch

        self.given = given
        self.preset = PRESETS[given.preset]
        self.device = given.device
        self.work = given.output.with_name(given.output.name + ".partial")
        self.work.mkdir(parents=True, exist_ok=True)
        self.data = Prepared.load(self._data_file())
        self.tokenizer = make_tokenizer(self.data.tokenizer, self.preset.lengths[1])
        torch.manual_seed(given.seed)
        self.model = make_model(self.preset, given.architecture, self.tokenizer, not given.untied).to(self.device)
        self.batches = Batches(self.data, self.preset, given.seed, self.tokenizer.pad_token_id)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": self.preset.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.next = 0
        self.seconds = 0.0  # of training
        self.plan: Plan | None = None
        self.settings = {
            "preset": given.preset,
            **asdict(self.preset),
            "architecture": given.architecture,
            "tied": not given.untied,
            "seed": given.seed,
            "data": self.data.facts,
        }
        self._resume()

    def _data_file(self) -> Path:
        if self.given.data is not None:
            return Path(self.given.data)
        path = self.work / "data.npz"
        if not path.is_file():
            prepare.prepare(
                self.given.corpus, path, vocabulary=self.given.vocabulary, noncommercial=self.given.noncommercial
            )
        return path

    def _resume(self) -> None:
        import torch

        path = self.work / "checkpoint.pt"
        if not path.is_file():
            return
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["settings"] != json.dumps(self.settings, sort_keys=True):
            raise SystemExit(f"'{path}' belongs to other settings: remove '{self.work}', or choose another --output")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.next, self.seconds = saved["next"], saved["seconds"]
        self.plan = Plan(**saved["plan"]) if saved["plan"] else None
        prepare.say(f"continues at step {self.next}")

    def _save(self) -> None:
        import torch

        path = self.work / "checkpoint.pt"
        state = {
            "settings": json.dumps(self.settings, sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "next": self.next,
            "seconds": self.seconds,
            "plan": asdict(self.plan) if self.plan else None,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of the tokens that carry a label, (B, L) each."""
        import torch

        from addlang.train.loss import token_loss

        kind = torch.device(self.device).type
        # on a processor, chunks that stay in its cache
        chunk = 1024 if kind == "cpu" else None
        with torch.autocast(kind, torch.bfloat16, enabled=not self.given.fp32):
            total, number = token_loss(self.model, {"input_ids": tokens, "labels": labels}, chunk_tokens=chunk)
        return total / number

    def tensors(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        tokens, labels = (torch.from_numpy(a) for a in rows)
        if torch.device(self.device).type == "cuda":
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def heldout_loss(self) -> float:
        """Nats per token on some held-out English, to see overfitting."""
        import torch

        length = self.preset.lengths[0]
        ids = self.tokenizer(self.data.heldout["texts"]["en"], add_special_tokens=False, verbose=False)["input_ids"]
        flat = np.array([t for document in ids for t in [*document, self.tokenizer.eos_token_id]], np.int64)
        rows = flat[: min(16, len(flat) // length) * length].reshape(-1, length)
        self.model.eval()
        with torch.no_grad():
            value = float(self.loss(*self.tensors((rows, rows))))
        self.model.train()
        return value

    def train(self) -> None:
        """Until the plan is carried out."""
        import torch

        given, preset = self.given, self.preset
        measured = (10, 50) if given.steps is None else (0, 2)
        self.model.train()
        started = saved = time.monotonic()
        before = self.seconds
        mark = started
        losses: list[torch.Tensor] = []
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as log:
            while self.plan is None or self.next < self.plan.steps:
                step = self.next
                learning_rate = rate(preset, step, self.plan)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                loss = self.loss(*self.tensors(self.batches.step(step, self.plan)))
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), preset.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                self.next += 1
                now = time.monotonic()
                if self.plan is None and self.next in measured:
                    float(loss.detach())  # waits for the device
                    now = time.monotonic()
                    if self.next == measured[0]:
                        mark = now
                    else:
                        speed = (measured[1] - measured[0]) * preset.step_tokens / (now - mark)
                        left = given.minutes * 60 - (now - started) - given.reserve
                        plan = make_plan(preset, self.data, speed, left, given.steps)
                        if given.steps is None:
                            plan = replace(plan, steps=plan.steps + self.next, second=plan.second + self.next)
                        self.plan = plan
                        prepare.say(f"{plan} {self.batches.epochs(plan)}")
                if self.next % given.logging_steps == 0 or (self.plan and self.next == self.plan.steps):
                    mean = float(torch.stack(losses).mean())
                    losses.clear()
                    if not math.isfinite(mean):
                        raise SystemExit(f"the loss is {mean} at step {self.next}")
                    now = time.monotonic()
                    row: dict[str, Any] = {"step": self.next, "loss": round(mean, 4), "lr": round(learning_rate, 7)}
                    row["seconds"] = round(before + now - started, 1)
                    if self.next % (10 * given.logging_steps) == 0:
                        row["heldout"] = round(self.heldout_loss(), 4)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    prepare.say(json.dumps(row))
                if now - saved > given.save_minutes * 60:
                    self.seconds = before + time.monotonic() - started
                    self._save()
                    saved = time.monotonic()
        self.seconds = before + time.monotonic() - started
        self._save()

    def finish(self) -> dict[str, Any]:
        """Write the model, measure it as written, and put it in its place."""
        import torch

        assert self.plan is not None
        target = self.work / "model"
        shutil.rmtree(target, ignore_errors=True)
        self.model.to(torch.bfloat16).save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        shutil.copyfile(self.work / "log.jsonl", target / "train_log.jsonl")
        held = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.data.heldout["texts"]["en"]]
        (target / "heldout_en.jsonl").write_text("".join(held), encoding="utf-8")
        tokens = self.plan.steps * self.preset.step_tokens
        facts = {
            **self.settings,
            "parameters": self.model.num_parameters(),
            "steps": self.plan.steps,
            "second_stage_from": self.plan.second,
            "tokens": tokens,
            "epochs": self.batches.epochs(self.plan),
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9)),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "compute": "float32" if self.given.fp32 else "bfloat16 autocast, float32 weights",
            "versions": versions(),
            **measure(target, self.data.heldout, self.device),
        }
        (target / "train.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.given.output.exists():
            self.given.output.rmdir()
        target.rename(self.given.output)
        shutil.rmtree(self.work)
        return facts


def measure(directory: Path, heldout: dict[str, Any], device: str) -> dict[str, Any]:
    """Bits per byte of held-out text and of answers given their prompts, and a few replies, in float32."""
    import torch
    import transformers

    from addlang.evaluate.generation import greedy, stop_ids
    from addlang.evaluate.likelihood import log_likelihoods
    from addlang.evaluate.perplexity import bits_per_byte

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    length = model.config.max_position_embeddings
    batch = 64 if torch.device(device).type == "cuda" else 8
    bits = {}
    for language, texts in heldout["texts"].items():
        documents = [(str(i), text) for i, text in enumerate(texts)]
        measurement = bits_per_byte(
            model,
            tokenizer,
            documents,
            sequence_length=length,
            batch_size=batch,
            role="source" if language == "en" else "target",
            language=language,
            task=f"heldout-{language}",
        )
        bits[language] = round(
            sum(i.numerator for i in measurement.items) / sum(i.denominator for i in measurement.items), 4
        )
    sequences, starts, size = [], [], 0
    for prompt, answer in heldout["chats"]:
        asked, answered = (tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (prompt, answer))
        if len(asked) + len(answered) <= length:
            sequences.append(asked + answered)
            starts.append(len(asked))
            size += len(answer.removesuffix(prepare.END).encode())
    nats = -sum(log_likelihoods(model, sequences, starts, batch_size=batch))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats
    ]
    room = max(1, min(64, length - max(map(len, prompts))))
    replies = greedy(model, tokenizer, prompts, max_new_tokens=room, batch_size=8, stop_ids=stop_ids(model, tokenizer))
    return {
        "bits_per_byte": bits,
        "answers_bits_per_byte": round(nats / math.log(2) / max(size, 1), 4),
        "replies": [
            {"prompt": p, "reply": tokenizer.decode(r, skip_special_tokens=True)}
            for p, r in zip(PROMPTS, replies, strict=True)
        ],
    }


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    import tokenizers
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, metavar="DIR")
    source.add_argument("--data", type=Path, metavar="FILE.npz", help="written by prepare.py, instead of the corpus")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="5m")
    parser.add_argument("--architecture", choices=("llama", "olmo2"), default="llama")
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embeddings")
    parser.add_argument("--vocabulary", type=int, default=8192, help="with --corpus")
    parser.add_argument(
        "--noncommercial", choices=("none", "instructions", "all"), default="instructions", help="see prepare.py"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--reserve", type=float, default=90, help="seconds of them kept for the measurements at the end"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logging_steps", type=int, default=25)
    parser.add_argument("--save_minutes", type=float, default=2)
    parser.add_argument("--export-parts", type=Path, metavar="DIR", help="write the result there too, in small files")
    return parser


@contextlib.contextmanager
def torch_settings(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments().parse_args(argv)
    if given.output.exists() and (not given.output.is_dir() or any(given.output.iterdir())):
        raise SystemExit(f"'{given.output}' exists and is not an empty directory")
    with torch_settings(given.threads):
        run = Run(given)
        run.train()
        facts = run.finish()
    if given.export_parts is not None:
        from join import split

        split(given.output, given.export_parts)
    json.dump(facts, sys.stdout, indent=2, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
