"""Chat messages in the forms that datasets have them in, and what a chat template makes of them. Host only.

Templates are of three kinds: most write a content that is text, those of models that see images one that is a list of
parts, some both. One that gets the other kind leaves the text out or writes Python's or JSON's notation of it, in
silence. So content is text here; a template is given the parts where it leaves the text out, or where it writes the
same of them but for the spaces around them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.template import TemplateRefusal
from grpo_jax.rewards.travel import plain

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]

TEXT = ("text", "input_text", "output_text")
"""Types of parts that are text, in the API of one vendor or another."""
RESULTS = ("tool", "function", "ipython")
"""Roles whose content is what a function returned."""
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks in what a template writes where a turn is to be continued; as in transformers, which some templates know."""


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with a role and a content, or calls of tools in its place."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return listed and all(
        isinstance(m, Mapping) and "role" in m and m.keys() & {"content", "tool_calls"} for m in value
    )


def listed(prompt: Any) -> Any:
    """Messages as lists and dicts of plain values, whatever arrays, tuples and objects they come in.

    Raises:
        ValueError: they hold something that is no text and has no form as one.
    """
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not is_chat(prompt):
        return prompt
    try:
        return json.loads(json.dumps(list(prompt), default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"prompt: {error}, and the models here read text alone; give text, or leave it out") from error


def with_text(messages: Messages) -> Messages:
    """The same messages, the content of each a text, and no field that is None.

    Raises:
        ValueError: a message without a role or a text, by its place.
    """
    return [_with_text(number, message) for number, message in enumerate(messages)]


def written(messages: Messages, render: Render, sure: bool = False) -> str:
    """What a template writes of messages, whatever kind it is of.

    Args:
        messages: as `listed` gives them.
        render: the template.
        sure: it is known that the template leaves out nothing of such messages when their content is text.

    Raises:
        ValueError: a message that has no text, or that the template refuses or leaves out.
    """
    texts = with_text(messages)
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in texts):
        raise ValueError("prompt has no text in any of its messages; give it some, or leave it out")
    first = _tried(render, texts)
    if not isinstance(first, str) and any("content" not in message for message in texts):
        texts = [{"content": "", **message} for message in texts]
        first = _tried(render, texts)
    lost = None if sure or not isinstance(first, str) else _left_out(texts, first, render)
    if isinstance(first, str) and lost is None:
        if any(isinstance(message.get("content"), list) for message in messages):
            as_they_are = _tried(render, _in_parts(texts, messages, strings=False))
            if isinstance(as_they_are, str) and "".join(as_they_are.split()) == "".join(first.split()):
                return as_they_are
        return first
    parts = _in_parts(texts, messages)
    second = _tried(render, parts)
    if isinstance(second, str) and not _notation(second) and _left_out(parts, second, render) is None:
        return second
    if not isinstance(first, str):
        raise first
    raise TemplateRefusal(
        f"the chat template leaves out message {lost} ({texts[lost or 0]['role']}); change the messages, or name "
        "another template as data.chat_template"
    )


def marked(messages: Messages) -> tuple[Messages, str]:
    """The messages with `TAG` behind the last one's text, and that text.

    Raises:
        ValueError: it has no text to be continued.
    """
    *before, last = messages
    content = last.get("content")
    if content is None or last.get("tool_calls"):
        raise ValueError(
            "prompt ends with a message of the assistant without a text that could be continued; give it one, or leave "
            "the message out"
        )
    if isinstance(content, str):
        return [*before, {**last, "content": content + TAG}], content
    *parts, end = content or [{"type": "text", "text": ""}]
    return [*before, {**last, "content": [*parts, {**end, "text": end["text"] + TAG}]}], end["text"]


def cut(text: str, last: str) -> str:
    """What a template wrote of `marked` messages, up to the end of the turn to be continued.

    Raises:
        TemplateRefusal: the turn is not in it.
    """
    place = text.rfind(TAG.strip())
    if place < 0 or last.strip() not in text:
        raise TemplateRefusal(
            "the chat template leaves out the assistant's turn that is to be continued; change the messages"
        )
    whole = text.startswith(TAG, place)
    return text[:place] if whole else text[:place].rstrip()  # the template strips what it is given


def _with_text(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"prompt: message {number} has the role {role!r}; name one, such as user")
    kept = {name: value for name, value in message.items() if value is not None}
    if content is not None:
        return kept | {"content": _text(role, content, f"prompt: message {number} ({role})")}
    if role != "assistant" or not kept.keys() & {"tool_calls", "reasoning_content", "reasoning", "thinking"}:
        raise ValueError(f"prompt: message {number} ({role}) has no content; give it text, or leave the message out")
    return kept


def _text(role: str, content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    typed = bool(parts) and all(isinstance(part, str) or isinstance(part, dict) and "type" in part for part in parts)
    texts = [part if isinstance(part, str) else _text_of(part) for part in parts]
    if isinstance(content, list) and all(isinstance(text, str) for text in texts):
        return "".join(texts)  # type: ignore[arg-type]
    if role in RESULTS and not typed:
        return str(content)
    if isinstance(content, list) and typed:
        other = next(part["type"] for part, text in zip(parts, texts, strict=True) if text is None)
        raise ValueError(
            f"{where} holds a part of type {other!r}, and the models here read text alone; leave the row out, or give "
            "text"
        )
    raise ValueError(f"{where} has a content of type {type(content).__name__}; give text, or a list of parts of text")


def _text_of(part: Any) -> str | None:
    """The text of a part; datasets give it the fields of all kinds of parts, None where it has none."""
    if not isinstance(part, dict) or part.get("type", "text") not in TEXT:
        return None
    return part["text"] if isinstance(part.get("text"), str) else None


def _in_parts(texts: Messages, messages: Messages, strings: bool = True) -> Messages:
    """Texts as lists of parts: as the messages came, where they came so; those that came as strings if ``strings``."""
    out = []
    for text, message in zip(texts, messages, strict=True):
        given = message.get("content")
        parts = given if isinstance(given, list) else []
        pieces = [part if isinstance(part, str) else _text_of(part) for part in parts]
        if not pieces or None in pieces:
            pieces = [text["content"]] if strings and "content" in text else []
        out.append(text | {"content": [{"type": "text", "text": piece} for piece in pieces]} if pieces else text)
    return out


def _tried(render: Render, messages: Messages) -> str | TemplateRefusal:
    try:
        return render(messages)
    except TemplateRefusal as error:
        return error


def _left_out(messages: Messages, text: str, render: Render) -> int | None:
    """The first message, but for the assistant's, whose text could as well be another; None where each is read."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" and content:
            *before, last = content if isinstance(content, list) else [content]
            other = last + "." if isinstance(last, str) else {**last, "text": last["text"] + "."}
            changed = message | {"content": [*before, other] if isinstance(content, list) else other}
            if _tried(render, [*messages[:number], changed, *messages[number + 1 :]]) == text:
                return number
    return None


def _notation(text: str) -> bool:
    """Whether parts were written as Python or JSON notes them."""
    return "'type': 'text'" in text or '"type": "text"' in text
