"""The recipe: one strict YAML file that says everything about a run.

Loading collects *all* errors at once, each with its key and, for unknown names, the nearest known one. Importing this
module loads neither torch nor transformers. The parts of a recipe stand in schema.py, what is wrong with one is said by
problems.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from addlang import strictyaml
from addlang.errors import AddlangError
from addlang.schema import (
    ALIASES,
    Calibration,
    Count,
    DatasetSpec,
    Evaluation,
    Phase,
    RepliesEvaluation,
    Strict,
    TrainSettings,
    parse_count,
    parse_list,
    template_file,
)

__all__ = [
    "ALIASES", "Calibration", "Count", "DatasetSpec", "Evaluation", "Phase", "Recipe", "RepliesEvaluation", "TrainSettings",
    "parse_count", "parse_list",
]  # fmt: skip

RESERVED = {"before", "after"}
WITHOUT_EFFECT = ("output_dir", "allow_contamination")  # on the result; the latter only lets the same run go on
WITHOUT_EFFECT_IN_A_PHASE = (
    "save_steps", "save_total_limit", "logging_steps", "report_to", "max_loss_spike", "sharding",
)  # fmt: skip


class Recipe(Strict):
    """A whole run. A file without ``phases`` is one phase: its keys stand at the top level.

    With ``phases``, keys of a phase at the top level hold for every phase that does not give its own.
    """

    model_name_or_path: str = Field(description="hub id, local directory, or 'lab'")
    revision: str | None = None
    output_dir: str
    language: str = Field(description="target language, ISO 639 code such as ig")
    source_language: str = "en"
    seed: int = Field(0, ge=0)
    phases: tuple[Phase, ...] = Field(min_length=1)
    arrangement: Literal["phases", "mixture", "reverse"] = Field(
        "phases", description="mixture: the data of all phases in one, with as many steps; reverse: in the other order"
    )
    evaluation: Evaluation = Evaluation()
    chat_template: str | None = Field(
        None,
        description="for a model that has none: alpaca, chatml, llama3, mistral, or a Jinja file; written into the result",
    )
    allow_contamination: bool = Field(False, description="train although rows contain items of the evaluation's tasks")
    drop_contaminated: bool = Field(False, description="leave out rows that contain items of the evaluation's tasks")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(
        True,
        description="deterministic kernels, so that a resumed run is bit-identical (on a GPU attention without cuDNN)",
    )
    trust_remote_code: Literal[False] = Field(False, description="remote code is never run")

    @model_validator(mode="after")
    def _phases_are_consistent(self) -> Recipe:
        names = [p.name for p in self.phases]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"phase names must differ; '{twice[0]}' stands twice")
        if taken := sorted(RESERVED & set(names)):
            raise ValueError(f"a phase cannot be named '{taken[0]}': results use that name")
        if self.allow_contamination and self.drop_contaminated:
            raise ValueError("allow_contamination keeps the rows that drop_contaminated leaves out; choose one")
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default filled in, as written to ``recipe.yaml``."""
        data = self.model_dump(mode="json")
        for phase, live in zip(data["phases"], self.phases, strict=True):
            phase["strategy"] = {"name": live.strategy.name, **live.strategy.model_dump(mode="json")}
            phase["guards"] = [{"name": g.name, **g.model_dump(mode="json")} for g in live.guards]
        return data

    def template_path(self, base_dir: Path | None) -> Path | None:
        """The chat template's file: a built-in one, or the recipe's own."""
        return template_file(self.chat_template, base_dir)

    @property
    def budget(self) -> int | str | None:
        """What is trained on, to compare recipes by: tokens, or epochs of data sets; None: it depends on the data."""
        tokens = [p.total_tokens for p in self.phases]
        if None not in tokens:
            return sum(t or 0 for t in tokens)
        amounts = [a for p in self.phases for a in p.amounts()]
        return None if None in amounts else " + ".join(sorted(a or "" for a in amounts))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the result (not of where it is written or how often it is saved).

        Defaults are left out, so that a run can be continued by a version that knows more keys. That a default has changed
        is seen in :meth:`resolved` alone, see :func:`addlang.rundir.other_defaults`.
        """
        data = self.model_dump(mode="json", exclude_defaults=True)
        for key in WITHOUT_EFFECT:
            data.pop(key, None)
        for phase, live in zip(data["phases"], self.phases, strict=True):
            for key in WITHOUT_EFFECT_IN_A_PHASE:
                phase.pop(key, None)
            parts = [
                {"name": part.name, **part.model_dump(mode="json", exclude_defaults=True)}
                for part in (live.strategy, *live.guards)
            ]
            phase["strategy"], phase["guards"] = parts[0], parts[1:]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
        """Read a YAML recipe.

        Args:
            path: the file.
            overrides: ``(dotted key, value)`` pairs that replace values of the file, e.g. ``("strategy.ratio", 0.4)``.

        Raises:
            AddlangError: every problem of the file at once, each with its key.
        """
        from addlang.problems import set_key

        path = Path(path)
        data = strictyaml.read_mapping(path, "recipe")
        if "arms" in data:
            raise AddlangError(f"'{path}' is a study, not a recipe", f"carry it out with addlang sweep {path}")
        for key, value in overrides:
            set_key(data, key, value)
        return cls.parse(data, where=str(path), files=True, base_dir=path.resolve().parent)

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        where: str = "recipe",
        *,
        files: bool = False,
        base_dir: Path | None = None,
        problems: Sequence[str] = (),
    ) -> Recipe:
        """Validate plain data; see :meth:`load`.

        Args:
            where: what the data came from, for messages.
            files: also check that every local file it names exists.
            base_dir: directory against which relative paths are resolved; None: the working directory.
            problems: found already; reported with those found here.
        """
        from addlang.arrangement import arrange, share
        from addlang.problems import conflicts, explain, missing_files

        own = {k for k in Phase.model_fields if k not in cls.model_fields and k not in ("name", "datasets", "parts")}
        data, obstacles = arrange(share(data, own))
        flat = "phases" not in data
        if flat:
            phase = {k: data.pop(k) for k in list(data) if k in Phase.model_fields and k not in cls.model_fields}
            data["phases"] = [phase]
        problems = [
            *problems,
            *obstacles,
            *conflicts(data, flat),
            *(missing_files(data, flat, base_dir) if files else ()),
        ]
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            problems = [*explain(error, flat), *problems]
        if problems:
            raise AddlangError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        return recipe
