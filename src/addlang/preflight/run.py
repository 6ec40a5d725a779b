"""The whole preflight, in order: read the data, audit the model, compare, probe, forecast, advise."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError, AddlangWarning

if TYPE_CHECKING:
    import torch

    from addlang.data.chat import Message
    from addlang.data.prepare import PhaseData
    from addlang.evaluate.measurement import Outcome
    from addlang.preflight.advice import Candidate
    from addlang.preflight.watch import Watched
    from addlang.recipe import Recipe
    from addlang.schema import DatasetSpec, Phase

FORMAT = 1
AUDIT_TEXTS = 200
REPLIES, REPLY_TOKENS = 24, 64
TARGET_TEXTS = 64
WATCHED_TOKENS = 512  # of a conversation
HALVINGS = 3  # of the learning rate, where no setting keeps enough


@dataclass(frozen=True)
class Method:
    """A strategy and what holds it to the source: one of the settings to compare.

    Attributes:
        strategy, options: as in a recipe.
        guards: (name, options) each.
    """

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    guards: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
        encoder: of DES; ``states``: mean hidden states of the model; None: no DES.
        probe_steps: of every probe; 0: none, and so no forecast.
        keep: share of the source ability that should be kept.
        compare: what is probed besides the planned run.
        rates: multiples of the planned learning rate that are probed.
    """

    encoder: str | None = "states"
    probe_steps: int = 32
    keep: float = 0.97
    compare: tuple[Method, ...] = ()
    rates: tuple[float, ...] = (1.0,)


@dataclass
class Preflight:
    """One preflight at work."""

    recipe: Recipe
    phase: Phase
    source: Path
    tokenizer: Any
    data: PhaseData
    text: Watched
    device: torch.device
    settings: Settings
    base_dir: Path | None
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def parameters(self) -> int:
        """Of the model, from its configuration."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.source, trust_remote_code=False))
        model.tie_weights()
        return sum(p.numel() for p in model.parameters())

    @functools.cached_property
    def heldout(self) -> tuple[list[tuple[str, str]], list[tuple[str, list[Message]]]]:
        """(id, text) of held-out target documents, and (id, messages) of those that are conversations, as a run measures them."""
        from addlang.data.prepare import labelled_chats, labelled_texts

        if specs := self.recipe.evaluation.target_datasets:
            return labelled_texts(specs, self.base_dir), labelled_chats(specs, self.base_dir)
        return list(self.data.heldout), list(self.data.heldout_chats)

    def require_weights(self, copies: int = 1) -> None:
        """Make sure that the model can be loaded here.

        Args:
            copies: tensors of its size that are held at once.

        Raises:
            AddlangError: its weights are not at hand, or the device has too little memory for them.
        """
        from addlang.models import Checkpoint, weights_at_hand
        from addlang.train.memory import GIB, USABLE, device_memory

        if not weights_at_hand(self.source):
            raise AddlangError(f"{self.source} has no weights", "give the directory of a complete checkpoint")
        size = copies * (4 if self.device.type == "cpu" else Checkpoint(self.source).dtype.itemsize)
        need, there = size * self.parameters, USABLE * device_memory(self.device)
        if need > there:
            raise AddlangError(
                f"{need / GIB:.1f} GiB of memory are needed ({size} bytes per parameter), and this device has {there / GIB:.1f}",
                "look at it where it is to be trained",
            )

    def load(self) -> Any:
        """The source model on the device; raises as :meth:`require_weights` does."""
        import torch

        from addlang.models import load_model

        self.require_weights()
        return load_model(self.source, dtype=torch.float32 if self.device.type == "cpu" else None, device=self.device)


def preflight(recipe: Recipe, settings: Settings, *, base_dir: Path | None = None) -> dict[str, Any]:
    """Look at a planned run of one phase (of several: the last) without carrying it out.

    Returns:
        Plain data: ``model``, ``data``, ``similarity``, ``conflict``, ``plan``, ``probes`` (each with its forecast and
        whether it is the planned setting), ``advice``, ``answers`` and ``notes``. What could not be measured is None, with
        the reason among the notes; ``not_probed`` is there if it is the planned setting that could not be probed.

    Raises:
        AddlangError: bad data, or a model that cannot be read.
    """
    from addlang.progress import note

    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AddlangWarning)
        flight = prepare_flight(recipe, settings, base_dir)
        result: dict[str, Any] = {"format": FORMAT, "settings": described(flight)}
        for name, part in PARTS.items():
            note(f"preflight: {name}")
            result[name] = attempt(flight, name, part, result)
    for w in caught:
        if issubclass(w.category, AddlangWarning):
            found.append(str(w.message))
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    result["notes"] = list(dict.fromkeys([*flight.notes, *found]))
    return result


def prepare_flight(recipe: Recipe, settings: Settings, base_dir: Path | None) -> Preflight:
    """Read the data and the tokenizer; the recipe's checks that come before any training are made here too."""
    from addlang.checks import check_model, check_requirements
    from addlang.data.prepare import prepare
    from addlang.evaluation import context_length
    from addlang.models import load_tokenizer, resolve, weights_at_hand
    from addlang.preflight.watch import watched
    from addlang.run import prepare_device

    check_requirements(recipe)
    device = prepare_device(recipe)
    source = resolve(recipe.model_name_or_path, recipe.revision)
    tokenizer = load_tokenizer(source, recipe.template_path(base_dir))
    check_model(recipe, source, tokenizer, weights=weights_at_hand(source))
    phase = recipe.phases[-1]
    data = prepare(recipe, phase, tokenizer, base_dir=base_dir)
    text = watched(
        phase.calibration, tokenizer, language=recipe.source_language,
        sequence_length=min(WATCHED_TOKENS, context_length(source)), base_dir=base_dir,
    )  # fmt: skip
    flight = Preflight(recipe, phase, source, tokenizer, data, text, device, settings, base_dir)
    if not getattr(tokenizer, "chat_template", None):
        flight.notes.append(
            "The tokenizer has no chat template, so source conversations are watched as plain text; the forecast was fitted "
            "on answers in conversations, and how often its interval holds here is not known."
        )
    if len(recipe.phases) > 1:
        flight.notes.append(
            f"Only the last of {len(recipe.phases)} phases is looked at, as if it started from the source model."
        )
    return flight


