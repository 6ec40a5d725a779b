"""Agreement with public code: the tables of docs/parity.md that compare with it, on tiny random models in fp32.

    git clone https://github.com/gucci-j/ssu && git clone https://github.com/locuslab/wanda
    python benchmarks/parity.py --ssu ssu --wanda wanda --s2ft S2FT --lota lottery-ticket-adaptation

Public code is imported from the clones that are given and called as it is; a clone that is missing is named as not compared. Exit
status 1 if something that should agree does not. What differs on purpose (the code's formula against the paper's, ties, micro-batches)
is printed and decides nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import math
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from addlang.models import parameter_kinds
from addlang.scoring import Scores, make_scorer
from addlang.strategies import PlanInputs, make_strategy

REPOSITORIES = {
    "ssu": "gucci-j/ssu", "wanda": "locuslab/wanda", "s2ft": "Infini-AI-Lab/S2FT", "lota": "kiddyboots216/lottery-ticket-adaptation",
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMo 2": ("Olmo2", {}),
    "Llama (with biases)": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {}),
    "Qwen 2 (biases)": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", {"head_dim": 16}),
    "Gemma 2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "gate_proj", "down_proj")


def make_model(family: str, **changes: Any) -> Any:
    """Hidden size 64; norms and biases are not left at 1 and 0."""
    import transformers

    sizes = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


class Calibration:
    """Sequences of random tokens without padding, one a batch."""

    def __init__(self, sequences: int) -> None:
        g = torch.Generator().manual_seed(1)
        self.sequences = sequences
        ids = [torch.randint(1, 256, (1, 32), generator=g) for _ in range(sequences)]
        self.batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def describe(self) -> dict[str, Any]:
        return {"source": "random tokens", "sequences": self.sequences}


class Report:
    """Tables in Markdown, and whether everything agreed that should."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print(f"\n## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")

    def must(self, ok: bool, what: str) -> None:
        if not ok:
            self.failed.append(what)


def load(file: Path, name: str) -> Any:
    """One file of a clone as a module; its siblings are found under the same package."""
    for known in [m for m in sys.modules if m.startswith(f"{name}.")]:
        del sys.modules[known]  # of another clone
    package = types.ModuleType(name)
    package.__path__ = [str(file.parent)]  # its __init__ is not run: it would import what is not needed here
    sys.modules[name] = package
    importlib.invalidate_caches()
    return importlib.import_module(f"{name}.{file.stem}")


def quietly(call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **kw)


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def let_through(model: Any) -> dict[str, torch.Tensor]:
    """name -> bool, where a gradient of ones gets through the hooks on the parameters."""
    model.zero_grad()
    sum((p * torch.ones_like(p)).sum() for p in model.parameters()).backward()  # hooks write in place: nothing expanded
    return {n: p.grad != 0 for n, p in model.named_parameters()}


def ssu_masks(clone: Path, report: Report) -> None:
    public = load(clone / "training" / "src" / "utils" / "model_utils.py", "public_ssu")
    rows = []
    for label, (family, changes) in MODELS.items():
        data = Calibration(16)
        inputs = PlanInputs(calibration=lambda data=data: data)
        model = make_model(family, **changes)
        ours = make_strategy("ssu", {"reference_code": True}).plan(model, inputs)
        paper = make_strategy("ssu", {}).plan(model, inputs)
        quietly(
            public._freeze_ssu_based_parameters, model, 0.5, 0, True, [{"input_ids": b["input_ids"]} for b in data], 16
        )
        free = let_through(model)
        shares: dict[str, list[float]] = {"matrices": [0, 0], "norms and biases": [0, 0], "paper": [0, 0]}
        for name, info in parameter_kinds(model).items():
            mine, theirs = ours[name].mask(), ~free[name]
            kind = "matrices" if mine.dim() > 1 else "norms and biases"
            shares[kind][0] += int((mine == theirs).sum())
            shares[kind][1] += mine.numel()
            if info.kind == "linear" and mine.dim() > 1:
                shares["paper"][0] += int((theirs[0] & paper[name].mask()[0]).sum())
                shares["paper"][1] += int(theirs[0].sum())
        values = [agree / total for agree, total in shares.values()]
        report.must(values[:2] == [1, 1], f"SSU's masks, {label}")
        rows.append((label, *map(percent, values)))
    report.table(
        "SSU: the paper's public code",
        ("architecture", "agreement, matrices", "agreement, norms and biases", "overlap of its frozen columns with the paper's formula"),
        rows,
    )  # fmt: skip


