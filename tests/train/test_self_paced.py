"""Self-paced learning: the definitions, what a stage trains on, exact resume, and the same on both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer
from torch import nn

from addlang.errors import AddlangError
from addlang.recipe import Recipe
from addlang.run import execute
from addlang.schema import SelfPaced
from addlang.train import loop
from addlang.train.loss import linear_cross_entropy, token_loss, token_losses
from addlang.train.self_paced import SelfPacedData, rate_at, select
from tinyrun import Killed, World, chat_rows, dying_at, metrics, same, write_rows

STEPS = 12


# ---- definitions


@pytest.mark.parametrize(
    ("pacing", "middle"), [("linear", 0.7), ("geometric", 0.4**0.5), ("root", ((0.4**2 + 1) / 2) ** 0.5)]
)
def test_the_rate_grows_from_start_to_one(pacing: Any, middle: float) -> None:
    settings = SelfPaced(start=0.4, pacing=pacing)
    rates = [rate_at(settings, stage, 5) for stage in range(5)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[2] == pytest.approx(middle)
    assert rates[4] == pytest.approx(1.0)
    assert rates == sorted(rates)


def test_hard_weights_choose_the_easiest_share() -> None:
    v, threshold = select(np.array([3.0, 1.0, 2.0, 5.0, 4.0]), 0.4, "hard")
    assert v.tolist() == [0, 1, 1, 0, 0]
    assert threshold == 3.0
    assert select(np.array([3.0, 1.0, 2.0]), 1.0, "hard")[0].tolist() == [1, 1, 1]


def test_linear_weights_fall_from_one_to_nothing_at_the_threshold() -> None:
    v, threshold = select(np.array([3.0, 1.0, 2.0, 4.0]), 0.5, "linear")
    assert threshold == 3.0
    assert v.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert select(np.array([2.0, 4.0]), 1.0, "linear")[0].tolist() == [0.5, 0]


def test_ties_go_to_the_first() -> None:
    assert select(np.zeros(3), 0.4, "linear")[0].tolist() == [1, 1, 0]
    assert select(np.full(3, 2.0), 0.1, "linear")[0].tolist() == [1, 0, 0]


def test_weights_multiply_the_loss_of_each_label_and_its_gradient() -> None:
    model = make_model("gemma2", final_logit_softcapping=5.0).double()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 260, (2, 12), generator=g)
    labels = ids.masked_fill(torch.rand(2, 12, generator=g) < 0.3, -100)
    weights = torch.rand(2, 12, generator=g)
    batch = {"input_ids": ids, "labels": labels, "weights": weights}
    loss, count = token_loss(model, batch, chunk_tokens=5)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    plain = (each * weights[:, 1:].flatten()).sum()
    plain.backward()
    assert count == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_losses_of_single_labels_sum_to_the_loss(architecture: str) -> None:
    changes = {"final_logit_softcapping": 5.0} if architecture == "gemma2" else {}
    model = make_model(architecture, **changes)
    ids = torch.randint(6, 260, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, :6] = -100
    batch = {"input_ids": ids, "labels": labels}
    each, rows, columns = token_losses(model, batch, chunk_tokens=4)
    assert float(each.sum()) == pytest.approx(float(token_loss(model, batch)[0].detach()), rel=1e-5)
    assert columns[rows == 1].tolist() == [6, 7, 8, 9]
    alone = token_loss(model, {"input_ids": ids[1:2], "labels": labels[1:2]})[0]
    assert float(each[rows == 1].sum()) == pytest.approx(float(alone.detach()), rel=1e-4)


def test_a_weight_of_one_changes_nothing() -> None:
    hidden, head = torch.randn(7, 4), torch.randn(9, 4)
    targets = torch.randint(0, 9, (7,))
    one = linear_cross_entropy(hidden, head, None, targets, weights=torch.ones(7))
    assert torch.equal(one, linear_cross_entropy(hidden, head, None, targets))


# ---- in a run


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Any:
    chat = write_rows(tmp_path / "chat.jsonl", chat_rows(70, 51))

    def make(out: str, **changes: Any) -> Recipe:
        sampler = changes.pop("sampler", {})
        settings = {
            "datasets": [{"path": chat}, {"path": world.text, "weight": 0.3}], "sequence_length": 96, "strategy": "full",
            "tokens": STEPS * 4 * 80, "learning_rate": 3e-3,
            "sampler": None if sampler is None else {"name": "self_paced", "update_every": 3, **sampler},
        }  # fmt: skip
        return world.recipe(tmp_path / out, **{**settings, **changes})

    return make


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sampler and every batch that the loop is given."""
    seen: list[Any] = []
    original = SelfPacedData.batch

    def batch(self: SelfPacedData, first: int, count: int) -> Any:
        arrays = original(self, first, count)
        chosen = [self._select(s)[0] for s in range(2)]
        seen.append((self, self.stage, first, count, arrays, chosen, self.losses.copy(), self.uses.copy()))
        return arrays

    monkeypatch.setattr(SelfPacedData, "batch", batch)
    return seen