def attempt(flight: Preflight, name: str, part: Any, so_far: dict[str, Any]) -> Any:
    """One part; what cannot be measured is None and says why."""
    try:
        return part(flight, so_far)
    except AddlangError as error:
        flight.notes.append(f"{name}: not measured. {error.message}" + (f" ({error.fix})" if error.fix else ""))
        return None


def described(flight: Preflight) -> dict[str, Any]:
    """What was looked at."""
    phase = flight.phase
    return {
        "model": flight.recipe.model_name_or_path,
        "language": flight.recipe.language,
        "source_language": flight.recipe.source_language,
        "strategy": {"name": phase.strategy.name, **phase.strategy.model_dump(mode="json")},
        "learning_rate": phase.learning_rate,
        "tokens": flight.data.card["tokens"],
        "steps": flight.data.sequences // flight.data.batch_size,
        "keep": flight.settings.keep,
        "probe_steps": flight.settings.probe_steps,
        "watched": flight.text.source,
    }


def audit_model(flight: Preflight, _so_far: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte, task scores and replies of the source model; how its tokenizer fits both languages."""
    from addlang.data.prepare import labelled_texts
    from addlang.evaluate.suite import builtin_texts
    from addlang.preflight.tokens import fit_of

    recipe = flight.recipe
    heldout, chats = flight.heldout
    english = labelled_texts(recipe.evaluation.source_datasets, flight.base_dir) or builtin_texts()
    out: dict[str, Any] = {"parameters": flight.parameters, "scores": [], "not_run": []}
    out["tokenizer"] = {
        "target": fit_of(flight.tokenizer, [t for _, t in heldout[:AUDIT_TEXTS]]).describe(),
        "source": fit_of(flight.tokenizer, [t for _, t in english[:AUDIT_TEXTS]]).describe(),
    }
    try:
        outcome = scores(flight, heldout, chats)
    except AddlangError as error:
        flight.notes.append(f"Scores: not measured. {error.message}" + (f" ({error.fix})" if error.fix else ""))
        return out
    rows = [m.row(model="source", phase="before", seed=recipe.seed) for m in outcome.measurements]
    return {**out, "scores": rows, "not_run": [list(n) for n in outcome.not_run]}


def scores(
    flight: Preflight, heldout: Sequence[tuple[str, str]], chats: Sequence[tuple[str, list[Message]]]
) -> Outcome:
    """The recipe's evaluation of the source model."""
    from addlang.data.prepare import cache_root
    from addlang.evaluate.suite import build_suite, cached_evaluate
    from addlang.models import Checkpoint

    recipe = flight.recipe
    suite = build_suite(
        recipe.evaluation,
        tokenizer=flight.tokenizer,
        heldout_target=heldout,
        source_language=recipe.source_language,
        target_language=recipe.language,
        sequence_length=recipe.evaluation.sequence_length or flight.phase.sequence_length,
        heldout_chats=chats,
        base_dir=flight.base_dir,
    )
    model = flight.load()
    return cached_evaluate(model, Checkpoint(flight.source).hash, suite, cache_root() / "evaluations")


def audit_data(flight: Preflight, _so_far: dict[str, Any]) -> dict[str, Any]:
    """The data card: languages, duplicates, licences, overlap with evaluation items."""
    return dict(flight.data.card)


def compare_data(flight: Preflight, _so_far: dict[str, Any]) -> dict[str, Any]:
    """DES of source and target prompts, and the form of the model's own replies against the data's."""
    from addlang.analyze.des import STATES
    from addlang.data.builtin_sets import builtin
    from addlang.preflight.signals import measure_similarity
    from addlang.schema import DatasetSpec

    specs = flight.phase.calibration.datasets or (
        DatasetSpec.model_validate({"path": str(builtin("calibration_en")), "format": "messages"}),
    )
    out: dict[str, Any] = {"des": None, "forms": None}
    if flight.settings.encoder is not None:
        try:
            if flight.settings.encoder == STATES:
                flight.require_weights()
            found = measure_similarity(
                flight.phase, specs, flight.settings.encoder, flight.source, flight.device, flight.base_dir,
                flight.recipe.seed,
            )  # fmt: skip
            out["des"] = dict(vars(found))
        except AddlangError as error:
            flight.notes.append(f"DES: not measured. {error.message}" + (f" ({error.fix})" if error.fix else ""))
    out["forms"] = _forms(flight)
    return out


def _forms(flight: Preflight) -> dict[str, Any] | None:
    from addlang.preflight.form import ask, compare_forms

    pairs = conversations_of([s for s in flight.phase.datasets if s.role == "target"], flight)
    if not pairs or not getattr(flight.tokenizer, "chat_template", None):
        flight.notes.append("Form of replies: the target data are raw text, so there is nothing to compare.")
        return None
    try:
        model = flight.load()
    except AddlangError as error:
        flight.notes.append(f"Form of replies: not measured. {error.message}")
        return None
    prompts = [p for p, _ in pairs]
    replies = ask(model, flight.tokenizer, prompts, max_new_tokens=REPLY_TOKENS, batch_size=8)
    return compare_forms(replies, [r for _, r in pairs]).describe()


def conversations_of(specs: Sequence[DatasetSpec], flight: Preflight) -> list[tuple[str, str]]:
    """(first prompt, its answer) of some rows of the target data; none of raw text."""
    from addlang.data.holdout import Scan
    from addlang.data.sources import read_rows

    pairs = []
    for spec in specs:
        share = -(-REPLIES // len(specs))
        for _, row in Scan.of(read_rows(spec, base_dir=flight.base_dir), share, seed=2).smallest(share):
            messages = row.messages or []
            turns = [m for m in messages if m["role"] in ("user", "assistant")]
            if len(turns) >= 2 and turns[0]["role"] == "user" and turns[1]["role"] == "assistant":
                pairs.append((turns[0]["content"], turns[1]["content"]))
    return pairs


def measure_gradients(flight: Preflight, _so_far: dict[str, Any]) -> dict[str, Any]:
    """Conflict of the two losses' gradients, and what the model's own loss on the answers is."""
    from addlang.preflight.signals import measure_conflict

    flight.require_weights(copies=3)  # the weights and two gradients
    found = measure_conflict(flight.phase, flight.source, flight.data, flight.text, flight.device)
    return {**vars(found), "push": found.push}


def run_probes(flight: Preflight, so_far: dict[str, Any]) -> list[dict[str, Any]]:
    """A probe and a forecast for the planned run and for every alternative; the planned one comes first, if it can be probed.

    Where none of them is expected to keep enough, the one that loses least is probed at lower learning rates.
    """
    from addlang.progress import progress

    if not flight.settings.probe_steps:
        flight.notes.append("No probe was run (probe_steps 0), so there is no forecast.")
        return []
    flight.require_weights()
    if (plan := so_far.get("plan")) is not None and plan["memory"]["total"] > plan["available"]:
        raise AddlangError(
            f"the planned run needs {plan['memory']['total'] / 2**30:.1f} GiB, and this device has {plan['available'] / 2**30:.1f}",
            "look at it where it is to be trained",
        )
    planned = alternatives(flight)
    target = target_text(flight)
    found: list[tuple[Candidate, Phase, Any]] = []
    with progress("probing", total=len(planned), unit="settings") as bar:
        for label, phase in planned:
            failed = probe_one(flight, label, phase, target, so_far, found)
            if failed is not None and phase is planned[0][1]:
                so_far["not_probed"] = failed
            bar.update(len(found))
        for _ in range(HALVINGS):
            said = [item for item in found if item[0].forecast.lost is not None]
            least = min(said, key=lambda item: item[0].forecast.lost or 0.0, default=None)
            if least is None or (least[0].forecast.lost or 0.0) <= 1 - flight.settings.keep:
                break
            rate = float(f"{least[1].learning_rate / 2:.6g}")
            lower = least[1].model_copy(update={"learning_rate": rate})
            if probe_one(flight, least[0].label, lower, target, so_far, found) is not None:
                break
    rows = [c.describe() | {"losses": probe.losses, "planned": phase is planned[0][1]} for c, phase, probe in found]
    for row in rows:
        if plan is not None and row["planned"]:
            plan["seconds"] = plan["steps"] * row["seconds_per_step"]
    return rows


def probe_one(
    flight: Preflight, label: str, phase: Phase, target: Watched, so_far: dict[str, Any],
    found: list[tuple[Candidate, Phase, Any]],
) -> str | None:  # fmt: skip
    """Probe one setting and append it; one that cannot be carried out is noted, and the reason returned."""
    from addlang.checks import check_model, check_requirements
    from addlang.preflight.probe import run_probe

    single = flight.recipe.model_copy(update={"phases": (phase,)})
    try:
        validate(phase)
        check_requirements(single)
        check_model(single, flight.source, flight.tokenizer)
        probe = run_probe(
            flight.recipe, phase, flight.source, flight.tokenizer, flight.data, flight.text, device=flight.device,
            steps=flight.settings.probe_steps, base_dir=flight.base_dir, target=target,
        )  # fmt: skip
    except AddlangError as error:
        reason = error.message + (f" ({error.fix})" if error.fix else "")
        flight.notes.append(f"{label}: not probed. {reason}")
        return reason
    found.append((candidate(flight, label, phase, probe, so_far), phase, probe))
    return None


def validate(phase: Phase) -> None:
    """What a recipe with this phase would be refused for: a copy with other parts is not checked by itself.

    Raises:
        AddlangError: parts that contradict each other, or a promise of the recipe.
    """
    from pydantic import ValidationError

    given = {*phase.model_fields_set, "strategy", "guards", "learning_rate"}
    try:
        type(phase)(**{name: getattr(phase, name) for name in given})
    except ValidationError as error:
        raise AddlangError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


def candidate(flight: Preflight, label: str, phase: Phase, probe: Any, so_far: dict[str, Any]) -> Candidate:
    """A probed setting with its forecast."""
    from addlang.preflight.advice import Candidate
    from addlang.preflight.forecast import forecast, shipped
    from addlang.preflight.signals import signals

    row = signals(
        probe=probe, conflict=None, similarity=None, learning_rate=phase.learning_rate,
        steps=flight.data.sequences // flight.data.batch_size,
        sequence_tokens=flight.data.batch_size * phase.sequence_length,
        epochs=max((s["epochs"] for s in flight.data.card["sources"]), default=1.0),
    )  # fmt: skip
    fitted = shipped(
        held=any(guard.needs_start for guard in phase.all_guards)
    )  # a guard that only replays holds nothing
    return Candidate(
        label, " + ".join(part.name for part in (phase.strategy, *phase.guards)),
        phase.strategy.model_dump(mode="json", exclude_defaults=True), phase.learning_rate, probe.target_gained,
        probe.loss_change, probe.shift, probe.seconds / probe.steps, forecast(row, fitted, parameters=flight.parameters),
        getattr(phase.strategy, "ratio", None),
    )  # fmt: skip


def alternatives(flight: Preflight) -> list[tuple[str, Phase]]:
    """(label, phase): the planned run, then every method to compare at every learning rate."""
    from addlang.guards.base import make_guard
    from addlang.strategies.base import make_strategy

    own = flight.phase
    wanted = [(own.strategy, own.guards)]
    for method in flight.settings.compare:
        guards = tuple(make_guard(name, options) for name, options in method.guards)
        wanted.append((make_strategy(method.strategy, method.options), guards))
    out: list[tuple[str, Phase]] = []
    for strategy, guards in wanted:
        label = " + ".join(map(described_part, (strategy, *guards)))
        for times in dict.fromkeys((1.0, *flight.settings.rates)):
            rate = float(f"{own.learning_rate * times:.6g}")
            phase = own.model_copy(update={"strategy": strategy, "guards": guards, "learning_rate": rate})
            if all((p.strategy, p.guards, p.learning_rate) != (strategy, guards, rate) for _, p in out):
                out.append((label, phase))
    return out


def described_part(part: Any) -> str:
    """A strategy or guard with the options that are not its defaults."""
    options = part.model_dump(mode="json", exclude_defaults=True)
    return part.name + "".join(f", {k} {v}" for k, v in options.items() if not isinstance(v, dict))


def target_text(flight: Preflight) -> Watched:
    """Held-out target text, to see what a probe gains: all of it, or the answers where it is conversations."""
    from addlang.data.chat import encode_conversation
    from addlang.preflight.watch import Watched, collate

    texts, chats = flight.heldout
    conversations = dict(chats) if getattr(flight.tokenizer, "chat_template", None) else {}
    length = flight.phase.sequence_length
    rows = []
    for name, text in texts[:TARGET_TEXTS]:
        if name in conversations:
            ids, loss = encode_conversation(conversations[name], flight.tokenizer, loss_on="responses")
        else:
            ids = list(flight.tokenizer(text, verbose=False)["input_ids"])
            loss = [1] * len(ids)
        if any(loss[1:length]):
            rows.append((ids[:length], loss[:length]))
    if not rows:
        raise AddlangError("there is no held-out target text", "give evaluation.target_datasets, or more text")
    return Watched(tuple(collate(rows[i : i + 32]) for i in range(0, len(rows), 32)), f"held-out text ({len(rows)})")


def plan_costs(flight: Preflight, _so_far: dict[str, Any]) -> dict[str, Any]:
    """Memory of the planned run; the time comes from the probe's own speed, when it has run."""
    from addlang.planning import plan_run
    from addlang.train.memory import USABLE, device_memory

    single = flight.recipe.model_copy(update={"phases": (flight.phase,)})
    plan = plan_run(single, base_dir=flight.base_dir)
    phase = plan["phases"][0]
    keys = ("steps", "tokens", "trainable_fraction", "memory", "micro_batch")
    return {
        **{k: phase[k] for k in keys},
        "device": plan["here"],
        "available": round(USABLE * device_memory(flight.device)),
        "seconds": None,
        "disk_bytes": plan["disk_bytes"],
    }


def give_advice(flight: Preflight, so_far: dict[str, Any]) -> dict[str, Any]:
    """The setting that is recommended, with its reasons."""
    from addlang.preflight.advice import Candidate, advise
    from addlang.preflight.forecast import Forecast

    candidates = []
    for row in so_far.get("probes") or []:
        said = row["forecast"]
        own = Forecast(said["lost"], said["low"], said["high"], tuple(said["outside"]), tuple(said["why"]))
        fields = {k: v for k, v in row.items() if k in Candidate.__dataclass_fields__ and k != "forecast"}
        candidates.append(Candidate(**fields, forecast=own))
    return advise(candidates, flight.settings.keep).describe()


def give_answers(_flight: Preflight, so_far: dict[str, Any]) -> list[dict[str, str]]:
    """Can it be done? The questions and their answers."""
    from addlang.preflight.answers import answers

    return answers(so_far)


PARTS = {
    "model": audit_model,
    "data": audit_data,
    "similarity": compare_data,
    "conflict": measure_gradients,
    "plan": plan_costs,
    "probes": run_probes,
    "advice": give_advice,
    "answers": give_answers,
}
