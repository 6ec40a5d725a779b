"""Self-paced learning: from easy to hard, as the model itself finds it (Kumar et al., 2010; X-CIT).

The phase is divided into stages of ``update_every`` steps. At the beginning of each the current model's length-normalised
loss of every unit is measured: of every conversation, or of every sequence of raw text. Then the easiest ``rate`` of each data
set's units are trained on, where ``rate`` grows from ``start`` in the first stage to 1 in the last.

Selection is within each data set, so that the shares of the mixture stay as they are: sequence ``k`` of the run still comes
from the data set that the mixture says. Conversations are packed anew in every stage. Units that were trained on less often
come first, so that within what is easy everything is seen equally often.

All state is two arrays, the losses and how often each unit was used when the stage began. They stand in the checkpoint, and
what a stage trains on is a function of them and the seed, so a resumed run is bit-identical.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from addlang.data.fit import best_fit
from addlang.data.packing import WINDOW, Packed
from addlang.errors import AddlangError
from addlang.strategies.base import Around, Attached
from addlang.train.loss import token_losses
from addlang.train.shard import ALONE, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from addlang.data.prepare import PhaseData
    from addlang.schema import Phase, SelfPaced
    from addlang.train.loop import Schedule

KEYS = ("self_paced.losses", "self_paced.uses", "self_paced.stage")
STAGES = 10  # where update_every is not given


def rate_at(settings: SelfPaced, stage: int, stages: int) -> float:
    """Share of the units that a stage may use: ``start`` in the first, 1 in the last."""
    done = stage / (stages - 1)
    start = settings.start
    if settings.pacing == "geometric":
        return float(start ** (1 - done))
    if settings.pacing == "root":
        return math.sqrt(start**2 + done * (1 - start**2))
    return start + done * (1 - start)


def select(losses: NDArray[np.floating[Any]], rate: float, weights: str) -> tuple[NDArray[np.float64], float]:
    """(units,) weight of every unit, and the threshold lambda.

    Hard: ``v = 1[l < lambda]`` for the easiest ``rate`` of them, exactly; ties go to the first. Linear: ``v = max(0, 1 - l /
    lambda)``. Lambda is the loss of the easiest unit that is left out; where none is, the largest of all.
    """
    order = np.lexsort((np.arange(len(losses)), losses))
    number = min(len(losses), max(1, math.ceil(rate * len(losses))))
    threshold = float(losses[order[min(number, len(losses) - 1)]])
    v = np.zeros(len(losses))
    v[order[:number]] = 1.0
    if weights == "linear":
        linear = np.maximum(0.0, 1 - losses / threshold) if threshold > 0 else v
        v = linear if linear.any() else v  # all losses are equal: none is easier than another
    return v, threshold


@dataclass(frozen=True)
class Units:
    """What is chosen from in one data set: unit ``i`` is ``tokens[begins[i]:ends[i]]`` of its stream."""

    packed: Packed
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, packed: Packed) -> Units:
        """Conversations, or sequences of raw text."""
        starts = np.asarray(packed.sequences[:-1] if packed.loss is None else packed.documents, np.int64)
        return cls(packed, starts, np.append(starts[1:], packed.tokens_total))

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.begins


@dataclass(frozen=True)
class StagePack:
    """The sequences of one data set in one stage, their units, and the weight of every token."""

    packed: Packed
    units: NDArray[np.int64]
    weights: NDArray[np.float32]


class SelfPacedData:
    """Training data in stages; a :class:`addlang.train.loop.TrainingData` that looks at the model at times.

    Args:
        attached: its model is asked; sharding may change it in place.
        autocast: context of forward passes.
    """

    def __init__(
        self,
        data: PhaseData,
        attached: Attached,
        settings: SelfPaced,
        schedule: Schedule,
        *,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        world: World = ALONE,
    ) -> None:
        self.data, self.attached, self.settings, self.schedule = data, attached, settings, schedule
        self.seed, self.device, self.autocast, self.world = seed, device, autocast, world
        self.every = settings.update_every or max(1, math.ceil(schedule.steps / STAGES))
        self.stages = math.ceil(schedule.steps / self.every)
        if self.stages < 2:
            raise AddlangError(
                f"sampler self_paced: with update_every {self.every} and {schedule.steps} steps there is one stage only, so "
                "nothing goes from easy to hard",
                "lower update_every, or raise the budget",
            )
        self.units = [Units.of(p) for p in data.mixture.sources]
        self.bounds = np.cumsum([0, *map(len, self.units)])
        self.losses = np.full(self.bounds[-1], np.nan, np.float32)
        self.uses = np.zeros(self.bounds[-1], np.int32)
        self.stage = 0
        self.scored = 0  # tokens
        self._built: tuple[int, list[StagePack | None]] | None = None

    def _own(self, source: int) -> slice:
        return slice(int(self.bounds[source]), int(self.bounds[source + 1]))

    # ---- what the loop asks

    def batch(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Arrays [count, L] of the sequences ``first .. first + count - 1``, all of the current stage."""
        slots = self._slots(first, count)
        packs = self._packs()
        length = self.data.sequence_length
        shape = (count, length)
        out: dict[str, NDArray[Any]] = {
            key: np.empty(shape, np.int64) for key in ("input_ids", "labels", "position_ids")
        }
        if self.settings.weights == "linear":
            out["weights"] = np.zeros(shape, np.float32)
        for source, pack in enumerate(packs):
            here = slots[:, 0] == source
            if pack is None or not here.any():
                continue
            indices = slots[here, 1]
            pad = self.data.tokenizer.pad_token_id
            for key, value in pack.packed.batch(indices, length, pad, self.data.isolate).items():
                out[key][here] = value
            if "weights" in out:
                begin, column = pack.packed.sequences[indices], np.arange(length)
                real = column < pack.packed.lengths(indices)[:, None]
                out["weights"][here] = np.where(real, pack.weights[np.where(real, begin[:, None] + column, 0)], 0)
        return out

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Source and text of those sequences."""
        rows, packs = [], self._packs()
        for source, index in self._slots(first, count).tolist():
            pack = packs[source]
            assert pack is not None
            ids = np.asarray(pack.packed.tokens[pack.packed.sequences[index] : pack.packed.sequences[index + 1]])
            text = self.data.tokenizer.decode(ids.tolist())
            rows.append({"source": self.data.paths[source], "stage": self.stage, "sequence": index, "text": text})
        return rows

    def metrics(self) -> dict[str, float]:
        """Progress, for ``metrics.jsonl``."""
        chosen = [self._select(s) for s in range(len(self.units))]
        return {
            "sampler_rate": round(rate_at(self.settings, self.stage, self.stages), 6),
            "sampler_units": int(sum((v > 0).sum() for v, _ in chosen)),
            "sampler_threshold": round(float(np.mean([t for _, t in chosen])), 6),
            "sampler_loss": round(float(self.losses.mean()), 6),
            "sampler_scored_tokens": self.scored,
        }

    # ---- stages

    def after_step(self, step: int) -> None:
        """At the end of a stage: count what it used, and measure anew."""
        if step % self.every or step >= self.schedule.steps:
            return
        for source, pack in enumerate(self._packs()):
            if pack is not None:
                own = self.uses[self._own(source)]
                np.add.at(own, pack.units, 1)
        self.stage = step // self.every
        self._measure()

    def state(self) -> dict[str, Tensor]:
        """Losses and uses as the current stage began; NaN before the first."""
        return {
            "self_paced.losses": torch.from_numpy(self.losses.copy()),
            "self_paced.uses": torch.from_numpy(self.uses.copy()),
            "self_paced.stage": torch.tensor([self.stage, self.scored], dtype=torch.int64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with :meth:`state`."""
        self.losses = state["self_paced.losses"].numpy().astype(np.float32)
        self.uses = state["self_paced.uses"].numpy().astype(np.int32)
        self.stage, self.scored = (int(n) for n in state["self_paced.stage"])
        self._built = None

    def _slots(self, first: int, count: int) -> NDArray[np.int64]:
        """(count, 2): data set, and the number of the sequence within that data set and the stage."""
        begin = self.stage * self.every * self.schedule.batch
        end = min(begin + self.every * self.schedule.batch, len(self.data.mixture))
        assert begin <= first <= first + count <= end, "the loop reads one stage after another"
        sources = self.data.mixture.locate_many(begin, end - begin)[0]
        turns = np.zeros(len(sources), np.int64)
        for s in np.unique(sources):
            turns[sources == s] = np.arange((sources == s).sum())
        part = slice(first - begin, first - begin + count)
        return np.stack([sources[part], turns[part]], axis=1)

    def _packs(self) -> list[StagePack | None]:
        """Per data set what this stage trains on; made when the stage is first asked for."""
        if np.isnan(self.losses).any():
            self._measure()
        if self._built is None or self._built[0] != self.stage:
            begin = self.stage * self.every * self.schedule.batch
            number = min(self.every * self.schedule.batch, len(self.data.mixture) - begin)
            wanted = np.bincount(self.data.mixture.locate_many(begin, number)[0], minlength=len(self.units))
            self._built = (self.stage, [self._pack(s, int(n)) for s, n in enumerate(wanted)])
        return self._built[1]

    def _select(self, source: int) -> tuple[NDArray[np.float64], float]:
        rate = rate_at(self.settings, self.stage, self.stages)
        return select(self.losses[self._own(source)], rate, self.settings.weights)

    def _pack(self, source: int, wanted: int) -> StagePack | None:
        """``wanted`` sequences of the chosen units of a data set."""
        if not wanted:
            return None
        units, (v, _) = self.units[source], self._select(source)
        random = np.random.default_rng([self.seed, 0x5350, source, self.stage])
        order = _drawn(np.flatnonzero(v > 0), self.uses[self._own(source)], random)
        groups = _groups(units, order, wanted, self.data.sequence_length)
        groups = [groups[i] for i in random.permutation(len(groups))[:wanted]]
        used = np.concatenate(groups)
        lengths = units.lengths[used]
        at = np.concatenate([np.arange(b, e) for b, e in zip(units.begins[used], units.ends[used], strict=True)])
        sequences = np.cumsum([0, *(int(units.lengths[g].sum()) for g in groups)])
        if units.packed.loss is None:  # documents of raw text may begin inside a sequence
            inside = np.isin(at, units.packed.documents)
            documents = np.flatnonzero(inside)
        else:
            documents = np.cumsum(lengths) - lengths
        packed = Packed(
            Path(),
            np.asarray(units.packed.tokens)[at],
            None if units.packed.loss is None else np.asarray(units.packed.loss)[at],
            sequences.astype(np.int64),
            documents.astype(np.int64),
            {},
        )
        return StagePack(packed, used, np.repeat(v[used], lengths).astype(np.float32))

    def _measure(self) -> None:
        """The current model's mean loss per labelled token of every unit; all processes take part."""
        sums, counts = np.zeros(self.bounds[-1]), np.zeros(self.bounds[-1])
        together = (16_384 if self.device.type == "cuda" else 4_096) // self.data.sequence_length
        rows = max(self.schedule.micro, together)  # without gradients more fit than in training
        jobs = [
            (source, range(i, min(i + rows, len(units.packed))))
            for source, units in enumerate(self.units)
            for i in range(0, len(units.packed), rows)
        ]
        mine = jobs[self.world.rank :: self.world.size]
        rounds = -(
            -len(jobs) // self.world.size
        )  # as many forward passes in every process: sharded layers are gathered
        with asked(self.attached.model):
            for number in range(rounds):
                source, indices = mine[number] if number < len(mine) else jobs[0]
                unit, losses = self._losses(source, indices)
                if number < len(mine):
                    np.add.at(sums, unit, losses)
                    np.add.at(counts, unit, 1)
        if self.world.size > 1:
            both = self.world.total(*sums, *counts)
            sums, counts = np.array(both[: len(sums)]), np.array(both[len(sums) :])
        self.losses = (sums / np.maximum(counts, 1)).astype(np.float32)
        self.scored += int(counts.sum())
        self._built = None

    def _losses(self, source: int, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(n,) unit, counted over all data sets, and loss of every label of some sequences as they were packed at first."""
        units = self.units[source]
        length = self.data.sequence_length
        arrays = units.packed.batch(list(indices), length, self.data.tokenizer.pad_token_id, self.data.isolate)
        batch = {k: torch.from_numpy(v).to(self.device) for k, v in arrays.items()}
        with self.autocast():
            losses, rows, columns = token_losses(self.attached.model, batch)
        places = units.packed.sequences[np.asarray(list(indices))][rows.cpu().numpy()] + columns.cpu().numpy()
        unit = np.searchsorted(units.begins, places, side="right") - 1
        return unit + self.bounds[source], losses.double().cpu().numpy()


@contextlib.contextmanager
def asked(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then every module has its mode again. No inference mode: FSDP2 keeps tensors."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _drawn(chosen: NDArray[np.int64], uses: NDArray[np.int32], random: np.random.Generator) -> Iterator[int]:
    """The chosen units without end, those that were used least first, otherwise at random."""
    yield from chosen[np.lexsort((random.random(len(chosen)), uses[chosen]))].tolist()
    while True:
        yield from random.permutation(chosen).tolist()


def _groups(units: Units, order: Iterator[int], wanted: int, capacity: int) -> list[list[int]]:
    """At least ``wanted`` groups of units, each of which fits into a sequence; about as full as the data set's own."""
    if units.packed.loss is None:
        return [[next(order)] for _ in range(wanted)]
    lengths = units.lengths
    mean = units.packed.tokens_total / len(units.packed)
    drawn: list[int] = []
    while True:
        target = wanted * mean
        tokens = int(lengths[drawn].sum()) if drawn else 0
        while not drawn or tokens < target:
            drawn.append(next(order))
            tokens += int(lengths[drawn[-1]])
        groups = list(best_fit(drawn, size=lambda u: int(lengths[u]), capacity=capacity, window=WINDOW))
        if len(groups) >= wanted:
            return groups
        mean *= 1.02


class SelfPacedAttached(Around):
    """Puts the sampler's state into the checkpoint and tells it of every step."""

    def __init__(self, inner: Attached, data: SelfPacedData) -> None:
        super().__init__(inner)
        self.data = data

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)
        self.data.after_step(step)

    def metrics(self) -> dict[str, float]:
        return {**self.inner.metrics(), **self.data.metrics()}

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.inner.state_dict(), **self.data.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state_dict({k: v for k, v in state.items() if k not in KEYS})
        self.data.restore(state)


def self_paced(
    attached: Attached,
    data: PhaseData,
    phase: Phase,
    schedule: Schedule,
    *,
    seed: int,
    device: torch.device,
    world: World = ALONE,
) -> tuple[Attached, SelfPacedData]:
    """What the loop is given instead of ``attached`` and ``data`` where the phase has a sampler."""
    from addlang.train.loop import compute_context
    from addlang.train.shard import sharding_of

    assert phase.sampler is not None
    autocast = compute_context(phase, device, cache=sharding_of(phase, world) != "fsdp")
    paced = SelfPacedData(
        data, attached, phase.sampler, schedule, seed=seed, device=device, autocast=autocast, world=world
    )
    return SelfPacedAttached(attached, paced), paced