@pytest.mark.usefixtures("offline")
def test_every_stage_trains_on_the_easiest_of_each_data_set(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    path = execute(recipe("out"))
    assert [stage for _, stage, *_ in seen] == sorted(stage for _, stage, *_ in seen)
    tokenizer = make_tokenizer()
    for sampler, stage, first, count, arrays, chosen, losses, _ in seen:
        sources = sampler.data.mixture.locate_many(first, count)[0]
        for source in (0, 1):
            units, own = sampler.units[source], chosen[source]
            number = max(1, int(np.ceil(rate_at(sampler.settings, stage, sampler.stages) * len(units))))
            assert int(own.sum()) == number
            easiest = np.sort(losses[sampler._own(source)])[:number]
            assert np.sort(losses[sampler._own(source)][own > 0]).tolist() == easiest.tolist()
            allowed = {
                tokenizer.decode(units.packed.tokens[b:e].tolist())
                for b, e, v in zip(units.begins, units.ends, own, strict=True)
                if v
            }
            for row in np.flatnonzero(sources == source):
                ids = arrays["input_ids"][row]
                if source == 1:  # a sequence of raw text
                    assert tokenizer.decode(ids[: np.argmax(ids == tokenizer.pad_token_id) or None].tolist()) in allowed
                    continue
                starts = np.flatnonzero(arrays["position_ids"][row] == 0)
                parts = [tokenizer.decode(p.tolist()) for p in np.split(ids, starts[1:])]
                conversations = [p for p in parts if "<|user|>" in p]
                assert conversations
                assert all(p in allowed for p in conversations)
    rows = metrics(path)
    assert (rows[0]["sampler_rate"], rows[-1]["sampler_rate"]) == (0.4, 1.0)
    assert rows[-1]["sampler_units"] == sum(len(u) for u in seen[-1][0].units)


@pytest.mark.usefixtures("offline")
def test_the_losses_are_the_models_mean_over_each_units_labels(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    monkeypatch.setattr(loop, "token_loss", dying_at(1, loop.token_loss, Killed()))
    with pytest.raises(Killed):
        execute(recipe("out"))
    sampler = seen[0][0]
    model = sampler.attached.model.float().eval()
    units = sampler.units[0]
    for i in (0, 7, 31):
        ids = torch.from_numpy(units.packed.tokens[units.begins[i] : units.ends[i]].astype(np.int64))[None]
        carries = torch.from_numpy(units.packed.loss[units.begins[i] : units.ends[i]] != 0)[None]
        labels = ids.masked_fill(~carries, -100)
        loss, count = token_loss(model, {"input_ids": ids, "labels": labels})
        assert sampler.losses[i] == pytest.approx(float(loss.detach()) / count, rel=1e-4)


@pytest.mark.usefixtures("offline")
def test_units_are_used_equally_often(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    execute(recipe("out", sampler={"start": 1.0, "update_every": 2}))
    sampler, *_, uses = seen[-1]
    own = uses[sampler._own(0)]
    assert own.max() - own.min() <= 1


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("step", "weights"), [(8, "linear"), *(pytest.param(s, "hard", marks=pytest.mark.slow) for s in (3, 4, 9))]
)
def test_killed_and_resumed_it_is_bit_identical(
    step: int, weights: str, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sampler": {"weights": weights}, "save_steps": 2}
    execute(recipe("whole", **settings))
    original = loop.token_loss
    monkeypatch.setattr(loop, "token_loss", dying_at(step, original, Killed()))
    with pytest.raises(Killed):
        execute(recipe("killed", **settings))
    monkeypatch.setattr(loop, "token_loss", original)
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    execute(recipe("killed", **settings))
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_split_and_masked_execution_choose_and_train_alike(recipe: Any, tmp_path: Path) -> None:
    rows = []
    for execution in ("masked", "split"):
        execute(recipe(execution, strategy="ssu", execution=execution))
        rows.append(metrics(tmp_path / execution))
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["sampler_units"] == b["sampler_units"]
        assert a["sampler_loss"] == pytest.approx(b["sampler_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_the_budget_is_that_of_the_phase_without_a_sampler(recipe: Any) -> None:
    paced = execute(recipe("paced", sampler={"start": 0.5}))
    plain = execute(recipe("plain", sampler=None))
    trained = [json.loads((p / "state.json").read_text())["train"]["adapt"] for p in (paced, plain)]
    assert trained[0]["steps"] == trained[1]["steps"]
    assert trained[0]["tokens"] == pytest.approx(trained[1]["tokens"], rel=0.1)


@pytest.mark.usefixtures("offline")
def test_one_stage_only_is_refused(recipe: Any) -> None:
    with pytest.raises(AddlangError, match=r"with update_every 50 and \d+ steps there is one stage only"):
        execute(recipe("out", sampler={"update_every": 50}))
