"""A run, from recipe to report. Read this file first: it is the whole of what addlang does, in order."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.checks import check_calibration, check_model, check_requirements
from addlang.errors import AddlangError, AddlangWarning, PreemptedError, ProofError
from addlang.progress import set_quiet
from addlang.recipe import Phase, Recipe
from addlang.rundir import FollowedRun, RunDir
from addlang.train.shard import ALONE, World, check_sharding, join_world, sharding_of

if TYPE_CHECKING:
    import torch

    from addlang.data.prepare import PhaseData
    from addlang.evaluate.measurement import Measurement
    from addlang.freeze.plan import FreezePlan
    from addlang.guards import ActiveGuard
    from addlang.train.loop import Schedule, TrainingData


def execute(recipe: Recipe, *, overwrite: bool = False, base_dir: Path | None = None) -> Path:
    """Carry out a recipe, continuing where an earlier attempt stopped. Returns the run directory.

    Raises:
        AddlangError: bad input or an unusable output directory (nothing is half-written).
        ProofError: something that was frozen has changed.
        PreemptedError: SIGTERM arrived; the state was saved.
    """
    check_requirements(recipe)
    with join_world(recipe.device) as world:
        world.first(lambda: [check_sharding(phase, world) for phase in recipe.phases])
        run = world.first(lambda: RunDir.open(recipe, overwrite=overwrite)) or FollowedRun(recipe)
        if not world.leads:
            set_quiet(True)
        sitting = time.monotonic()
        before = run.state.get("seconds", 0.0)
        try:
            with terminable(), collected_warnings(run):
                carry_out(run, world, base_dir)
            run.update(seconds=before + time.monotonic() - sitting)
            run.update(status="finished")
            world.first(lambda: write_reports(run.path))
        except BaseException as error:
            with contextlib.suppress(OSError):
                run.update(seconds=before + time.monotonic() - sitting)
            run.abandon()
            if isinstance(error, PreemptedError):  # all processes were told
                raise world.same(error) from None
            raise
        run.close()
    return run.path


def carry_out(run: RunDir, world: World, base_dir: Path | None) -> None:
    """All stages of a run. What is not said to be done by all processes, the first one does while the others wait."""
    from addlang.data.prepare import measured_phase
    from addlang.models import load_tokenizer, resolve
    from addlang.phases import check_conditions, check_promises, decide, end_early
    from addlang.train.schedule import micro_batch

    recipe = run.recipe
    device = prepare_device(recipe)
    run.update(versions=versions(), device=describe(device), processes=world.size)
    source = world.in_turn(lambda: resolve(recipe.model_name_or_path, recipe.revision))
    tokenizer = load_tokenizer(source, recipe.template_path(base_dir))
    world.first(lambda: check_model(recipe, source, tokenizer))
    world.first(lambda: check_calibration(run, tokenizer, base_dir))
    data: dict[str, PhaseData] = {}
    measured = measured_phase(recipe)
    for phase in sorted(recipe.phases, key=lambda p: p is not measured):  # no phase may train on what is measured
        exclude = [text for _, text in data[measured.name].heldout] if data else []
        read = functools.partial(prepare_data, recipe, phase, tokenizer, device, base_dir, run, exclude)
        data[phase.name] = world.in_turn(read)
    world.first(lambda: [micro_batch(p, data[p.name].batch_size, device.type, world.size) for p in recipe.phases])
    world.first(lambda: check_promises(run, base_dir))
    world.first(lambda: run.check_inputs(base_dir))

    def measure(label: str, directory: Path, share: float = 1.0) -> None:
        back = None if share == 1 else (share, source)
        world.first(lambda: evaluate(run, label, directory, tokenizer, data[measured.name], device, base_dir, back))

    measure("before", source)
    world.first(lambda: check_conditions(run))
    start = source
    for phase in recipe.phases:
        if not world.agree(world.first(functools.partial(decide, run, phase))):
            world.first(functools.partial(end_early, run, phase, start))
            measure("after", run.path)
            break
        origin = source if phase.start == "source" else start
        adapt(run, phase, origin, tokenizer, data[phase.name], device, base_dir, world)
        start = run.phase_dir(phase)
        measure("after" if phase is recipe.phases[-1] else phase.name, start)
    for share in recipe.evaluation.scale_back:
        measure(f"after-x{share:g}", start, share)
    world.first(lambda: compare_models(run))


def adapt(
    run: RunDir,
    phase: Phase,
    source: Path,
    tokenizer: Any,
    data: PhaseData,
    device: torch.device,
    base_dir: Path | None,
    world: World = ALONE,
) -> None:
    """Plan, attach, train, export and prove one phase; all processes take part."""
    from addlang.train import checkpoint

    directory = run.phase_dir(phase)
    if world.agree(run.done(f"proof:{phase.name}")):
        world.first(lambda: checkpoint.clear(directory))  # if a kill came between the two
        world.first(lambda: require_proof(run, phase))
        return
    import torch

    from addlang.export import export
    from addlang.liger import apply_liger
    from addlang.models import Checkpoint, load_model
    from addlang.phases import answer_replay
    from addlang.train.loop import Schedule, compute_dtype, train
    from addlang.train.memory import explain_out_of_memory, settle
    from addlang.train.schedule import micro_batch
    from addlang.train.self_paced import self_paced

    stored = Checkpoint(source)
    model_hash = world.agree(stored.hash if world.leads else "")
    dtype = stored.dtype if compute_dtype(phase, device) in (None, torch.bfloat16) else torch.float32
    load = functools.partial(load_model, source, dtype=dtype, attn_implementation=phase.attn_implementation)
    if data.pool is not None:
        data = world.in_turn(functools.partial(answer_replay, run, phase, data, source, model_hash, device))
    micro = micro_batch(phase, data.batch_size, device.type, world.size)
    schedule = Schedule(data.sequences // data.batch_size, data.batch_size, micro)

    def prepare(model: Any) -> tuple[FreezePlan, list[ActiveGuard]]:
        plan = make_plan(run, phase, model, model_hash, tokenizer, base_dir, data, schedule)
        return plan, start_guards(run, phase, model, model_hash, tokenizer, device, schedule, base_dir)

    sharded = sharding_of(phase, world) == "fsdp"
    if sharded:  # plan on one whole device; then every process loads in host memory and keeps its part on its device
        world.first(lambda: prepare(load(device=device)) and None)
    model = load(device="cpu" if sharded else device)
    plan, guards = world.in_turn(lambda: prepare(model))
    if phase.use_liger_kernel:
        apply_liger(model)
    about: dict[str, Any] = {"micro": micro, "device": device, "stored": stored.dtype, "world": world}
    began = run.state.get("plan", {}).get(phase.name, {}) if any(directory.glob("checkpoint-*")) else {}
    # free memory differs from day to day, and the last bits of the two forms may: what is continued keeps its own
    settled = settle(model, plan, phase, batch=schedule.batch, began=began.get("form"), **about)
    with explain_out_of_memory(model, plan, settled, batch=schedule.batch, **about):
        attached = phase.strategy.attach(model, plan, settled.execution, masters=phase.master_weights == "fp32")
        planned = run.state.get("plan", {})
        chosen = {"execution": attached.execution, "form": settled.execution}
        run.update(plan={**planned, phase.name: {**planned.get(phase.name, {}), **chosen}})
        seed = run.recipe.seed
        source_of_batches: TrainingData = data
        if phase.sampler is not None:
            attached, source_of_batches = self_paced(
                attached, data, phase, schedule, seed=seed, device=device, world=world
            )
        result = train(
            attached, source_of_batches, phase, directory, device=device, schedule=schedule, seed=seed, guards=guards,
            world=world,
        )  # fmt: skip
    template = run.recipe.template_path(base_dir)
    export(stored, attached, plan, directory, world=world, chat_template=template)
    world.first(lambda: prove_phase(run, phase, source))
    trained = {
        **run.state.get("train", {}),
        phase.name: {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "loss": result.loss},
    }
    run.finish(f"proof:{phase.name}", train=trained)
    world.first(lambda: checkpoint.clear(directory))
    world.first(lambda: require_proof(run, phase))


def require_proof(run: RunDir, phase: Phase) -> None:
    """Raise ProofError, now and whenever the run is continued, if something that was frozen has changed."""
    proofs = json.loads((run.path / "proof.json").read_text(encoding="utf-8"))["phases"]
    changed = next(p["frozen_changed"] for p in proofs if p["phase"] == phase.name)
    if changed:
        raise ProofError(f"{changed} frozen elements of phase '{phase.name}' changed; see {run.path / 'proof.json'}")


def make_plan(
    run: RunDir,
    phase: Phase,
    model: Any,
    model_hash: str,
    tokenizer: Any,
    base_dir: Path | None,
    data: PhaseData,
    schedule: Schedule,
) -> FreezePlan:
    """The phase's freeze plan: made once, saved, and loaded again on resume."""
    from addlang.data.calibration import calibration_batches
    from addlang.data.prepare import cache_root
    from addlang.freeze.plan import FreezePlan
    from addlang.progress import progress
    from addlang.strategies import PlanInputs
    from addlang.train.loop import step_batches

    path = run.plan_path(phase)
    if run.done(f"plan:{phase.name}"):
        plan = FreezePlan.load(path)
        if plan.model_hash != model_hash:
            raise AddlangError(
                f"the weights that phase '{phase.name}' starts from have changed since this run planned on them",
                "restore them, or start again with --overwrite",
            )
        plan.validate(model)
        return plan
    with progress(f"scoring for {phase.strategy.name}", unit="sequences") as bar:
        inputs = PlanInputs(
            seed=run.recipe.seed,
            model_hash=model_hash,
            special_token_ids=tuple(tokenizer.all_special_ids),
            calibration=lambda: calibration_batches(
                phase.calibration, tokenizer, language=run.recipe.source_language, base_dir=base_dir
            ),
            target=lambda: step_batches(data, schedule),
            settings=phase,
            progress=lambda done, total, _what: _advance(bar, done, total),
            cache_dir=cache_root(),
        )
        plan = phase.strategy.plan(model, inputs)
    plan.validate(model)
    plan.save(path)
    kept, besides = phase.strategy.footprint(model, plan)
    about = {
        **plan.provenance,
        "execution": phase.execution,
        "trainable_fraction": (kept.trainable_count + besides) / plan.numel,
        "paper": phase.strategy.paper,
        "summary": phase.strategy.summary,
    }
    run.finish(f"plan:{phase.name}", plan={**run.state.get("plan", {}), phase.name: about})
    return plan


