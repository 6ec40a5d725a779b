"""A whole run in about a second: a random model, generated text, a dozen steps."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_model

from addlang.freeze.plan import FreezePlan
from addlang.freeze.proof import bits
from addlang.models import Checkpoint
from addlang.recipe import Recipe

SPEEDS = ("seconds", "tokens_per_second")


@functools.cache
def lexicon(seed: int = 0) -> list[str]:
    r = random.Random(seed)
    return ["".join(r.choice("abdegikmnopstuwy") for _ in range(r.randint(2, 7))) for _ in range(200)]


def text_rows(count: int, seed: int) -> list[dict[str, Any]]:
    r = random.Random(seed)
    return [{"text": " ".join(r.choices(lexicon(), k=r.randint(12, 30)))} for _ in range(count)]


def chat_rows(count: int, seed: int) -> list[dict[str, Any]]:
    r = random.Random(seed)
    say = lambda role: {"role": role, "content": " ".join(r.choices(lexicon(), k=8))}  # noqa: E731
    return [{"messages": [say("user"), say("assistant")]} for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class World:
    """Input files of runs, and recipes over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = str(save_model(root / "source"))
        self.text = write_rows(root / "text.jsonl", text_rows(60, 1))
        self.more = write_rows(root / "more.jsonl", text_rows(60, 2))
        self.english = write_rows(root / "english.jsonl", text_rows(6, 3))
        self.chat = write_rows(root / "chat.jsonl", chat_rows(20, 4))

    def data(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """A flat recipe of 12 steps; keys in ``changes`` replace its own, None removes one."""
        data: dict[str, Any] = {
            "model_name_or_path": self.model, "output_dir": str(output_dir), "language": "sw", "seed": 1,
            "datasets": [{"path": self.text}], "strategy": "ssu", "tokens": 1536, "sequence_length": 32, "batch_size": 4,
            "learning_rate": 1e-2, "save_steps": 5, "logging_steps": 1, "device": "cpu",
            "calibration": {"datasets": [{"path": self.chat, "role": "source"}], "sequences": 12, "sequence_length": 64},
            "evaluation": {
                "source_datasets": [{"path": self.english, "role": "source"}], "holdout": 0.15, "replies": None, "resamples": 100,
            },
        }  # fmt: skip
        return {k: v for k, v in {**data, **changes}.items() if v is not None}

    def recipe(self, output_dir: Path, **changes: Any) -> Recipe:
        return Recipe.parse(self.data(output_dir, **changes))


def without_weights(model: str, directory: Path) -> Path:
    """A model directory with everything of ``model`` but its weights."""
    directory.mkdir()
    for file in Path(model).iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).symlink_to(file)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Bit patterns of every tensor of a checkpoint, whatever its files."""
    return {n: bits(t) for f in sorted(directory.glob("model*.safetensors")) for n, t in load_file(f).items()}


def frozen_place(directory: Path) -> tuple[str, tuple[int, int]]:
    """A weight matrix and a position in it that the plan freezes."""
    plan = FreezePlan.load(directory / "freeze_plan.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    row, column = plan[name].mask().nonzero()[0].tolist()
    return name, (row, column)


def flip_bit(directory: Path, name: str, place: tuple[int, int]) -> None:
    file = directory / Checkpoint(directory).location[name]
    tensors = load_file(file)
    tensors[name].view(torch.int16)[place] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints are bit-identical."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The training log without wall-clock times."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in lines]


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL inside one process: no handler of errors sees it."""


def dying_at(call: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """``function`` that raises ``error`` instead of carrying out its ``call``-th call (counted from 1)."""
    count = 0

    def wrapped(*args: Any, **kw: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return function(*args, **kw)

    return wrapped
