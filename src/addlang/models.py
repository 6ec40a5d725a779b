"""Models and tokenizers: where they come from, what their parameters are, how their files are read.

Weights are only ever read from safetensors files and remote code is never run. A hub id is first made a local snapshot,
so that everything behind this module works on directories.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from addlang.errors import AddlangError, AddlangWarning, did_you_mean, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ParamKind = Literal["linear", "bias", "norm", "embedding", "head"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "spiece.model",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors names them
NO_BEHAVIOUR = (  # keys of a configuration that change nothing of what a model in eval mode computes
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "attn_implementation", "id2label", "label2id",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions",
)  # fmt: skip
SNAPSHOT_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)


def resolve(name: str, revision: str | None = None) -> Path:
    """Local directory of a model: ``lab``, a directory, or a hub id (downloaded to the Hugging Face cache).

    Raises:
        AddlangError: no such directory, or the hub is needed and cannot be reached.
    """
    if name == "lab":
        from addlang.lab import lab_model_path

        return lab_model_path()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AddlangError(
                f"'{name}' is a directory without config.json", "give the directory of a Hugging Face checkpoint"
            )
        return path
    if path.is_file():
        raise AddlangError(f"'{name}' is a file, not a model directory", "give the directory that holds config.json")
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or name.endswith((".safetensors", ".bin")):
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise AddlangError(
            f"model directory '{name}' does not exist", did_you_mean(path.name, near) if near else "check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(SNAPSHOT_PATTERNS)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise AddlangError(
            f"model '{name}' is neither a local directory nor a model on the hub ({type(error).__name__})",
            "check the spelling; for a private or gated model set HF_TOKEN",
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise AddlangError(
            f"model '{name}' is not in the local cache and the hub {'is switched off (HF_HUB_OFFLINE)' if offline else 'cannot be reached'}",
            "download it where there is a network and pass its directory, or use 'lab' for the embedded model",
        ) from error


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> Any:
    """The fast tokenizer of a model directory, with a pad token.

    Args:
        chat_template: path of a Jinja file that replaces the tokenizer's own template, with a warning if there is one;
            another names control tokens in it that the vocabulary does not have.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise AddlangError(
            f"{directory}: no usable tokenizer ({first_line(error)})", "put the tokenizer's files beside config.json"
        ) from error
    if not tokenizer.is_fast:
        raise AddlangError(
            f"{directory}: the tokenizer has no fast version (tokenizer.json)",
            "convert it with transformers' convert_slow_tokenizer",
        )
    if tokenizer.eos_token_id is None:
        raise AddlangError(
            f"{directory}: the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        try:
            given = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AddlangError(f"chat template '{chat_template}' cannot be read: {error}") from error
        if tokenizer.chat_template not in (None, given):
            warnings.warn(
                f"chat template '{chat_template.stem}' takes the place of the model's own, with which it was tuned",
                AddlangWarning,
                stacklevel=2,
            )
        tokenizer.chat_template = given
        vocabulary = tokenizer.get_vocab()
        if missing := sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)) - set(vocabulary)):
            warnings.warn(
                f"chat template '{chat_template.stem}' writes {', '.join(missing)}, which the model reads as several tokens: "
                "they are none of its own",
                AddlangWarning,
                stacklevel=2,
            )
    return tokenizer


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> Any:
    """A causal language model in the checkpoint's own dtype (or ``dtype``), without dropout, in eval mode.

    Args:
        attn_implementation: passed to transformers; None: its default.

    Raises:
        AddlangError: weights are missing, pickled, quantised, or of an architecture that is not a causal LM; the
            attention implementation is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is addlang.progress
    if torch.device(device).type == "cuda":
        gc.collect()  # a model with Liger's kernels bound to its parts is a cycle, which keeps a GPU's memory until collected
    checkpoint = Checkpoint(directory)  # refuses pickles before anything is read
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise AddlangError(f"{directory}/config.json cannot be used: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise AddlangError(
            f"{directory}: the checkpoint is quantised, its weights cannot be trained", "use the unquantised checkpoint"
        )
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):  # Table 8: 0.0
        if getattr(config, key, 0):
            setattr(config, key, 0.0)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype or checkpoint.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except ImportError as error:
        raise AddlangError(
            f"attn_implementation '{attn_implementation}' cannot be used: {first_line(error)}",
            "install its package, or use attn_implementation: sdpa",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise AddlangError(f"{directory}: the model cannot be loaded: {first_line(error)}") from error
    _require_every_weight(model, loading, checkpoint)
    model.to(device)
    model.eval()
    return model


def behaviour(config: Any, generation: Any = None) -> str:
    """Hash of what makes the same weights compute or write something else, for caches: RoPE, windows, ids that end a reply.

    The type of the weights and of the device are not in it.

    Args:
        config: configuration of a model of transformers.
        generation: its generation settings.
    """
    from addlang.data.cache import fingerprint

    return fingerprint(*(_plain(part.to_dict()) for part in (config, generation) if part is not None))


def stored_behaviour(directory: Path) -> str:
    """:func:`behaviour` of a model directory, without its weights."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        if (directory / "generation_config.json").is_file():
            return behaviour(config, GenerationConfig.from_pretrained(str(directory)))
        return behaviour(config, GenerationConfig.from_model_config(config))
    except (OSError, ValueError, KeyError) as error:
        raise AddlangError(f"{directory}: its configuration cannot be used: {first_line(error)}") from error


