"""DES by hand, its interval, and encoders that must not be believed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, save_model

from addlang.analyze.base import Context, make_analysis
from addlang.analyze.des import require_check, sample_texts, similarity
from addlang.analyze.encoders import CHECK, Encoder, check_encoder, open_encoder, states_encoder
from addlang.errors import AddlangError, AddlangWarning
from addlang.lab import lab_model_path
from addlang.schema import DatasetSpec


def test_des_is_the_product_of_the_renormalised_means() -> None:
    one = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = similarity(one, np.array([[1.0, 0.0]]))
    assert found.value == pytest.approx(2**-0.5)
    assert found.low <= found.value <= found.high
    assert similarity(one, one).value == pytest.approx(1.0)
    assert similarity(np.array([[1.0, 0.0]]), np.array([[-2.0, 0.0]])).value == pytest.approx(-1.0)


def test_the_interval_narrows_with_the_rows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 500):
        a, b = rng.normal(1, 1, (n, 8)), rng.normal(1, 1, (n, 8))
        found = similarity(a, b)
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


def random_vectors(texts: Sequence[str]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(texts[-1].encode())).normal(size=(len(texts), 64))


def knowing(texts: Sequence[str]) -> np.ndarray:
    """An encoder that looks the statements up."""
    where = {text: i for statements in CHECK.values() for i, text in enumerate(statements)}
    eye = np.eye(15)
    return np.stack([eye[where[t]] + eye[12 + where[t] // 4] for t in texts])


def test_a_random_encoder_fails_the_check() -> None:
    with pytest.raises(AddlangError, match="knows nothing"):
        require_check(Encoder("random", random_vectors))


def test_an_encoder_that_knows_passes_it() -> None:
    check = require_check(Encoder("knowing", knowing))
    assert check.tells
    assert check.language_agnostic
    assert set(check.translations) == {"de", "es", "ru", "hi", "sw"}


def test_an_encoder_of_one_language_is_believed_with_a_warning() -> None:
    def english_only(texts: Sequence[str]) -> np.ndarray:
        return knowing(texts) if texts[0] in CHECK["en"] else random_vectors(texts)[:, :15]

    with pytest.warns(AddlangWarning, match="does not find translations"):
        assert not require_check(Encoder("english", english_only)).language_agnostic


def test_every_statement_of_the_check_stands_in_every_language() -> None:
    assert {len(texts) for texts in CHECK.values()} == {12}
    assert len({t for texts in CHECK.values() for t in texts}) == 72


def test_the_states_of_the_lab_model_tell_its_tasks_apart_and_those_of_a_random_twin_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import addlang.models

    encoder = states_encoder(lab_model_path(), layer=None, max_tokens=64, device="cpu")
    assert "not LaBSE" in encoder.name
    assert check_encoder(encoder.encode, encoder.known).tells

    trained = addlang.models.load_model

    def random_twin(*args: object, **options: object) -> object:
        model = trained(*args, **options)  # type: ignore[arg-type]
        torch.manual_seed(0)
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, 0, 0.02)
        return model

    monkeypatch.setattr(addlang.models, "load_model", random_twin)
    twin = states_encoder(lab_model_path(), layer=None, max_tokens=64, device="cpu")
    with pytest.raises(AddlangError, match="knows nothing"):
        require_check(twin)


@pytest.mark.filterwarnings("ignore::addlang.errors.AddlangWarning")
def test_sets_of_the_lab_are_graded_as_they_were_made() -> None:
    kinds = ("english", "similar-sw", "dissimilar")
    texts = {k: DatasetSpec(path=f"lab://{k}?documents=300&seed=5") for k in kinds}
    texts["more"] = DatasetSpec(path="lab://english?documents=300&seed=6")
    analysis = make_analysis("des", {"encoder": "states", "model": "lab", "reference": "english", "samples": 200})
    found = {p["sets"][1]: p["value"] for p in analysis.run(Context({}, texts)).data["pairs"]}
    assert found["more"] > found["similar-sw"] > found["dissimilar"]
    assert found["more"] > 0.9


def test_what_is_embedded_can_be_chosen_and_the_sample_is_seeded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"ask {i}", "input": "", "output": f"answer {i}"} for i in range(50)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    spec = DatasetSpec(path=str(path))
    prompts = sample_texts(spec, 10, 0, "prompts")
    assert all(t.startswith("ask") and "answer" not in t for t in prompts)
    assert all("answer" in t for t in sample_texts(spec, 10, 0, "rows"))
    assert prompts == sample_texts(spec, 10, 0, "prompts") != sample_texts(spec, 10, 1, "prompts")


def test_an_encoder_of_transformers_pools_real_tokens_only(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    for pooling in ("auto", "cls", "pooler"):
        encode = open_encoder(str(tmp_path / "bert"), pooling=pooling, max_tokens=32, device="cpu").encode  # type: ignore[arg-type]
        alone, together = encode(["the cat"]), encode(["the cat", "the rat sat on the other mat"])
        assert np.allclose(alone[0], together[0], atol=1e-5)
    file = tmp_path / "bert" / "model.safetensors"
    stored = load_file(file)
    for lost, pooling in (("pooler.dense.weight", "pooler"), ("encoder.layer.0.output.dense.weight", "mean")):
        save_file({k: v for k, v in stored.items() if k != lost}, file, {"format": "pt"})
        with pytest.raises(AddlangError, match=f"has no tensor '{lost}'"):
            open_encoder(str(tmp_path / "bert"), pooling=pooling, max_tokens=32, device="cpu")  # type: ignore[arg-type]
    save_file({k: v for k, v in stored.items() if "pooler" not in k}, file, {"format": "pt"})
    open_encoder(str(tmp_path / "bert"), pooling="mean", max_tokens=32, device="cpu")


def test_without_a_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AddlangError, match="--encoder states"):
        open_encoder("sentence-transformers/LaBSE", pooling="auto", max_tokens=32, device="cpu")


def test_a_causal_model_of_random_weights_is_refused_as_encoder(tmp_path: Path) -> None:
    encoder = states_encoder(save_model(tmp_path / "m"), layer=None, max_tokens=64, device="cpu")
    with pytest.raises(AddlangError, match="knows nothing"):
        require_check(encoder)


@pytest.mark.slow
def test_a_model_of_sentence_transformers_is_run_by_its_own_modules(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    parts = [Transformer(str(tmp_path / "bert")), Pooling(16, pooling_mode="cls"), Normalize()]
    library.SentenceTransformer(modules=parts).save(str(tmp_path / "encoder"))
    directory = tmp_path / "encoder"
    if not (directory / "config.json").is_file():
        pytest.skip("this version keeps the transformer in a folder of its own")
    texts = ["the cat", "the rat sat on the other mat"]
    own = open_encoder(str(directory), pooling="auto", max_tokens=32, device="cpu").encode(texts)
    assert np.allclose(own, library.SentenceTransformer(str(directory)).encode(texts), atol=1e-6)
    assert np.allclose(np.linalg.norm(own, axis=1), 1, atol=1e-6)