def start_guards(
    run: RunDir,
    phase: Phase,
    model: Any,
    model_hash: str,
    tokenizer: Any,
    device: torch.device,
    schedule: Schedule,
    base_dir: Path | None,
) -> list[ActiveGuard]:
    """Prepare the phase's guards while the model still has the source's weights."""
    from addlang.data.calibration import calibration_batches
    from addlang.data.prepare import cache_root
    from addlang.guards import GuardContext
    from addlang.progress import progress
    from addlang.train.loop import compute_context

    active = []
    for guard in phase.all_guards:
        with progress(f"preparing {guard.name}") as bar:
            context = GuardContext(
                model=model,
                model_hash=model_hash,
                tokenizer=tokenizer,
                seed=run.recipe.seed,
                device=device,
                cache_dir=cache_root(),
                language=run.recipe.source_language,
                sequence_length=phase.sequence_length,
                batch=schedule.batch,
                micro=schedule.micro,
                steps=schedule.steps,
                autocast=compute_context(phase, device),
                calibration=lambda: calibration_batches(
                    phase.calibration, tokenizer, language=run.recipe.source_language, base_dir=base_dir
                ),
                progress=lambda done, total, _what, bar=bar: _advance(bar, done, total),  # type: ignore[misc]
                read_by_guards=phase.read_by_guards,
            )
            active.append(guard.start(context))
    run.update(
        guards={
            **run.state.get("guards", {}),
            phase.name: [{**g.describe(), "tokens_before": g.tokens_before()} for g in active],
        }
    )
    return active


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done)