def _plain(settings: Any) -> Any:
    """Without what is not set and what has no effect: versions of transformers add keys."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        str(key): _plain(value)
        for key, value in settings.items()
        if value is not None and key not in NO_BEHAVIOUR and not str(key).startswith("_") and "drop" not in str(key)
    }


def skeleton(directory: Path) -> Any:
    """The architecture of a checkpoint on the meta device, tied as it is, without weights.

    Raises:
        AddlangError: its configuration cannot be used.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise AddlangError(
            f"{directory / 'config.json'} cannot be used: {first_line(error)}",
            "give the directory of a causal language model",
        ) from error
    model.tie_weights()
    return model


def weights_at_hand(directory: Path) -> bool:
    """Whether a model directory has weights at all; False: configuration and tokenizer can be read, and nothing more."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "*.bin"))


def stored_dtype(directory: Path, config: Any) -> torch.dtype:
    """Type that the weights are stored in; what the configuration says where they are not at hand."""
    import torch

    return (
        Checkpoint(directory).dtype if weights_at_hand(directory) else getattr(config, "dtype", None) or torch.float32
    )


def _require_every_weight(model: Any, loading: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """transformers draws at random what a checkpoint lacks, and reads integers as if they were weights."""
    if missing := sorted(loading["missing_keys"]):
        raise AddlangError(
            f"{checkpoint.directory} has no tensor '{missing[0]}'"
            + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""),
            "copy the model again",
        )
    for name, _ in model.named_parameters():
        if (kind := checkpoint.header.get(name, ("F32",))[0]) not in FLOATS:
            raise AddlangError(
                f"'{name}' of {checkpoint.directory} is of type {kind}: the checkpoint is quantised",
                "use the unquantised checkpoint",
            )


@dataclass(frozen=True)
class ParamInfo:
    """What one parameter is.

    Attributes:
        kind: role in the network.
        module: dotted name of the module that owns it.
        group: module type for tables, such as ``q_proj`` or ``input_layernorm``.
        layer: index of the decoder layer, or None outside the layers.
    """

    kind: ParamKind
    module: str
    group: str
    layer: int | None


def parameter_kinds(model: Any) -> dict[str, ParamInfo]:
    """Classify every parameter of a causal LM.

    Raises:
        AddlangError: a parameter that is neither of a linear layer nor of a norm, an embedding or the head: methods that
            score parameters cannot say what its input features are.
    """
    from torch import nn

    embedding, head, _ = embedding_names(model)
    modules = dict(model.named_modules())
    kinds: dict[str, ParamInfo] = {}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        parts = owner.split(".")
        layer = layer_number(name)
        group = parts[-1] if parts[-1] else leaf
        if name == embedding:
            kind: ParamKind = "embedding"
        elif name == head:
            kind = "head"
        elif isinstance(module, nn.Linear):
            kind = "linear" if leaf == "weight" else "bias"
        elif "norm" in type(module).__name__.lower() and p.dim() == 1:
            kind = "norm" if leaf == "weight" else "bias"
        else:
            raise AddlangError(
                f"parameter '{name}' of {type(module).__name__} is not of a linear layer, norm, embedding or head",
                "this architecture is not supported; supported are dense Llama, Mistral, Qwen 2/3, OLMo 2 and Gemma models",
            )
        kinds[name] = ParamInfo(kind, owner, group, layer)
    return kinds


def layer_number(parameter: str) -> int | None:
    """Index of the decoder layer that a parameter belongs to, from its name; None outside the layers."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), None)


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def same_input(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weight -> all weights that multiply the same input, for those that are not alone.

    Raises:
        AddlangError: there are none: the architecture stores them as one matrix.
    """
    present = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in present:
        module, dot, leaf = name.removesuffix(".weight").rpartition(".")
        for leaves in SAME_INPUT:
            group = tuple(f"{module}{dot}{other}.weight" for other in leaves)
            if leaf in leaves and present.issuperset(group):
                found[name] = group
    if not found:
        raise AddlangError(
            "share_columns: this model has no separate q, k, v or gate, up projections", "set share_columns: false"
        )
    return found


def embedding_names(model: Any) -> tuple[str, str, bool]:
    """Names of the input embedding's and the head's weight, and whether they are one tensor."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None:
        raise AddlangError(
            f"{type(model).__name__} has no input embedding or no LM head", "use a causal language model"
        )
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    embedding = names[id(inputs.weight)]
    tied = outputs.weight is inputs.weight
    return embedding, embedding if tied else names[id(outputs.weight)], tied


class Checkpoint:
    """The safetensors files of a model directory, read tensor by tensor.

    Raises:
        AddlangError: no safetensors weights (pickled weights are refused), a shard is missing or torn.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            try:
                table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise AddlangError(f"{index} is torn or no weight index", "copy the model again") from error
            self.files: tuple[str, ...] = tuple(sorted(set(table.values())))
        elif single.is_file():
            self.files = (single.name,)
        else:
            pickles = sorted(p.name for p in self.directory.glob("*.bin")) if self.directory.is_dir() else []
            if pickles:
                raise AddlangError(
                    f"{self.directory} has only pickled weights ({pickles[0]}), which can run code when they are loaded",
                    "save the model with save_pretrained(..., safe_serialization=True)",
                )
            raise AddlangError(
                f"{self.directory} has no model.safetensors", "give the directory of a complete checkpoint"
            )
        self.location: dict[str, str] = {}
        self.header: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in self.files:
            for name, entry in _read_header(self.directory / file).items():
                if name != "__metadata__":
                    self.location[name] = file
                    self.header[name] = (entry["dtype"], tuple(entry["shape"]))

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most of the weights are stored in."""
        import torch

        table = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        count: dict[str, int] = {}
        for dtype, shape in self.header.values():
            n = 1
            for s in shape:
                n *= s
            count[dtype] = count.get(dtype, 0) + n
        best = max(count, key=lambda k: count[k])
        if best not in table:
            raise AddlangError(
                f"{self.directory}: weights of type {best} cannot be trained", "use an unquantised checkpoint"
            )
        return table[best]

    def names(self, file: str | None = None) -> list[str]:
        """Tensor names, of one file or of all."""
        return [n for n, f in self.location.items() if file is None or f == file]

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        from safetensors import safe_open

        if name not in self.location:
            raise AddlangError(f"{self.directory} has no tensor '{name}'", did_you_mean(name, self.location))
        with safe_open(str(self.directory / self.location[name]), "pt") as f:
            return f.get_tensor(name)  # type: ignore[no-any-return]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of a tensor (its first dimension), without reading the others."""
        from safetensors import safe_open

        with safe_open(str(self.directory / self.location[name]), "pt") as f:
            return f.get_slice(name)[start:stop]  # type: ignore[no-any-return]

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """All tensors of one file, one at a time."""
        from safetensors import safe_open

        with safe_open(str(self.directory / file), "pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, f.get_tensor(name)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over the weight files, first 16 hex digits."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(self.directory / file, "rb") as f:
                while block := f.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def stored_name(self, parameter: str, tied_to: str | None = None) -> str:
        """Name under which a model's parameter is stored (a tied parameter may be stored under its twin's name)."""
        if parameter in self.location:
            return parameter
        if tied_to is not None and tied_to in self.location:
            return tied_to
        raise AddlangError(
            f"parameter '{parameter}' has no tensor of that name in {self.directory}",
            "save the model again with save_pretrained of AutoModelForCausalLM",
        )


def scale_back(model: Any, share: float, source: Path) -> str:
    """Move every parameter to ``w0 + share (w - w0)``, in fp32, with ``w0`` from a checkpoint; returns its hash.

    Raises:
        AddlangError: a parameter is not in the checkpoint, or has another shape there.
    """
    import torch

    stored = Checkpoint(source)
    input_name, _, tied = embedding_names(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            start = stored.get(stored.stored_name(name, input_name if tied else None)).to(p.device, torch.float32)
            if start.shape != p.shape:
                raise AddlangError(f"'{name}' is {tuple(p.shape)} here and {tuple(start.shape)} in {source}")
            p.copy_(start + share * (p.float() - start))
    return stored.hash


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            raw = f.read(size)
            header: dict[str, Any] = json.loads(raw)
    except FileNotFoundError:
        raise AddlangError(f"weight file {path} is missing", "copy the model again") from None
    except (ValueError, MemoryError, OverflowError) as error:
        raise AddlangError(f"weight file {path} is torn or no safetensors file", "copy the model again") from error
    end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    if path.stat().st_size != 8 + size + end:
        raise AddlangError(
            f"weight file {path} is torn: {path.stat().st_size} bytes, its header says {8 + size + end}",
            "copy the model again",
        )
    return header
