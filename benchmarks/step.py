"""Time, arithmetic and peak memory of one optimizer step: full fine-tuning, masked, and split execution.

    python benchmarks/step.py --preset 100m --json step.json

Real configurations with random weights: fp32 throughout, or stored in bf16 as checkpoints are, with fp32 masters of
what trains, under bf16 autocast. AdamW with fp32 state. On a CPU every measurement runs in a process of its own, and
the processes of one setting take turns, step by step, so that all modes meet the same load of the machine. On a GPU
the modes follow each other in one process. Peak memory is that of tensors, on both. Arithmetic counts all products, attention's too. Time is the
median over steps; cpu_time, on a CPU, is the processor time of the process, which says more where others use the machine. Sequences
are one document each: no position_ids are given, so attention is causal and isolates nothing (``isolate_documents: true``, a run's
default, adds a mask).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODES = ("full", "masked", "split_assemble", "split_resident", "shared_assemble", "shared_resident", "public")
PRESETS: dict[str, dict[str, int]] = {
    # 97.5 M, 84.9 M of them in linear layers
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 8192},
    # Llama 3.2 1B, untied
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    # OLMo 2 7B and 13B (arXiv 2501.00656)
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 100352},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 100352},
}  # fmt: skip


def build(preset: str, device: str, sequence_length: int, precision: str) -> Any:
    """A Llama (100m, 1b) or OLMo 2 (7b, 13b) with random weights, made on the device."""
    import torch
    import transformers

    family = "Olmo2" if preset in ("7b", "13b") else "Llama"
    config = getattr(transformers, f"{family}Config")(
        **PRESETS[preset], max_position_embeddings=max(4096, sequence_length), tie_word_embeddings=False
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.train()


def half_of_the_columns(model: Any, share: bool = False) -> Any:
    """Half of the columns of every linear layer but the head, as SSU freezes; half of every vector.

    Args:
        share: the same columns for q, k and v, and for gate and up (``share_columns``).
    """
    import torch

    from addlang.freeze.plan import FreezePlan, Frozen
    from addlang.models import same_input

    groups = same_input(n for n, _ in model.named_parameters()) if share else {}
    drawn: dict[str, Any] = {}
    g = torch.Generator().manual_seed(0)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    entries = {}
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        first = groups.get(name, (name,))[0]
        if first not in drawn:
            drawn[first] = torch.randperm(shape[-1], generator=g)[: shape[-1] // 2].sort().values
        index = drawn[first]
        entries[name] = Frozen(shape, "none") if id(p) in outside else Frozen(shape, "columns", index)
    return FreezePlan(entries)


def freeze_as_public_code(model: Any, directory: Path) -> None:
    """Half of the columns by the SSU paper's public code, which masks gradients in tensor hooks (by magnitude: no data)."""
    import contextlib
    import importlib.util
    import io

    file = directory / "training" / "src" / "utils" / "model_utils.py"
    spec = importlib.util.spec_from_file_location("public_code", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        module._freeze_magnitude_based_parameters(
            model, 0.5, seed=0, skip_embeddings_and_head=True, elementwise=False, structured_axis="column"
        )


class Step:
    """One mode, ready to make optimizer steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from addlang.freeze.execution import attach_plan
        from addlang.freeze.plan import FreezePlan
        from addlang.train.loss import token_loss

        torch.manual_seed(0)
        self.device = args.device
        model = build(args.preset, args.device, args.sequence_length, args.precision)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = half_of_the_columns(model, share=args.mode.startswith("shared"))
        if args.mode == "full":
            self.attached = attach_plan(model, FreezePlan.empty(model), "masked")
        elif args.mode == "public":
            freeze_as_public_code(model, args.public)
            self.attached = attach_plan(model, FreezePlan.empty(model), "masked")
        else:
            self.attached = attach_plan(model, plan, args.mode.replace("shared", "split"))
        if args.liger:
            from addlang.liger import apply_liger

            apply_liger(model)
        if args.compile:
            from addlang.train.loop import compile_layers

            compile_layers(model)
        self.model = model
        on_gpu = args.device == "cuda"
        groups = self.attached.param_groups(0.01)
        self.optimizer = torch.optim.AdamW(groups, lr=5e-5, fused=True)
        shape = (args.batch, args.sequence_length)
        ids = torch.randint(0, model.config.vocab_size, shape, device=args.device)
        self.batch = {"input_ids": ids, "labels": ids}
        self.autocast: Callable[[], Any] = lambda: torch.autocast(
            args.device, torch.bfloat16, enabled=args.precision == "bf16"
        )
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
        self.loss = token_loss

    def __call__(self) -> tuple[float, float]:
        """One step; its seconds, on the clock and on the processor."""
        import torch

        self.synchronize()
        start, used = time.perf_counter(), time.process_time()
        with self.autocast():
            loss, tokens = self.loss(self.model, self.batch)
        (loss / tokens).backward()
        self.attached.before_clip(0)
        torch.nn.utils.clip_grad_norm_([p for _, p in self.attached.named_trainable()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.attached.after_step(0)
        self.synchronize()
        return time.perf_counter() - start, time.process_time() - used


def estimated(args: argparse.Namespace, step: Step) -> int:
    """What ``addlang plan`` says that this step needs."""
    from addlang.recipe import Phase
    from addlang.train.memory import estimate

    phase = Phase.model_validate(
        {
            "datasets": [{"path": "x"}],
            "strategy": "full",
            "sequence_length": args.sequence_length,
            "activation_checkpointing": args.checkpointing,
        }
    )
    form: Any = args.mode.rpartition("_")[2] if "_" in args.mode else "masked"  # the public code has one kind too
    compute = 2 if args.precision == "bf16" else 4
    return estimate(
        step.model.config,
        step.attached.plan,
        phase,
        micro=args.batch,
        stored_bytes=compute,
        compute_bytes=compute,
        form=form,
    )["total"]


def child(args: argparse.Namespace) -> None:
    """One mode on a CPU: build, report what a step computes and its peak memory, then make a step for each line read."""
    import torch

    from addlang.train.peak import Peak

    torch.set_num_threads(args.threads)
    step = Step(args)
    step()  # makes the optimizer's state and the resident weights
    flops = counted(step)
    with Peak() as peak:
        step()
        peak.begin()
        step()
    result = {"flops": flops, "peak_memory": peak.bytes, "estimate": estimated(args, step)}
    print(json.dumps(result), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def counted(step: Step) -> int:
    """Floating-point operations of a step, counted on one of its sequences.

    The counter holds on to what a checkpoint recomputes, so that a whole step would need as much memory as without
    checkpointing; and it knows no fused attention with fewer key than query heads.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    whole = step.batch
    step.batch = {k: v[:1] for k, v in whole.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    step.batch = whole
    return counter.get_total_flops() * len(whole["input_ids"])


def on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """One mode on a GPU; its memory is free again afterwards."""
    import torch

    step: Step | None = None
    try:
        step = Step(args)
        step()  # makes the optimizer's state and the resident weights
        result: dict[str, Any] = {"flops": counted(step)}
        torch.cuda.reset_peak_memory_stats()
        step()
        result |= {"peak_memory": torch.cuda.max_memory_allocated(), "estimate": estimated(args, step)}
        result["all_times"] = [step() for _ in range(args.steps)]
    except torch.OutOfMemoryError as error:
        result = {"failed": str(error).partition(". Of the")[0]}
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return result


def measure(args: argparse.Namespace, sequence_length: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """All modes of one setting."""
    batch = args.batch or (1 if args.device == "cpu" and precision == "fp32" else max(1, 2048 // sequence_length))
    setting = f"{precision}, {sequence_length}, checkpointing {'on' if checkpointing else 'off'}"
    print(f"{args.preset}, {setting}, batch {batch}", file=sys.stderr)
    modes: dict[str, dict[str, Any]] = {}
    running: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[Any]] = {m: [] for m in args.modes}
    for mode in args.modes:
        if args.device == "cuda":
            given = {"mode": mode, "precision": precision, "batch": batch, "checkpointing": checkpointing}
            modes[mode] = on_gpu(argparse.Namespace(**{**vars(args), **given, "sequence_length": sequence_length}))
            times[mode] = modes[mode].pop("all_times", [])
            if "failed" in modes[mode]:
                print(f"  {mode}: {modes[mode]['failed']}", file=sys.stderr)
            continue
        command = [
            sys.executable, __file__, "--child", "--mode", mode, "--precision", precision, "--preset", args.preset,
            "--batch", str(batch), "--sequence_length", str(sequence_length), "--threads", str(args.threads),
            *(["--public", str(args.public)] if args.public else []), *(["--checkpointing"] if checkpointing else []),
            *(["--compile"] if args.compile else []), *(["--liger"] if args.liger else []),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            assert process.stderr is not None
            modes[mode] = {"failed": process.stderr.read().strip().splitlines()[-1]}
            print(f"  {mode}: {modes[mode]['failed']}", file=sys.stderr)
            continue
        modes[mode] = json.loads(first)
        running[mode] = process
    for _ in range(args.steps):
        for mode, process in running.items():
            times[mode].append(ask(process))
    for process in running.values():
        process.communicate("")
    for mode, result in modes.items():
        if times[mode]:
            clock, used = zip(*times[mode], strict=True)
            result.update(time=statistics.median(clock), cpu_time=statistics.median(used), times=clock, cpu_times=used)
    ratios = {}
    for mode in args.modes:
        both = "failed" not in modes[mode] and "failed" not in modes.get("full", {"failed": ""})
        if mode != "full" and both:
            keys = ("time", "flops", "peak_memory", *(["cpu_time"] if args.device == "cpu" else []))
            ratios[f"{mode}/full"] = {k: modes[mode][k] / modes["full"][k] for k in keys}
    split = [m for m in ("split_assemble", "split_resident") if f"{m}/full" in ratios]
    if split:  # the form that is faster here
        ratios["split/full"] = ratios[
            min(split, key=lambda m: modes[m]["cpu_time" if args.device == "cpu" else "time"]) + "/full"
        ]
    for mode, result in modes.items():
        if "failed" not in result:
            result["estimate/measured"] = result["estimate"] / result["peak_memory"]
            print(
                f"  {mode:22} {result['time']:.3f} s, {result['peak_memory'] / 2**30:.2f} GiB, "
                f"estimate/measured memory {result['estimate/measured']:.3f}",
                file=sys.stderr,
            )
    for name, r in ratios.items():
        print(f"  {name:22} " + "  ".join(f"{k} {v:.3f}" for k, v in r.items()), file=sys.stderr)
    return {
        "setting": setting,
        "sequence_length": sequence_length,
        "precision": precision,
        "checkpointing": checkpointing,
        "batch": batch,
        "modes": modes,
        "ratios": ratios,
    }


def ask(process: subprocess.Popen[str]) -> list[float]:
    """Let a child make one step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds: list[float] = json.loads(process.stdout.readline())
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="sequences per step; 2,048 tokens, on a CPU in fp32 1")
    parser.add_argument(
        "--sequence_lengths", "--sequence_length", type=int, nargs="+",
        help="one setting each; 512 and 2048, on a CPU with a larger preset than 100m 512",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:4])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--checkpointings", nargs="+", choices=("off", "on"), default=("off", "on"))
    parser.add_argument("--public", type=Path, help="a clone of gucci-j/ssu, for mode public")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every decoder layer")
    parser.add_argument("--liger", action="store_true", help="liger-kernel's norms, rotary embeddings and SwiGLU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        (args.sequence_length,) = args.sequence_lengths
        child(args)
        return
    import torch

    lengths = args.sequence_lengths or ((512, 2048) if args.device == "cuda" or args.preset == "100m" else (512,))
    settings = [measure(args, n, p, c == "on") for n in lengths for p in args.precisions for c in args.checkpointings]
    result = {
        "preset": args.preset,
        "sequence_lengths": lengths,
        "steps": args.steps,
        "threads": args.threads,
        "compile": args.compile,
        "liger": args.liger,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ratios": {s["setting"]: s["ratios"] for s in settings},
        "settings": settings,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    else:
        print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