def hft(clone: Path, report: Report) -> list[tuple[str, str]]:
    public = load(clone / "training" / "src" / "utils" / "model_utils.py", "public_hft")
    results = []
    for label, family in (("Llama", "Llama"), ("OLMo 2", "Olmo2"), ("Qwen 3", "Qwen3"), ("Gemma 2", "Gemma2")):
        model = make_model(family, **MODELS[label][1] if label in MODELS else {})
        plan = make_strategy("hft", {}).plan(model, PlanInputs())
        quietly(public._freeze_hft_parameters, model, 0.5, 0, True)
        kinds = parameter_kinds(model)

        def counts(
            frozen: Callable[[str], bool], model: Any = model, kinds: Any = kinds
        ) -> dict[str, list[tuple[int, int]]]:
            """group -> frozen of how many modules, layer by layer in ascending order."""
            found: dict[str, dict[int, list[bool]]] = {"attention": {}, "mlp": {}, "norms": {}}
            for name, info in kinds.items():
                if info.layer is not None and name.endswith("weight"):
                    group = "attention" if info.group in ATTENTION else "mlp" if info.group in MLP else "norms"
                    found[group].setdefault(info.layer, []).append(frozen(name))
            return {g: sorted((sum(v), len(v)) for v in by_layer.values()) for g, by_layer in found.items()}

        theirs = counts(lambda n, model=model: not model.get_parameter(n).requires_grad)
        mine = counts(lambda n, plan=plan: plan[n].kind == "all")
        equal = theirs["attention"] == mine["attention"] and theirs["mlp"] == mine["mlp"]
        report.must(equal, f"HFT's counts, {label}")
        norms = [f"{c['norms'][0][0]} of {c['norms'][0][1]}" for c in (theirs, mine)]
        mlp = " and ".join(str(n) for n in sorted({k for k, _ in theirs["mlp"]}))
        results.append(
            (
                f"HFT: modules frozen per layer at 0.5, four layers, {label}",
                f"attention and MLP counts {'equal' if equal else '**differ**'} ({theirs['attention'][0][0]} of 4; {mlp} of 3); "
                f"norms: the code {norms[0]}, ours {norms[1]}",
            )
        )
    return results


def gmt(clone: Path, report: Report) -> list[tuple[str, str]]:
    from addlang.strategies.gmt import drop_smallest

    trainer = load(clone / "training" / "src" / "utils" / "gmt_trainer.py", "public_gmt").GMTTrainer

    def theirs(gradient: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros_like(gradient))
        p.grad = gradient.clone()
        trainer.apply_mask_to_gradient(None, p, ratio=0.5)
        return p.grad

    def mine(gradient: torch.Tensor) -> torch.Tensor:
        given = gradient.clone()
        drop_smallest(given, 0.5)
        return given

    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(64, 64, generator=g)
    same = torch.equal(theirs(gradient), mine(gradient))
    report.must(same, "GMT's choice within one gradient")
    equal = torch.full((8, 8), 0.25)
    summed, masked = torch.zeros(64, 64), torch.zeros(64, 64)
    for micro in torch.randn(4, 64, 64, generator=g):
        summed += micro
        masked = theirs(masked + micro)  # its trainer masks what has accumulated, after every micro-batch
    kept = masked != 0
    return [
        ("GMT: one gradient, ratio 0.5, no ties", "identical" if same else "**differs**"),
        ("GMT: a gradient of 64 equal values", f"the code keeps {int((theirs(equal) != 0).sum())}, ours {int((mine(equal) != 0).sum())}"),
        (
            "GMT: accumulation over 4 micro-batches",
            f"the code masks what has accumulated after every micro-batch: it keeps {percent(float(kept.float().mean()))}, of which "
            f"{percent(float((mine(summed)[kept] == 0).float().mean()))} are not among the largest of the whole, which the paper and ours keep",
        ),
    ]  # fmt: skip


def lota_deltas() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {f"layers.{i}.proj.weight": torch.randn(64, 64, generator=g) for i in range(4)}


