"""Sentence encoders for DES, and the check that an encoder must pass before its similarities are believed.

LaBSE is one of sentence-transformers; its last layer is the pooled first token through a dense layer, so transformers
alone can run it too. Without any encoder the mean hidden states of a language model stand in, labelled "not LaBSE".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from addlang.errors import AddlangError, first_line

if TYPE_CHECKING:
    import numpy as np

LABSE = "sentence-transformers/LaBSE"
Encode = Callable[[Sequence[str]], "np.ndarray[Any, Any]"]
Pooling = Literal["auto", "mean", "cls", "pooler"]
BATCH = 32

# The same twelve statements on three subjects in six languages; no digits and no names, which any encoder would match.
SUBJECTS = ("weather", "cooking", "money")
CHECK: dict[str, tuple[str, ...]] = {
    "en": (
        "It will rain heavily in the mountains tomorrow.", "A cold wind is blowing from the north.",
        "The sky is clear and the sun is shining.", "Snow covered the whole valley during the night.",
        "Boil the rice and then add a little salt.", "Cut the onions into small pieces.",
        "The soup needs more pepper.", "Bake the bread until the crust is brown.",
        "The bank raised the interest on loans.", "She saves part of her salary every month.",
        "Prices of houses have fallen this year.", "He paid the bill with borrowed money.",
    ),
    "de": (
        "Morgen wird es in den Bergen stark regnen.", "Ein kalter Wind weht aus dem Norden.",
        "Der Himmel ist klar und die Sonne scheint.", "In der Nacht bedeckte Schnee das ganze Tal.",
        "Koche den Reis und gib dann etwas Salz dazu.", "Schneide die Zwiebeln in kleine Stücke.",
        "Die Suppe braucht mehr Pfeffer.", "Backe das Brot, bis die Kruste braun ist.",
        "Die Bank hat die Zinsen für Kredite erhöht.", "Sie spart jeden Monat einen Teil ihres Gehalts.",
        "Die Preise der Häuser sind dieses Jahr gesunken.", "Er bezahlte die Rechnung mit geliehenem Geld.",
    ),
    "es": (
        "Mañana lloverá mucho en las montañas.", "Sopla un viento frío del norte.",
        "El cielo está despejado y brilla el sol.", "La nieve cubrió todo el valle durante la noche.",
        "Hierve el arroz y luego añade un poco de sal.", "Corta las cebollas en trozos pequeños.",
        "A la sopa le falta pimienta.", "Hornea el pan hasta que la corteza esté dorada.",
        "El banco subió los intereses de los préstamos.", "Ella ahorra parte de su sueldo cada mes.",
        "Los precios de las casas han bajado este año.", "Él pagó la cuenta con dinero prestado.",
    ),
    "ru": (
        "Завтра в горах будет сильный дождь.", "С севера дует холодный ветер.",
        "Небо ясное, и светит солнце.", "Ночью снег покрыл всю долину.",
        "Сварите рис, а потом добавьте немного соли.", "Нарежьте лук мелкими кусочками.",
        "В супе не хватает перца.", "Пеките хлеб, пока корочка не станет коричневой.",
        "Банк повысил проценты по кредитам.", "Каждый месяц она откладывает часть зарплаты.",
        "Цены на дома в этом году упали.", "Он оплатил счёт взятыми в долг деньгами.",
    ),
    "hi": (
        "कल पहाड़ों में तेज़ बारिश होगी।", "उत्तर से ठंडी हवा चल रही है।",
        "आसमान साफ़ है और धूप निकली है।", "रात में बर्फ़ ने पूरी घाटी को ढक लिया।",
        "चावल उबालो और फिर थोड़ा नमक डालो।", "प्याज़ को छोटे टुकड़ों में काटो।",
        "सूप में और काली मिर्च चाहिए।", "रोटी को तब तक सेंको जब तक वह भूरी न हो जाए।",
        "बैंक ने कर्ज़ पर ब्याज बढ़ा दिया।", "वह हर महीने अपनी तनख़्वाह का एक हिस्सा बचाती है।",
        "इस साल मकानों के दाम गिर गए हैं।", "उसने उधार के पैसों से बिल चुकाया।",
    ),
    "sw": (
        "Kesho mvua kubwa itanyesha milimani.", "Upepo baridi unavuma kutoka kaskazini.",
        "Anga ni safi na jua linawaka.", "Theluji ilifunika bonde lote usiku.",
        "Chemsha mchele kisha ongeza chumvi kidogo.", "Kata vitunguu vipande vidogo.",
        "Supu inahitaji pilipili zaidi.", "Oka mkate hadi ganda liwe la kahawia.",
        "Benki imepandisha riba ya mikopo.", "Yeye huweka akiba sehemu ya mshahara wake kila mwezi.",
        "Bei za nyumba zimeshuka mwaka huu.", "Alilipa bili kwa pesa za kukopa.",
    ),
}  # fmt: skip
NEEDED = 0.5  # share of neighbours on the same subject, and of translations found; LaBSE finds nearly all


@dataclass(frozen=True)
class Known:
    """Texts of which it is known what is alike.

    Attributes:
        texts: in one language.
        subjects: one number per text.
        forms: texts of one form (one phrasing) are never compared: they are alike by their words.
        sources, translations: texts, and by language the same ones, in the same order.
    """

    texts: tuple[str, ...]
    subjects: tuple[int, ...]
    forms: tuple[int, ...]
    sources: tuple[str, ...]
    translations: dict[str, tuple[str, ...]]


def known_texts() -> Known:
    """Twelve statements in six languages."""
    texts = CHECK["en"]
    n = len(texts)
    subjects = tuple(i * len(SUBJECTS) // n for i in range(n))
    return Known(texts, subjects, tuple(range(n)), texts, {c: t for c, t in CHECK.items() if c != "en"})


@dataclass(frozen=True)
class Encoder:
    """A function from texts to vectors [n, d], and what it is.

    Attributes:
        is_labse: whether it is the paper's encoder.
        known: what it is tried on; None: :func:`known_texts`.
    """

    name: str
    encode: Encode
    is_labse: bool = False
    known: Known | None = None


@dataclass(frozen=True)
class Check:
    """Whether an encoder tells like from unlike.

    Attributes:
        subjects: share of texts whose nearest text of another form is on the same subject.
        subjects_p: chance of that for vectors that know nothing (permutation of the subjects).
        translations: share of texts whose translation is nearer than any other, by language.
        tells: subjects are told apart.
        language_agnostic: translations are found.
    """

    subjects: float
    subjects_p: float
    translations: dict[str, float]

    @property
    def tells(self) -> bool:
        return self.subjects >= NEEDED and self.subjects_p < 0.01

    @property
    def language_agnostic(self) -> bool:
        return sum(self.translations.values()) >= NEEDED * len(self.translations)

    def describe(self) -> dict[str, Any]:
        return {**vars(self), "tells": self.tells, "language_agnostic": self.language_agnostic}


def check_encoder(encode: Encode, known: Known | None = None, seed: int = 0) -> Check:
    """Try an encoder on texts of which it is known what is alike; default: :func:`known_texts`."""
    import numpy as np

    known = known or known_texts()
    vectors = unit(encode(known.texts))
    similarity = vectors @ vectors.T
    forms, subject = np.array(known.forms), np.array(known.subjects)
    similarity[forms[:, None] == forms[None]] = -np.inf
    nearest = similarity.argmax(1)
    hits = float((subject == subject[nearest]).mean())
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(subject, (2000, 1)), axis=1)
    p = float(1 + ((shuffled == shuffled[:, nearest]).mean(1) >= hits).sum()) / 2001
    found = {}
    own = unit(encode(known.sources))
    for code, texts in known.translations.items():
        v = unit(encode(texts))
        at = np.concatenate([(v @ own.T).argmax(1), (own @ v.T).argmax(1)])
        found[code] = float((at == np.tile(range(len(v)), 2)).mean())
    return Check(hits, p, found)


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of length 1, float64.

    Raises:
        AddlangError: a vector is zero, NaN or infinite.
    """
    import numpy as np

    wide = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise AddlangError("the encoder gave a vector that is zero or not finite", "use another encoder")
    return wide / lengths


