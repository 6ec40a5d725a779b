"""shield(): other people's loops cannot move what is frozen, and what they save is an ordinary checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "freeze"))
sys.path.insert(0, str(Path(__file__).parent))
from test_split import CASES, assert_frozen_intact, batches, make, make_plan
from tiny import make_model, make_tokenizer

from addlang.errors import AddlangError
from addlang.freeze.plan import FreezePlan
from addlang.freeze.split_linear import SplitLinear
from addlang.shielding import shield, unshield

DOCS = Path(__file__).parent.parent / "docs" / "shield.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
TEXTS = ["the cat sat on the mat and the rat ran to the other hat " * 2] * 16


def snapshot(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_ordinary(folder: Path, model: Any, source: dict[str, Tensor], plan: FreezePlan, dtype: torch.dtype) -> None:
    """The folder loads without addlang, has no extra keys, gives the model's logits and keeps the frozen part."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with safe_open(str(folder / "model.safetensors"), "pt") as f:
        stored = set(f.keys())
    assert stored == set(source), sorted(stored ^ set(source))[:4]
    same = {"dtype": dtype, "attn_implementation": model.config._attn_implementation}
    loaded, report = AutoModelForCausalLM.from_pretrained(str(folder), **same, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    now = snapshot(loaded)
    assert_frozen_intact(plan, source, now)
    assert any((now[n] != source[n].to(dtype)).any() for n in source)
    plain = type(model)(model.config).eval()  # the Trainer leaves its autocast in model.forward
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(3, 13).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_plain_loop_and_checkpoint(case: str, tmp_path: Path) -> None:
    model = make(case)
    source, plan = snapshot(model), make_plan(model)
    assert shield(model, plan) is model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for ids in batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    assert_ordinary(tmp_path, model, source, plan, torch.float32)
    logits = model(batches(1)[0]).logits
    loaded = type(model).from_pretrained(str(tmp_path))
    torch.testing.assert_close(loaded(batches(1)[0]).logits, logits, rtol=1e-5, atol=1e-5)
    unshield(model)
    assert not any(isinstance(m, SplitLinear) for m in model.modules())
    assert_frozen_intact(plan, source, snapshot(model))
    torch.testing.assert_close(model(batches(1)[0]).logits, logits, rtol=1e-5, atol=1e-5)
    shield(model, plan)  # and again


def test_a_dense_checkpoint_can_be_loaded_into_a_shielded_model() -> None:
    model, other = make("qwen3-tied"), make("qwen3-tied")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    plan = make_plan(model)
    shield(model, plan)
    report = model.load_state_dict(other.state_dict())
    assert not report.missing_keys
    assert not report.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({n: t for n, t in other.state_dict().items() if "up_proj" not in n})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({n: t[:1] if "up_proj" in n else t for n, t in other.state_dict().items()})
    with pytest.raises(AddlangError, match="assign"):
        model.load_state_dict(other.state_dict(), assign=True)


def test_refusals() -> None:
    model = make("llama-bias")
    plan = make_plan(model)
    with pytest.raises(AddlangError, match="not shielded"):
        unshield(model)
    with pytest.raises(AddlangError, match="cannot use execution 'split_resident'"):
        shield(model, plan, execution="split_resident")  # type: ignore[arg-type]
    shield(model, plan)
    with pytest.raises(AddlangError, match="shielded already"):
        shield(model, plan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_clipping_in_a_trainer_sees_only_what_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make("llama-bias")
    plan, rows = make_plan(model), batches(1)[0]
    model(input_ids=rows, labels=rows).loss.backward()
    trained = [p.grad[~plan[n].mask()] for n, p in model.named_parameters() if p.grad is not None]
    model.zero_grad()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, max_grad_norm=0.1,
        save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=shield(model, plan), args=arguments, train_dataset=data)
    trainer.train()
    norm = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    assert norm == pytest.approx(float(torch.cat(trained).norm()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "fp32 masters of bf16"])
def test_a_trainer_that_resumes_from_its_checkpoint_equals_one_that_was_not_interrupted(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = torch.cat(batches(4))
    finals = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = make("llama-bias").to(dtype)
        source, plan = snapshot(model), make_plan(model)
        if start is not None:  # whatever it was before
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
            bf16=dtype == torch.bfloat16, save_steps=2, report_to=[], use_cpu=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=shield(model, plan), args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=start)
        assert trainer.state.global_step == 4
        finals.append({n: t.clone() for n, t in model.state_dict().items()})
        assert_frozen_intact(plan, source, snapshot(unshield(model)))
    assert all(torch.equal(finals[0][n], t) for n, t in finals[1].items())
    assert any(bool((t != source[n]).any()) for n, t in finals[1].items())


@pytest.mark.parametrize("number", range(1, len(BLOCKS)), ids=["plain", "trainer", "trl"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_examples_of_the_documentation(number: int, tmp_path: Path) -> None:
    code = BLOCKS[number]
    for library in ("trl", "datasets", "accelerate"):
        if library in code or (library == "accelerate" and "Trainer" in code):
            pytest.importorskip(library, reason=f"the example needs {library}")
    model, tokenizer = make_model("llama"), make_tokenizer()
    source = snapshot(model)
    world: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "folder": str(tmp_path), "texts": TEXTS, "use_cpu": True,
    }  # fmt: skip
    exec(BLOCKS[0], world)
    exec(code, world)
    folder = tmp_path / ["", "plain", "trained", "trained-sft"][number]
    assert any(isinstance(m, SplitLinear) for m in model.modules())
    assert_ordinary(folder, model, source, world["plan"], torch.float32)
    for checkpoint in (tmp_path / "trainer").glob("checkpoint-*"):
        assert_ordinary_keys(checkpoint, source)


def assert_ordinary_keys(folder: Path, source: dict[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), "pt") as f:
        assert set(f.keys()) == set(source)


def test_a_model_that_is_sharded_already_is_refused_by_name() -> None:
    """Also one loaded with a tensor-parallel plan: rows of its weights lie elsewhere."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make("olmo2")
    plan = make_plan(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(AddlangError, match=r"is sharded already(.|\n)*then shard it"):
            shield(model, plan)
    finally:
        dist.destroy_process_group()