def agreement(masks: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor], sparsity: float) -> tuple[bool, str]:
    """Of what is trained: the same choice for the same number, and numbers that differ by rounding at most."""
    from addlang.strategies.lota import largest

    total = sum(d.numel() for d in deltas.values())
    theirs, ours = sum(int(m.sum()) for m in masks.values()), total - int(total * sparsity)
    chosen = largest(deltas, theirs, seed=0)
    equal = sum(int((chosen[n] == masks[n]).sum()) for n in deltas)
    return equal == total and abs(
        theirs - ours
    ) <= 1, f"{equal:,} of {total:,} entries; the code trains {theirs:,}, ours {ours:,}"


def lota_of_ssu(clone: Path, report: Report) -> list[tuple[str, str]]:
    public = load(clone / "training" / "src" / "utils" / "model_utils.py", "public_lota")
    results, deltas = [], lota_deltas()
    for sparsity in (0.5, 0.9):
        masks, _, _ = public._lota_extract_mask_from_delta(deltas, sparsity, True, lambda _: False)
        ok, result = agreement(masks, deltas, sparsity)
        report.must(ok, f"LoTA's mask in the SSU code, sparsity {sparsity}")
        results.append((f"LoTA: mask from given changes, sparsity {sparsity}", result))
    return results


def s2ft_of_ssu(clone: Path, report: Report) -> list[tuple[str, str]]:
    public = load(clone / "training" / "src" / "utils" / "s2ft.py", "public_s2ft")
    results = []
    for family in ("Llama", "Mistral"):
        model = make_model(family)
        for group, ratio in (("down_proj", 0.03), ("down_proj", 0.11), ("o_proj", 0.25)):
            if group == "down_proj":
                chosen = public.s2ft_select_ffn_up_down(model, 0.0, ratio, seed=42)[group]
                option, width = {"d_ratio": ratio}, 1
            else:
                chosen = public.s2ft_select_mha_heads(model, 0.0, ratio, seed=42)[group]
                option, width = {"d_ratio": 0.0, "o_ratio": ratio}, 16
            plan = make_strategy("s2ft", option).plan(model, PlanInputs(seed=42))
            same = all(free_units(plan, i, group, width) == sorted(units) for i, units in chosen.items())
            report.must(same, f"S2FT's {group}, {ratio}, {family}")
            results.append((f"S2FT: {group} at {ratio}, seed 42, {family}", "identical" if same else "**differs**"))
    return results


