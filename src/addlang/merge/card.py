"""The model card of a merge: ``README.md`` with YAML front matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from addlang.merge.budget_report import as_markdown
from addlang.report.card import escape, is_hub_id, published


def merge_card(record: Mapping[str, Any]) -> str:
    """The card as Markdown, from the content of ``merge.json``."""
    spec = record["merge"]
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True)}---",
        f"# {escape(published(record['title']))}",
        f"Merged without training from the models below. Method: {escape(record['paper'])}. Configuration, tokenizer and chat "
        f"template are those of {escape(published(record['config_from']))}.",
        "## Models\n\n| model | SHA-256 of its weights (first 16 digits) |\n|---|---|\n"
        + "\n".join(f"| {escape(published(m['model']))} | {m['hash']} |" for m in record["models"]),
        "## Recipe\n\n" + _indented(published(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))),
        *_decided(record),
        *([as_markdown(record["budget"])] if "budget" in record else []),
        "## Check it yourself\n\n    addlang verify DIRECTORY\n    addlang merge DIRECTORY/merge.yaml --output_dir NEW\n\n"
        "The first computes the merge again and compares every bit; the second repeats it.",
        "## Limits\n\n- A merge is not measured by being made: what it kept and gained must be evaluated (`addlang evaluate`).\n"
        "- The licences of all merged models apply.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(record: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    models = [m["model"].partition("@")[0] for m in record["models"]]
    if all(is_hub_id(m) for m in models):  # the hub refuses a card whose base model is no hub id
        data["base_model"] = models
        data["base_model_relation"] = "merge"
    data["tags"] = ["addlang", "merge", record["merge"]["merge_method"]]
    return data


def _decided(record: Mapping[str, Any]) -> list[str]:
    """What the merge found out and what happened, if anything."""
    lines = [f"- {escape(published(note))}" for note in record["notes"]]
    lines += [f"- {escape(k)}: {escape(json.dumps(v))}" for k, v in record["decided"].items()]
    lines += [f"- {escape(published(line))}" for line in happened(record)]
    return ["## What happened\n\n" + "\n".join(lines)] if lines else []


def happened(record: Mapping[str, Any]) -> list[str]:
    """What was counted during a merge, and what became of tokens that not all models have."""
    lines = [f"{k}: {v:,}" for k, v in record["counts"].items()]
    for row in record["tokens"]:
        lines.append(
            f"{row['model']}: {row['rows_it_lacks']:,} rows of the result stand for tokens it lacks; "
            f"{row['tokens_left_out']:,} of its tokens were left out"
        )
    if record["restored_rows"]:
        lines.append(f"{record['restored_rows']:,} rows of special tokens were restored")
    return lines


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