def prove_phase(run: RunDir, phase: Phase, source: Path) -> None:
    """Recompute the proof of one phase from the two checkpoints and write it into ``proof.json``."""
    from addlang.freeze.plan import FreezePlan
    from addlang.freeze.proof import prove
    from addlang.models import Checkpoint

    proof = {
        "phase": phase.name,
        **prove(Checkpoint(source), Checkpoint(run.phase_dir(phase)), FreezePlan.load(run.plan_path(phase))),
    }
    path = run.path / "proof.json"
    phases = json.loads(path.read_text(encoding="utf-8"))["phases"] if path.is_file() else []
    phases = [p for p in phases if p["phase"] != phase.name] + [proof]
    run.write_json("proof.json", {"ok": all(p["ok"] for p in phases), "phases": phases})


def prepare_data(
    recipe: Recipe,
    phase: Phase,
    tokenizer: Any,
    device: torch.device,
    base_dir: Path | None,
    run: RunDir,
    exclude: Sequence[str] = (),
) -> PhaseData:
    """Read, split and pack a phase's data and put its card into the state.

    Raises:
        AddlangError: they are not what this run began with, so that it cannot be continued, or too few for the warmup.
    """
    from addlang.data.prepare import prepare
    from addlang.progress import note, progress
    from addlang.train.optimizers import check_steps

    rows = 0
    with progress(f"reading data of {phase.name}", unit="rows") as bar:

        def count(n: int) -> None:
            nonlocal rows
            rows += n
            bar.update(rows)

        data = prepare(recipe, phase, tokenizer, base_dir=base_dir, progress=count, exclude=exclude)
    if data.pool is None:  # otherwise there are more steps to come
        check_steps(phase, data.sequences // data.batch_size)
    known = run.state.get("data", {}).get(phase.name)
    if run.done("evaluate:before") and known is not None and known["identity"] != data.card["identity"]:
        raise AddlangError(
            f"the data of phase '{phase.name}' have changed since this run began ({', '.join(data.paths)})",
            "restore the files, or start again with --overwrite",
        )
    for message in data.card["notes"]:
        note(message)
    if known is None or known["identity"] != data.card["identity"]:  # otherwise it may know of generated replay
        run.update(data={**run.state.get("data", {}), phase.name: data.card})
    return data


def evaluate(
    run: RunDir,
    label: str,
    directory: Path,
    tokenizer: Any,
    data: PhaseData,
    device: torch.device,
    base_dir: Path | None,
    back: tuple[float, Path] | None = None,
) -> None:
    """Measure one checkpoint, as it lies on disk, and write its rows and items.

    Args:
        data: has the held-out text, unless the recipe names evaluation data.
        back: ``(a, source)`` to measure ``w0 + a (w - w0)`` instead, with ``w0`` from the source's directory.
    """
    if run.done(f"evaluate:{label}"):
        return
    import torch

    from addlang.data.prepare import cache_root, labelled_chats, labelled_texts
    from addlang.evaluate.suite import build_suite, cached_evaluate
    from addlang.models import Checkpoint, load_model, scale_back
    from addlang.progress import progress

    recipe = run.recipe
    given = recipe.evaluation.target_datasets
    suite = build_suite(
        recipe.evaluation,
        tokenizer=tokenizer,
        heldout_target=labelled_texts(given, base_dir) if given else data.heldout,
        source_language=recipe.source_language,
        target_language=recipe.language,
        sequence_length=recipe.evaluation.sequence_length or recipe.phases[-1].sequence_length,
        base_dir=base_dir,
        heldout_chats=labelled_chats(given, base_dir) if given else data.heldout_chats,
    )
    stored = Checkpoint(directory)
    model = load_model(directory, dtype=torch.float32 if device.type == "cpu" else None, device=device)
    weights = stored.hash
    if back is not None:
        weights += f" scaled {back[0]} back to {scale_back(model, *back)}"
    with progress(f"evaluating {label}", unit="tasks") as bar:
        result = cached_evaluate(model, weights, suite, cache_root() / "evaluations", progress=bar.update)
    save_measurements(run, label, result.measurements)
    run.finish(f"evaluate:{label}", not_run=[{"task": t, "reason": r} for t, r in result.not_run])


def save_measurements(run: RunDir, label: str, measurements: list[Measurement]) -> None:
    """``results.jsonl`` (one flat row per measurement) and ``samples/<label>/<task>.json`` (items)."""
    path = run.path / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    rows = [r for r in rows if r["model"] != label]
    for m in measurements:
        rows.append(m.row(model=label, phase=label, seed=run.recipe.seed))
        folder = run.path / "samples" / label
        folder.mkdir(parents=True, exist_ok=True)
        run.write_text(f"samples/{label}/{sample_name(m)}", m.to_json())
    run.write_jsonl("results.jsonl", rows)


def sample_name(m: Measurement) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{m.task}.{m.metric}") + ".json"


def compare_models(run: RunDir) -> None:
    """``comparison.json``: before against after on the same items."""
    from addlang.evaluate.compare import compare
    from addlang.evaluate.measurement import Measurement

    def load(label: str) -> list[Measurement]:
        files = sorted((run.path / "samples" / label).glob("*.json"))
        return [Measurement.from_json(f.read_text(encoding="utf-8")) for f in files]

    rows = compare(load("before"), load("after"), resamples=run.recipe.evaluation.resamples, seed=run.recipe.seed)
    run.write_json("comparison.json", rows)


def write_reports(path: Path) -> None:
    """Model card and HTML report from what is in the run directory."""
    from addlang.report import write_model_card, write_report

    write_model_card(path)
    write_report(path)


def prepare_device(recipe: Recipe) -> torch.device:
    """The device, and deterministic kernels where they are asked for.

    Raises:
        AddlangError: CUDA is asked for and there is none.
    """
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers hands it to the package's kernels
    import torch

    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise AddlangError(
            "device: cuda, but torch sees no CUDA device",
            "use device: auto, or install a CUDA build of torch (addlang doctor)",
        )
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(recipe.deterministic, warn_only=True)
    # no kernel of ours reads what it has not written, and filling takes a pass over every weight that is assembled
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def describe(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("addlang", "torch", "transformers", "datasets", "numpy")},
    }


class _Terminated(BaseException):
    """SIGTERM, on its way up: no handler of errors takes it for one."""

    exit_code = 75


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the run at once, with the stages so far kept. While training the loop saves its state first."""

    def handle(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        yield
        return
    try:
        yield
    except _Terminated:
        raise PreemptedError(
            "stopped by SIGTERM; what was complete is saved", "run the same command again to continue"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def collected_warnings(run: RunDir) -> Iterator[None]:
    """Show every addlang warning at once, and keep it for the report."""
    from addlang.progress import note

    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kw: Any) -> None:
        if issubclass(category, AddlangWarning):
            note(f"warning: {message}")
            run.add_warnings([str(message)])
        else:
            before(message, category, *args, **kw)

    with warnings.catch_warnings():
        warnings.simplefilter("always", AddlangWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