def free_units(plan: Any, layer: int, group: str, width: int) -> list[int]:
    """Channels, or heads of ``width`` columns, of one layer that the plan leaves free."""
    part = "mlp" if group == "down_proj" else "self_attn"
    free = ~plan[f"model.layers.{layer}.{part}.{group}.weight"].mask()[0]
    return [int(i) // width for i in free.nonzero().flatten()[::width]]


def ssu(clone: Path, report: Report) -> None:
    ssu_masks(clone, report)
    rows = [*hft(clone, report), *gmt(clone, report), *lota_of_ssu(clone, report), *s2ft_of_ssu(clone, report)]
    report.table("HFT, GMT, LoTA and S2FT in the same code", ("what was compared", "result"), rows)


def wanda(clone: Path, report: Report) -> None:
    """Their element-wise metric times the square root of the number of sequences is ours."""
    wrapper = load(clone / "lib" / "layerwrapper.py", "public_wanda").WrappedGPT
    model, data = make_model("Llama"), Calibration(3)
    scores = Scores.collect(model, make_scorer("wanda"), "element", data)
    modules = dict(model.named_modules())
    wrapped = {i.module: wrapper(modules[i.module]) for i in parameter_kinds(model).values() if i.kind == "linear"}
    handles = [
        modules[n].register_forward_hook(lambda _, args, out, w=w: w.add_batch(args[0].data, out.data))
        for n, w in wrapped.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    worst: dict[str, float] = {}
    for name, w in wrapped.items():
        theirs = modules[name].weight.detach().abs() * w.scaler_row.sqrt() * math.sqrt(data.sequences)
        error = float((scores[f"{name}.weight"] / theirs - 1).abs().max())
        group = name.rpartition(".")[2]
        worst[group] = max(worst.get(group, 0.0), error)
    for group, error in worst.items():
        report.must(error < 2e-6, f"Wanda's scores of {group}")
    report.table(
        "Wanda: the authors' code, three sequences", ("scores of", "largest relative difference"),
        [(group, f"{error:.1e}") for group, error in worst.items()],
    )  # fmt: skip


def s2ft(clone: Path, report: Report) -> None:
    """The authors' conversion, given our choice: what it trains, and whether its model is still the source."""
    public = load(clone / "efficiency" / "s2ft.py", "public_s2ft_authors")
    ids, rows = torch.arange(1, 33).unsqueeze(0), []
    for label, family, kv in (("Llama", "Llama", 4), ("OLMo 2", "Olmo2", 4), ("Llama, grouped queries", "Llama", 2)):
        model = make_model(family, num_key_value_heads=kv)
        plan = make_strategy("s2ft", {"d_ratio": 0.11, "o_ratio": 0.25}).plan(model, PlanInputs(seed=42))
        layers = range(model.config.num_hidden_layers)
        none: dict[int, list[int]] = {i: [] for i in layers}
        channels = {i: free_units(plan, i, "down_proj", 1) for i in layers}
        heads = {i: free_units(plan, i, "o_proj", 16) for i in layers}
        for what, convert, chosen in (
            ("down projections", public.convert_ffn_layer_to_s2, {"up_proj": none, "down_proj": channels}),
            ("output projections", public.convert_mha_layer_to_s2, {"v_proj": none, "o_proj": heads}),
        ):
            other = copy.deepcopy(model)
            try:
                quietly(convert, other, chosen)
                with torch.no_grad():
                    error = float((other(ids).logits - model(ids).logits).abs().max())
            except (IndexError, RuntimeError) as problem:
                rows.append((label, what, f"it fails: {type(problem).__name__}"))
                continue
            trains = same_columns(model, other, plan, what)
            columns = "the same" if trains else "**other**"
            rows.append((label, what, f"trains {columns} columns; logits before the first step differ by {error:.1e}"))
            report.must(trains, f"S2FT's columns, {label}, {what}")
            if label == "Llama" or what == "down projections":
                report.must(error < 1e-3, f"S2FT's logits, {label}, {what}")
    report.table("S2FT: the authors' conversion, given our choice (0.11, 0.25)", ("model", "of", "result"), rows)


def same_columns(model: Any, other: Any, plan: Any, what: str) -> bool:
    """Whether the slice that the converted layers train holds the columns that our plan leaves free."""
    part, group = ("mlp", "down_proj") if what == "down projections" else ("self_attn", "o_proj")
    for i in range(model.config.num_hidden_layers):
        name = f"model.layers.{i}.{part}.{group}"
        free = ~plan[f"{name}.weight"].mask()[0]
        layer = other.get_submodule(name)
        if type(layer) is torch.nn.Linear:  # none of this layer was chosen
            if bool(free.any()):
                return False
            continue
        if not torch.equal(
            layer.weight.data[:, layer.start : layer.end], model.get_parameter(f"{name}.weight").data[:, free]
        ):
            return False
    return True


def lota(clone: Path, report: Report) -> None:
    """The authors' global mask (True: pruned) of the changes that the SSU code was given."""
    public = load(clone / "rlaif" / "save_mask.py", "public_lota_authors")
    deltas, rows = lota_deltas(), []
    holder = torch.nn.Module()
    for name, delta in deltas.items():
        module = holder
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter("weight", torch.nn.Parameter(delta.clone()))
    with tempfile.TemporaryDirectory() as folder:
        for sparsity, pruned in quietly(
            public.get_global_sparsity_masks, holder, [0.5, 0.9], folder, lambda _: True
        ).items():
            ok, result = agreement({n: ~m for n, m in pruned.items()}, deltas, sparsity)
            report.must(ok, f"LoTA's mask in the authors' code, sparsity {sparsity}")
            rows.append((str(sparsity), result))
    report.table("LoTA: the authors' code, mask from given changes", ("sparsity", "agreement"), rows)


COMPARISONS: dict[str, Callable[[Path, Report], None]] = {"ssu": ssu, "wanda": wanda, "s2ft": s2ft, "lota": lota}


def commit(clone: Path) -> str:
    done = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git clone, commit unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, repository in REPOSITORIES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="CLONE", help=f"a clone of {repository}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report()
    for name, compare in COMPARISONS.items():
        clone = getattr(args, name)
        if clone is None:
            print(f"\n{REPOSITORIES[name]}: not compared (give --{name} CLONE)")
            continue
        if not clone.is_dir():
            parser.error(f"--{name} {clone}: no such folder")
        print(f"\n{REPOSITORIES[name]}: {commit(clone)}")
        compare(clone, report)
    for what in report.failed:
        print(f"\nno agreement: {what}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
