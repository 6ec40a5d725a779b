"""YAML without its traps: a key stands once, ``no`` is a word (Norwegian's code), and ``1e-4`` is a number."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from addlang.errors import AddlangError, did_you_mean


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2's core schema."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "-+0123456789.",
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"key '{key}' stands twice, in lines {seen[key]} and {key_node.start_mark.line + 1}",
                None,
            )
        if isinstance(key, str):
            seen[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(text: str) -> Any:
    """The one document of ``text``.

    Raises:
        yaml.YAMLError: no valid YAML, or a key stands twice.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def read_mapping(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        what: the kind of file, for messages: ``recipe``.

    Raises:
        AddlangError: there is no such file, it cannot be read, it is no valid YAML or no mapping.
    """
    path = Path(path)
    try:
        data = read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        fix = did_you_mean(path.name, near) if near else "check the path"
        raise AddlangError(f"{what} '{path}' does not exist", fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AddlangError(f"{what} '{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise AddlangError(f"{what} '{path}' is no valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise AddlangError(f"{what} '{path}' must be a mapping of keys to values")
    return data
