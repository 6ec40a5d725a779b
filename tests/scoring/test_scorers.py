"""Every scorer against values worked out by hand, and against a direct computation on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, calibration, make_model
from torch import nn

from addlang.errors import AddlangError
from addlang.models import ParamInfo, parameter_kinds
from addlang.scoring import SCORERS, Scores, make_scorer
from addlang.scoring.activations import InputStatistics, sum_of_squares
from addlang.scoring.base import norm_offset

W = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.0]])  # [out 2, in 3]
LINEAR = ParamInfo("linear", "m", "q_proj", 0)
BIAS = ParamInfo("bias", "m", "q_proj", 0)
NORM = ParamInfo("norm", "n", "norm", 0)


def with_statistics(name: str, **kw: Any) -> Any:
    """A scorer that has seen inputs x = (3, 0, 1) and (4, 2, 0): ||x_j|| = 5, 2, 1 over two tokens of one sequence."""
    scorer = make_scorer(name, **kw)
    statistics = InputStatistics(reference=True)
    statistics.squares = {"m": torch.tensor([25.0, 4.0, 1.0]).double(), "n": torch.tensor([4.0, 9.0]).double()}
    statistics.sequence_means = {"m": torch.tensor([12.5, 2.0, 0.5]).double(), "n": torch.tensor([2.0, 4.5]).double()}
    statistics.tokens, statistics.sequences = 2, 1
    scorer.statistics = statistics
    return scorer


def test_wanda_is_weight_times_input_norm_worked_by_hand() -> None:
    scorer = with_statistics("wanda")
    assert scorer.score("w", W, LINEAR, "element").tolist() == [[5, 4, 3], [20, 10, 0]]
    assert scorer.score("w", W, LINEAR, "column").tolist() == [25, 14, 3]
    assert scorer.score("w", W, LINEAR, "row").tolist() == [12, 30]
    assert scorer.score("b", torch.tensor([-1.0, 0.5]), BIAS, "column").tolist() == [1, 0.5]
    assert scorer.score("n", torch.tensor([1.0, -2.0]), NORM, "column").tolist() == [2, 6]


def test_wanda_reference_code_is_the_public_formula_worked_by_hand() -> None:
    scorer = with_statistics("wanda", reference_code=True)
    l2 = [17**0.5, 29**0.5, 3.0]
    assert scorer.score("w", W, LINEAR, "column").tolist() == pytest.approx([l2[0] * 12.5, l2[1] * 2, l2[2] * 0.5])
    assert scorer.score("w", W, LINEAR, "row").tolist() == pytest.approx([14**0.5, 41**0.5])
    assert scorer.score("w", W, LINEAR, "element")[1].tolist() == pytest.approx([4 * 13.5, 5 * 3, 0])
    assert scorer.score("n", torch.tensor([1.0, -2.0]), NORM, "column").tolist() == pytest.approx([3, 11])
    assert scorer.score("b", torch.tensor([-1.0, 0.5]), BIAS, "column").tolist() == pytest.approx([13.5, 1.5])


def test_magnitude_is_summed_absolute_weight_worked_by_hand() -> None:
    scorer = make_scorer("magnitude")
    assert scorer.score("w", W, LINEAR, "column").tolist() == [5, 7, 3]
    assert scorer.score("w", W, LINEAR, "row").tolist() == [6, 9]
    assert scorer.score("w", W, LINEAR, "element").tolist() == W.abs().tolist()


def test_sparsegpt_is_the_mean_squared_input_and_ignores_weights() -> None:
    scorer = with_statistics("sparsegpt")
    assert scorer.score("w", W, LINEAR, "column").tolist() == [25, 4, 1]  # 2 rows x E[x^2] = 12.5, 2, 0.5
    assert scorer.score("w", W, LINEAR, "element").tolist() == [[12.5, 2, 0.5]] * 2


def test_sparsegpt_by_rows_is_refused() -> None:
    with pytest.raises(AddlangError, match="all rows share their inputs"):
        Scores.collect(make_model("llama"), make_scorer("sparsegpt"), "row", calibration())


def test_random_depends_on_seed_and_name_only() -> None:
    a, b, c = make_scorer("random", seed=1), make_scorer("random", seed=1), make_scorer("random", seed=2)
    assert torch.equal(a.score("w", W, LINEAR, "column"), b.score("w", W, LINEAR, "column"))
    assert not torch.equal(a.score("w", W, LINEAR, "column"), c.score("w", W, LINEAR, "column"))
    assert not torch.equal(a.score("w", W, LINEAR, "column"), a.score("v", W, LINEAR, "column"))


def test_fisher_column_sums_equal_the_squared_gradient_worked_by_hand() -> None:
    """X = (1, 2), (0, 1); G = (1), (3): dW = G^T X = (1, 5), squared (1, 25)."""
    scorer = make_scorer("fisher")
    x, g = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
    for granularity, want in (("column", [1, 25]), ("row", [26]), ("element", [[1, 25]])):
        scorer.granularity = granularity
        assert scorer._squares(x, g).tolist() == want
    gram = ((g @ g.T) @ x * x).sum(0)
    assert gram.tolist() == [1, 25]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_fisher_equals_squared_autograd_gradients_per_sequence(architecture: str, granularity: str) -> None:
    model = make_model(architecture).double()
    data = calibration(4)
    scores = Scores.collect(model, make_scorer("fisher"), granularity, data)
    want: dict[str, torch.Tensor] = {}
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[: int(mask.sum())].unsqueeze(0)
            model.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                want[name] = want.get(name, 0) + p.grad.square() / 4
    for name in scores:
        expected = want[name]
        if expected.dim() == 2 and granularity != "element":
            expected = expected.sum(0 if granularity == "column" else 1)
        # the model computes its own loss in fp32
        assert torch.allclose(scores[name], expected, rtol=1e-4, atol=1e-5 * float(expected.max())), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanda_on_a_model_equals_a_direct_computation_without_pads(architecture: str) -> None:
    model = make_model(architecture).double()
    data = calibration(4)
    scores = Scores.collect(model, make_scorer("wanda"), "column", data)
    name = next(n for n in scores if n.endswith("down_proj.weight"))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _m, a: seen.append(a[0][0])
    )
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[: int(mask.sum())].unsqueeze(0))
    handle.remove()
    weight = model.get_parameter(name).abs().sum(0)
    assert torch.allclose(scores[name], weight * torch.cat(seen).norm(dim=0), rtol=1e-5)  # Gemma normalises in fp32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_are_scored_by_their_normalised_activation(architecture: str) -> None:
    model = make_model(architecture).double()
    data = calibration(4)
    scores = Scores.collect(model, make_scorer("wanda"), "column", data)
    norms = [n for n, k in parameter_kinds(model).items() if k.kind == "norm"]
    name = norms[0]
    module = model.get_submodule(name.removesuffix(".weight"))
    outputs: list[torch.Tensor] = []

    def keep(_m: nn.Module, _a: Any, out: torch.Tensor) -> None:
        outputs.append(out.reshape(-1, out.shape[-1]))

    handle = module.register_forward_hook(keep)
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[: int(mask.sum())].unsqueeze(0))
    handle.remove()
    # the output is (offset + w) * normalised, so |effective weight| * ||normalised|| is the norm of the output
    assert torch.allclose(scores[name], torch.cat(outputs).double().norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "offset"), [("llama", 0.0), ("olmo2", 0.0), ("qwen3", 0.0), ("gemma2", 1.0), ("gemma3", 1.0)]
)
def test_gemma_norms_store_an_offset_and_others_do_not(architecture: str, offset: float) -> None:
    model = make_model(architecture)
    for name, kind in parameter_kinds(model).items():
        if kind.kind == "norm":
            assert norm_offset(model.get_submodule(kind.module)) == offset, name


@pytest.mark.parametrize("scorer", SCORERS)
def test_scoring_leaves_weights_and_grad_flags_untouched(scorer: str) -> None:
    model = make_model("qwen3")
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    Scores.collect(model, make_scorer(scorer), "column", calibration())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


def test_padding_does_not_count_in_per_head_norms() -> None:
    x = torch.randn(2, 4, 3, 5)  # [B, heads, T, features]
    rows = torch.tensor([[True, True, True], [True, False, False]])
    want = x[0].square().sum((0, 1)) + x[1, :, 0].square().sum(0)
    assert torch.allclose(sum_of_squares(x, rows).float(), want)
    assert torch.allclose(sum_of_squares(x.transpose(1, 2), rows).float(), want)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_batch_as_long_as_there_are_heads_scores_as_any_other(architecture: str) -> None:
    """Tensors [B, heads, T, d] and [B, T, heads, d] look alike then."""

    def scores(length: int) -> Any:
        data = calibration(2, length=24)
        for batch in data.batches:
            batch["input_ids"] = batch["input_ids"][:, :length]
            batch["attention_mask"] = (torch.arange(length) < torch.tensor([[4], [3]])).long()
        return Scores.collect(make_model(architecture), make_scorer("wanda"), "column", data)

    four, six = scores(4), scores(6)  # four heads; the real tokens are the same
    for name in four:
        assert torch.allclose(four[name], six[name], rtol=1e-4), name


def test_nan_activations_are_an_error_that_names_the_module() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(AddlangError, match=r"activations entering '.*down_proj'.*NaN"):
        Scores.collect(model, make_scorer("wanda"), "column", calibration())


def test_a_score_that_is_missing_is_an_error() -> None:
    scores = Scores.collect(make_model("llama"), make_scorer("magnitude"), "column")
    with pytest.raises(AddlangError, match=r"no score for parameter 'model\.layers\.0\.self_attn\.q_prj\.weight'"):
        scores["model.layers.0.self_attn.q_prj.weight"]


def test_missing_calibration_is_an_error_and_never_falls_back_to_magnitude() -> None:
    for name in ("wanda", "sparsegpt", "fisher"):
        with pytest.raises(AddlangError, match="needs calibration data"):
            Scores.collect(make_model("llama"), make_scorer(name), "column", None)


def test_unknown_scorer_names_the_nearest() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'wanda'"):
        make_scorer("wandda")


@pytest.mark.parametrize("scorer", ["wanda", "sparsegpt", "fisher"])
def test_scores_do_not_depend_on_how_sequences_fall_into_batches(scorer: str) -> None:
    """Layers that share an input once shared, and so summed thrice, one statistic from the second batch on."""
    model = make_model("llama")
    whole = calibration(sequences=6)
    single = [
        {"input_ids": b["input_ids"][i : i + 1, :n], "attention_mask": b["attention_mask"][i : i + 1, :n]}
        for b in whole
        for i, n in enumerate(b["attention_mask"].sum(1).tolist())
    ]

    class Single:
        sequences = len(single)

        def __iter__(self) -> Any:
            return iter(single)

    one, other = (Scores.collect(model, make_scorer(scorer), "column", c) for c in (whole, Single()))  # type: ignore[arg-type]
    model.double()
    exact = Scores.collect(model, make_scorer(scorer), "column", Single())  # type: ignore[arg-type]
    for name in exact:
        want = exact[name]
        for found in (one[name], other[name]):
            assert torch.allclose(found.double() / found.double().norm(), want / want.norm(), rtol=2e-3, atol=1e-6), (
                name
            )


def test_wanda_of_several_batches_equals_a_direct_computation() -> None:
    model = make_model("llama")
    given = calibration(sequences=6)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str, rows: torch.Tensor) -> Any:
        def add(_: Any, args: Any) -> None:
            seen[name] = seen.get(name, 0) + args[0][rows].double().square().sum(0)

        return add

    names = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    for batch in given:
        rows = batch["attention_mask"].bool()
        handles = [model.get_submodule(n).register_forward_pre_hook(hook(n, rows)) for n in names]
        with torch.no_grad():
            model(**batch)
        for h in handles:
            h.remove()
    scores = Scores.collect(model, make_scorer("wanda"), "column", given)
    for n in names:
        want = model.get_submodule(n).weight.detach().abs().sum(0) * seen[n].sqrt().float()
        assert torch.allclose(scores[f"{n}.weight"], want, rtol=1e-5), n


def test_statistics_of_a_16_bit_model_are_not_kept_in_16_bits() -> None:
    """The public code keeps them in bf16, where a sum of ones stops at 256."""
    model = make_model("llama").bfloat16()
    data = calibration(40)
    statistics = InputStatistics()
    name = "model.layers.0.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach().clone()))
    statistics.collect(model, data)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    real = torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])
    assert real.dtype == torch.bfloat16
    exact = real.double().square().sum(0)
    assert torch.allclose(statistics.squares[name], exact, rtol=1e-6)
    in_bf16 = torch.zeros_like(real[0])
    for row in real:
        in_bf16 += row.square()
    assert not torch.allclose(in_bf16.double(), exact, rtol=1e-2)
