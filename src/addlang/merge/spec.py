"""Merge files: one strict YAML file per merge, in mergekit's form where mergekit has the method. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from addlang import strictyaml
from addlang.errors import AddlangError, did_you_mean
from addlang.merge.methods import METHODS, Merge, Weighted

HINTS = {
    "slices": "whole models are merged: list them under models, or use merge_method: layer_swap",
    "modules": "whole models are merged: list them under models",
    "out_dtype": "addlang calls it dtype: the type of the result (the arithmetic is always fp32)",
    "int8_mask": "leave it out: masks are made block by block, so they take no memory",
    "tokenizer": "addlang calls it tokenizer_source",
    "chat_template": "it is copied from the model of config_from",
    "passthrough": "use merge_method: special_tokens or layer_swap",
    "lambda_": "it is called lambda",
}


def load(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Merge:
    """Read a merge file.

    Args:
        overrides: keys that replace those of the file.

    Raises:
        AddlangError: every problem of the file at once, each with its key.
    """
    data = strictyaml.read_mapping(path, "merge file")
    return parse({**data, **(overrides or {})}, where=str(path))


def parse(data: Mapping[str, Any], where: str = "merge") -> Merge:
    """Validate plain data; see :func:`load`."""
    method = data.get("merge_method")
    if method not in METHODS:
        hint = HINTS.get(str(method)) or did_you_mean(str(method), METHODS)
        raise AddlangError(
            f"{where}: merge_method {method!r} is not known" if method else f"{where}: no merge_method", hint
        )
    cls = METHODS[str(method)]
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        problems = list(_explain(error, cls))
    raise AddlangError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))


def _explain(error: ValidationError, cls: type[Merge]) -> Iterator[str]:
    """One line per problem: key, what is wrong, the remedy."""
    seen = set()
    found = error.errors()
    for e in found:
        if e["type"] == "too_short" and any(o["loc"][: len(e["loc"])] == e["loc"] for o in found if o is not e):
            continue  # its items are there, but have errors of their own
        # a setting may have several forms, and pydantic names each that does not fit
        loc = [str(p) for p in e["loc"] if "[" not in str(p) and p not in ("float", "Conditional")]
        key = ".".join(loc) or "(whole file)"
        if key in seen:
            continue
        seen.add(key)
        if e["type"] == "extra_forbidden":
            yield f"{key}: unknown key. " + (HINTS.get(loc[-1]) or did_you_mean(loc[-1], _known(cls, loc[:-1])))
        elif e["type"] == "missing":
            yield f"{key}: missing"
        else:
            message = e["msg"].removeprefix("Value error, ")
            given = e.get("input")
            shown = (
                f" (given: {given!r})" if isinstance(given, str | int | float) and repr(given) not in message else ""
            )
            yield f"{key}: {message}{shown}"


def _known(cls: type[Merge], parents: list[str]) -> set[str]:
    """Keys that may stand in a part of the file."""
    model: type[BaseModel] = cls
    for part in parents:
        if part.isdigit():
            continue
        annotation = Weighted if part == "models" else model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return {f.alias or n for n, f in model.model_fields.items()}