def open_encoder(name: str, *, pooling: Pooling, max_tokens: int, device: str) -> Encoder:
    """A sentence-transformers or transformers encoder by hub id or directory.

    Raises:
        AddlangError: it cannot be loaded; says what to do without a hub.
    """
    from addlang.models import resolve

    is_labse = Path(name).name.lower() == "labse"
    try:
        directory = resolve(name)
    except AddlangError as error:
        raise AddlangError(
            f"encoder: {error.message}",
            "give the directory of an encoder, or use --encoder states for mean hidden states (which are not LaBSE)",
        ) from error
    if (directory / "modules.json").is_file() or is_labse:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            if not is_labse:
                raise AddlangError(
                    f"'{name}' is a sentence-transformers model, and that package is missing ({error})",
                    "install it: pip install 'addlang[analyze]'",
                ) from error
            pooling = "pooler" if pooling == "auto" else pooling  # the same dense layer on the first token
        else:
            model = SentenceTransformer(str(directory), device=device, trust_remote_code=False)
            model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)
            return Encoder(name, lambda texts: model.encode(list(texts), batch_size=BATCH), is_labse)
    encode = _transformers(directory, "mean" if pooling == "auto" else pooling, max_tokens, device)
    return Encoder(name, encode, is_labse)


def _transformers(directory: Path, pooling: str, max_tokens: int, device: str) -> Encode:
    """An encoder of transformers: mean of the last hidden states, the first token, or the pooler's output."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    from addlang.models import Checkpoint

    Checkpoint(directory)  # refuses pickles before anything is read
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        model, loading = AutoModel.from_pretrained(
            str(directory), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise AddlangError(f"{directory}: the encoder cannot be loaded ({first_line(error)})") from error
    # a pooler that is not used may be missing; anything else would be drawn at random
    if missing := [k for k in sorted(loading["missing_keys"]) if pooling == "pooler" or not k.startswith("pooler.")]:
        raise AddlangError(f"encoder {directory} has no tensor '{missing[0]}'", "copy the encoder again")
    model.to(device).eval()
    limit = getattr(model.config, "max_position_embeddings", max_tokens)

    def encode(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=min(max_tokens, limit),
                return_tensors="pt",
            ).to(device)  # fmt: skip
            with torch.inference_mode():
                output = model(**batch)
            if pooling == "pooler":
                if getattr(output, "pooler_output", None) is None:
                    raise AddlangError(f"{directory}: the encoder has no pooler", "use pooling: mean")
                vectors = output.pooler_output
            elif pooling == "cls":
                vectors = output.last_hidden_state[:, 0]
            else:
                mask = batch["attention_mask"].unsqueeze(-1).to(output.last_hidden_state.dtype)
                vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append(vectors.float().cpu().numpy())
        return np.concatenate(parts)

    return encode


def states_encoder(directory: Path, *, layer: int | None, max_tokens: int, device: str) -> Encoder:
    """Mean hidden states of a language model, at two thirds of its depth unless a layer is given."""
    import torch

    from addlang.analyze.states import Chosen, encode, mean_states
    from addlang.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype=torch.float32 if device == "cpu" else None, device=device)

    def run(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        ids = encode(tokenizer, Chosen(tuple(texts), False, max_tokens, ""))
        states = mean_states(model, ids, bos=tokenizer.bos_token_id)
        index = round(2 * (len(states) - 1) / 3) if layer is None else layer
        if not 0 <= index < len(states):
            raise AddlangError(f"layer {index}: the model has layers 0 to {len(states) - 1}")
        return states[index].numpy()

    from addlang.lab import lab_model_path

    if directory.resolve() == lab_model_path().resolve():  # it knows its own small world and nothing else
        from addlang.lab.known import known_prompts

        return Encoder("mean hidden states of the lab model (not LaBSE)", run, known=known_prompts())
    return Encoder(f"mean hidden states of {directory.name} (not LaBSE)", run)
