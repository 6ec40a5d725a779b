"""A translation model on this machine: encoder-decoder (NLLB, M2M-100, MADLAD-400, OPUS-MT) or a chat model, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from addlang.builders.backend import Reply, Request
from addlang.builders.prompt import messages
from addlang.data.chat import render, require_chat_template
from addlang.errors import AddlangError, did_you_mean

WINDOW = 16  # batches whose requests are sorted by length together, so that little is padding


class LocalModel:
    """Batched generation with a Hugging Face model; deterministic.

    A text that was refused is asked for again differently: a chat model is told what was wrong, an encoder-decoder gives
    its next best translation (beam search).

    Args:
        directory: of the model, with safetensors weights.
        prompt, source, target, mark: for chat models, see :mod:`addlang.builders.prompt`.
        source_code, target_code: the model's own names of the languages, such as ``eng_Latn``; for models that have them.
        prefix: put before every text, such as ``<2ha> `` for MADLAD-400.
        beams: of an encoder-decoder.
        max_new_tokens: of a reply; None: three per token of the text, and 32.
    """

    def __init__(
        self,
        directory: Path,
        *,
        prompt: str,
        source: str,
        target: str,
        mark: str,
        source_code: str | None = None,
        target_code: str | None = None,
        prefix: str = "",
        beams: int = 1,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        device: str = "auto",
    ) -> None:
        from transformers import AutoConfig

        from addlang.models import Checkpoint

        self.directory, self.prompt, self.prefix = directory, prompt, prefix
        self.languages = {"source": source, "target": target, "mark": mark}
        self.codes = (source_code, target_code)
        self.beams, self.batch_size, self.max_new_tokens, self.device = beams, batch_size, max_new_tokens, device
        self.hash = Checkpoint(directory).hash  # refuses pickled weights
        self.seq2seq = bool(AutoConfig.from_pretrained(str(directory), trust_remote_code=False).is_encoder_decoder)
        self._loaded: tuple[Any, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Weights and decoding; the batch size changes no more than rounding."""
        own = {"kind": "local", "model": self.hash, "max_new_tokens": self.max_new_tokens}
        if self.seq2seq:
            return {**own, "codes": self.codes, "prefix": self.prefix, "beams": self.beams}
        return {**own, "prompt": self.prompt, **self.languages}

    def run(
        self, next_request: Callable[[], Request | None], keep: Callable[[Reply], None]
    ) -> Iterator[tuple[Request, Reply]]:
        """See :class:`addlang.builders.backend.Backend`."""
        while window := self._window(next_request):
            for begin in range(0, len(window), self.batch_size):
                batch = window[begin : begin + self.batch_size]
                replies = self._translate(batch)
                for reply in replies:
                    keep(reply)
                yield from zip(batch, replies, strict=True)

    def _window(self, next_request: Callable[[], Request | None]) -> list[Request]:
        window: list[Request] = []
        while len(window) < WINDOW * self.batch_size and (request := next_request()) is not None:
            window.append(request)
        return sorted(window, key=lambda r: (r.attempt, -len(r.text)))  # beams depend on the attempt

    def _translate(self, batch: Sequence[Request]) -> list[Reply]:
        model, tokenizer = self._load()
        room = self._room(model)
        ids = [self._prompt_ids(request, tokenizer) for request in batch]
        sizes = [
            len(tokenizer(request.text, add_special_tokens=False, verbose=False)["input_ids"]) for request in batch
        ]
        # an encoder-decoder has room for the text and as much for the reply, a chat model for both together
        left = [room if self.seq2seq else room - len(own) for own in ids]
        fits = [i for i, own in enumerate(ids) if len(own) <= room and left[i] > sizes[i]]
        made: dict[int, tuple[list[int], bool]] = {}
        for attempt in sorted({batch[i].attempt for i in fits}):
            own = [i for i in fits if batch[i].attempt == attempt]
            new = min(max(self.max_new_tokens or 3 * sizes[i] + 32 for i in own), min(left[i] for i in own))
            decode = self._encoder_decoder if self.seq2seq else self._causal
            replies = decode(model, tokenizer, [ids[i] for i in own], new, attempt)
            made.update((i, (reply, len(reply) >= new)) for i, reply in zip(own, replies, strict=True))
        found = []
        for i, request in enumerate(batch):
            if i not in made:
                problem = f"too long for the model: {len(ids[i])} tokens and a reply do not fit into {room}"
                found.append(Reply(request.key, request.attempt, None, problem, final=True))
                continue
            tokens, cut = made[i]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            why = f"cut off after {len(tokens)} tokens" if cut else None
            found.append(Reply(request.key, request.attempt, text, why, tokens_in=len(ids[i]), tokens_out=len(tokens)))
        return found

    def _room(self, model: Any) -> int:
        config = model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)

    def _prompt_ids(self, request: Request, tokenizer: Any) -> list[int]:
        if self.seq2seq:
            return list(tokenizer(self.prefix + request.text, verbose=False)["input_ids"])
        asked = messages(request, self.prompt, **self.languages)
        try:
            text = render(asked, tokenizer, prompt=True)
        except AddlangError:  # some templates know no system message
            joined = "\n\n".join(m["content"] for m in asked)
            text = render([{"role": "user", "content": joined}], tokenizer, prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _causal(self, model: Any, tokenizer: Any, ids: list[list[int]], new: int, attempt: int) -> list[list[int]]:
        from addlang.evaluate.generation import greedy, stop_ids

        return greedy(
            model,
            tokenizer,
            ids,
            max_new_tokens=new,
            batch_size=self.batch_size,
            stop_ids=stop_ids(model, tokenizer),
        )

    def _encoder_decoder(
        self, model: Any, tokenizer: Any, ids: list[list[int]], new: int, attempt: int
    ) -> list[list[int]]:
        import torch

        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        extra = {}
        if self.codes[1] is not None:
            extra["forced_bos_token_id"] = self._language_id(tokenizer, self.codes[1])
        with torch.inference_mode():
            made = model.generate(
                **padded,
                max_new_tokens=new,
                do_sample=False,
                num_beams=max(self.beams, 2 * attempt + 1),
                num_return_sequences=attempt + 1,
                **extra,
            )
        rows = made[attempt :: attempt + 1].tolist()
        special = set(tokenizer.all_special_ids)
        return [[token for token in row if token not in special] for row in rows]

    def _language_id(self, tokenizer: Any, code: str) -> int:
        known = tokenizer.get_vocab()
        if code not in known:
            codes = [t for t in tokenizer.all_special_tokens if t not in tokenizer.special_tokens_map.values()]
            raise AddlangError(
                f"{self.directory}: the model has no language '{code}'", did_you_mean(code, codes) if codes else None
            )
        return int(known[code])

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self._load_encoder_decoder() if self.seq2seq else self._load_causal()
        return self._loaded

    def _load_causal(self) -> tuple[Any, Any]:
        from addlang.models import load_model, load_tokenizer

        tokenizer = load_tokenizer(self.directory)
        require_chat_template(tokenizer)
        return load_model(self.directory, device=self._device()), tokenizer

    def _load_encoder_decoder(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.directory), trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_pretrained(
                str(self.directory), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise AddlangError(f"{self.directory}: the model cannot be loaded: {first}") from error
        if self.codes[0] is not None:
            self._language_id(tokenizer, self.codes[0])
            tokenizer.src_lang = self.codes[0]
        return model.to(self._device()).eval(), tokenizer

    def _device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"
