"""Rows to messages, messages to token ids and a loss mask.

The loss mask says which tokens the model is to learn to produce: with ``loss_on="responses"`` those of the assistant's
turns, up to and including the token that ends the turn. Where they begin and end is taken from the chat template, never
guessed: from its ``{% generation %}`` blocks if it has them, otherwise by rendering every prefix of the conversation
and comparing the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from addlang.errors import AddlangError, did_you_mean

Message = dict[str, str]
LossOn = Literal["responses", "all"]

ROLES = ("system", "user", "assistant")
_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
}
_SHAREGPT_ONLY = {"human", "gpt", "model", "bot", "chatgpt"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = datetime(2024, 7, 26)  # to every template; the day that Llama's templates name where they cannot ask for one
_TODAY = re.compile(r"""strftime_now\(\s*(['"])([^'"\\]*)\1\s*\)""")


def to_messages(row: Mapping[str, Any], format: str) -> list[Message]:
    """Turn a row into a list of ``{"role", "content"}``.

    Args:
        row: the columns of one row.
        format: ``messages``, ``sharegpt``, ``prompt_completion``, ``alpaca`` or ``openorca``. For alpaca the user's turn
            is the instruction, followed by a blank line and the input if there is one; openorca has the columns
            ``question``, ``response`` and, perhaps, ``system_prompt``.

    Raises:
        AddlangError: a missing column, an unknown role, or content that is no text (the caller adds file and row).
    """
    if format == "messages":
        column = "messages" if "messages" in row or "conversations" not in row else "conversations"
        return _turns(_column(row, column), "role", "content")
    if format == "sharegpt":
        return _turns(_column(row, "conversations"), "from", "value")
    if format == "prompt_completion":
        prompt = _side(_column(row, "prompt"), "user", "prompt")
        return prompt + _side(_column(row, "completion"), "assistant", "completion")
    if format == "alpaca":
        user = _text(_column(row, "instruction"), "column 'instruction'")
        if row.get("input"):
            user += "\n\n" + _text(row["input"], "column 'input'")
        answer = _text(_column(row, "output"), "column 'output'")
        system = _text(row["system"], "column 'system'") if row.get("system") else ""
        return _conversation(system, user, answer)
    if format == "openorca":
        system = _text(row["system_prompt"], "column 'system_prompt'") if row.get("system_prompt") else ""
        question, answer = (_text(_column(row, name), f"column '{name}'") for name in ("question", "response"))
        return _conversation(system, question, answer)
    known = ["messages", "sharegpt", "prompt_completion", "alpaca", "openorca"]
    raise AddlangError(f"'{format}' is no format of conversations", did_you_mean(format, known))


def _conversation(system: str, user: str, answer: str) -> list[Message]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise AddlangError(f"there is no column '{name}'", did_you_mean(name, row))
    return row[name]


def _text(value: Any, where: str) -> str:
    """A string; a list of text parts (``{"type": "text", "text": ...}``) is joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(p["text"] for p in value)
    shown = "null" if value is None else type(value).__name__
    fix = "remove the row, or write the text; tool calls and images are not supported"
    raise AddlangError(f"{where} must be text, it is {shown}", fix)


def _side(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, list):
        return _turns(value, "role", "content")
    return [{"role": role, "content": _text(value, f"column '{name}'")}]


def _turns(value: Any, role_key: str, content_key: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # csv files hold the list as JSON
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise AddlangError(f"the conversation is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, list):
        raise AddlangError(f"a conversation must be a list of messages, this one is {type(value).__name__}")
    messages = []
    for i, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise AddlangError(f"message {i} must have '{role_key}' and '{content_key}', it is {type(turn).__name__}")
        for key in (role_key, content_key):
            if key not in turn:
                raise AddlangError(f"message {i} has no '{key}'", did_you_mean(key, turn))
        role = _ROLE_OF.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None or (role_key == "role" and turn[role_key] in _SHAREGPT_ONLY):
            known = ROLES if role_key == "role" else sorted(_ROLE_OF)
            given = turn[role_key]
            raise AddlangError(f"message {i} has the unknown role {given!r}", did_you_mean(str(given), known))
        messages.append({"role": role, "content": _text(turn[content_key], f"the content of message {i}")})
    return messages


def is_blank(messages: Sequence[Message]) -> bool:
    """True if there is nothing to learn from: no messages, or the last one is empty."""
    return not messages or not messages[-1]["content"].strip()


def has_answer(messages: Sequence[Message]) -> bool:
    """True if the assistant says something in it."""
    return any(m["role"] == "assistant" for m in messages)


def dated(template: str) -> str:
    """The template with ``DATE`` in place of today: what a model is trained on and asked must not depend on the day.

    It is written into the template, because transformers lets no function through to one.

    Raises:
        AddlangError: a format that is no plain text.
    """
    template = _TODAY.sub(lambda call: call[1] + DATE.strftime(call[2]) + call[1], template)
    if re.search(r"strftime_now\s*\(", template):
        raise AddlangError(
            "the chat template asks for today's date by more than a plain format, so that every day would have other texts",
            "write the format into the call, strftime_now('%d %b %Y'), or a date in its place",
        )
    return template


def require_chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, with a fixed date.

    Raises:
        AddlangError: it has none; or see :func:`dated`.
    """
    try:
        template = str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        raise AddlangError(
            f"tokenizer '{getattr(tokenizer, 'name_or_path', '')}' has no chat template to encode conversations with",
            "give in the recipe the one with which the model was instruction-tuned (chat_template: FILE.jinja), or for a "
            "base model a built-in one, such as chat_template: alpaca",
        ) from None
    return dated(template)


def encode_conversation(messages: Sequence[Message], tokenizer: Any, *, loss_on: LossOn) -> tuple[list[int], list[int]]:
    """Tokenise a conversation with the tokenizer's chat template.

    If the template does not end the last assistant turn with a special token (eos or an end-of-turn token), eos is
    added, because a model that never sees the end of an answer does not learn to stop. A token that begins in front of an
    answer and reaches into it carries loss, as in transformers.

    Args:
        messages: ``{"role", "content"}`` each.
        tokenizer: a fast tokenizer with a chat template.
        loss_on: ``"responses"``: loss on assistant turns including the token that ends them; ``"all"``: on every token.

    Returns:
        Token ids and, of the same length, 1 where the token carries loss and 0 elsewhere.

    Raises:
        AddlangError: no chat template, no assistant turn, the template refuses the conversation, or the assistant's
            tokens cannot be found exactly.
    """
    template = require_chat_template(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise AddlangError(
            "conversations need a fast tokenizer: a slow one does not say where in the text a token stands"
        )
    if loss_on == "responses" and not has_answer(messages):
        message = "the conversation has no assistant message, so no token would carry loss"
        raise AddlangError(message, "remove it, or set loss_on: all")
    if _GENERATION.search(template):
        text, spans = _render_with_spans(messages, tokenizer, template)
    else:
        text, spans = _spans_from_prefixes(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    loss = _mark(encoded["offset_mapping"], spans)
    _mark_ends_of_turns(ids, loss, tokenizer, ends_in_answer=bool(messages) and messages[-1]["role"] == "assistant")
    return (ids, [1] * len(ids)) if loss_on == "all" else (ids, loss)


def render(messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    """A conversation as the chat template writes it; with ``prompt`` and the beginning of an answer.

    Raises:
        AddlangError: no chat template, or it refuses the conversation.
    """
    template = require_chat_template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except Exception as error:  # templates raise whatever their authors wrote, mostly jinja2.TemplateError
        raise _refused(error, messages) from error


def _refused(error: Exception, messages: Sequence[Message]) -> AddlangError:
    fix = "correct the row, or the chat template"
    if any(m["role"] == "system" for m in messages):  # Mistral 7B Instruct v0.1, Gemma 2
        fix += (
            "; if it knows no system messages, give one that does, such as chat_template: mistral for Mistral's models"
        )
    return AddlangError(f"the chat template refuses the conversation: {error}", fix)


def _render_with_spans(messages: Sequence[Message], tokenizer: Any, template: str) -> tuple[str, list[tuple[int, int]]]:
    """The text and the character spans of the template's ``{% generation %}`` blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # as in render
        raise _refused(error, messages) from error
    return texts[0], [(int(a), int(b)) for a, b in spans[0]]


def _spans_from_prefixes(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text and the character spans of the assistant's turns, for a template without ``{% generation %}``.

    A turn begins where the prompt for it ends: ``render(messages[:i], prompt)`` must be a prefix of the whole text. It
    ends where ``render(messages[:i + 1])`` ends. Some templates render the last turn differently from earlier ones
    (Qwen 3 puts an empty thinking block there); then the turn is its content and what the template writes after it,
    which must stand verbatim in the whole text.
    """
    text = render(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:i], tokenizer, prompt=True)
        turn = text if i + 1 == len(messages) else render(messages[: i + 1], tokenizer)
        content = message["content"].strip()
        begin, end = len(prompt), len(turn)
        if not text.startswith(turn):
            rest = turn[turn.rfind(content) + len(content) :]
            at = text.find(content, begin)
            end = at + len(content) + len(rest)
            if at < 0 or content not in turn or not text.startswith(rest, at + len(content)):
                raise _not_prefix(i)
        if not text.startswith(prompt) or content not in text[begin:end]:
            raise _not_prefix(i)
        spans.append((begin, end))
    return text, [(a, _without_space(text, a, b, tokenizer)) for a, b in spans]


def _not_prefix(i: int) -> AddlangError:
    return AddlangError(
        f"the chat template does not show where message {i + 1}, an answer, begins and ends: the conversation rendered "
        "up to that message is not a prefix of all of it",
        "put {% generation %} and {% endgeneration %} around the assistant's content in the template",
    )


def _without_space(text: str, begin: int, end: int, tokenizer: Any) -> int:
    """The end without the white space that a template writes after its end-of-turn token, which is never generated."""
    stripped = text[begin:end].rstrip()
    return begin + len(stripped) if stripped.endswith(tuple(tokenizer.all_special_tokens)) else end


def _mark(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for every token that overlaps a span; both are in the order of the text."""
    loss, s = [0] * len(offsets), 0
    for t, (begin, end) in enumerate(offsets):
        while s < len(spans) and spans[s][1] <= begin:
            s += 1
        if s < len(spans) and begin < end and end > spans[s][0]:
            loss[t] = 1
    return loss


def _mark_ends_of_turns(ids: list[int], loss: list[int], tokenizer: Any, *, ends_in_answer: bool) -> None:
    """Give loss to the token that ends an assistant turn, if it stands just behind; append eos if there is none."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    end_of_turn = tokenizer.eos_token_id
    if ends_in_answer and any(loss):
        last = len(loss) - 1 - loss[::-1].index(1)
        tail = [i for i in ids[last:] if i in special]
        if tail:
            end_of_turn = tail[0]
        elif end_of_turn is not None:
            ids.append(end_of_turn)
            loss.append(1)
    for t in range(1, len(ids)):
        if ids[t] == end_of_turn and loss[t - 1] and not loss[t]:
            loss[t] = 1
