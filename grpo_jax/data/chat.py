"""From a row's prompt to token ids and back: chat templates, tokenizers, stop tokens. Host only."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from grpo_jax.config import DataConfig
from grpo_jax.data.messages import Messages, cut, is_chat, listed, marked, written
from grpo_jax.data.sources import NOTHING, Row, find_column
from grpo_jax.data.template import ChatTemplate, printable

Text = str | Sequence[Row]
"""A prompt: a string, or chat messages."""

QUIET = {"verbose": False}
"""No warning of the tokenizer's own length limit: data.max_prompt_len and the model's positions are what is checked."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+(?:\.\w+)*)\}")
"""What `fill` replaces: braces that are doubled, and the name of a column, dotted where it is nested."""


@dataclass
class _Seen:
    """What became known of a chat template while it was used.

    Attributes:
        read: kinds of conversations, by their roles, of which it is known to leave nothing out.
        date: as it wrote it last.
    """

    read: set[tuple[str, ...]] = field(default_factory=set)
    date: str = ""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompt of a row is made, and how it becomes tokens.

    A string goes to the model as it is, unless ``as_messages``. Messages go through the chat template.

    Attributes:
        template: text with {column} for values of the row; None takes the row's prompt column.
        as_messages: a string becomes the message of a user.
        system_prompt: put before every prompt's messages.
        chat_template: Jinja text; None is the tokenizer's own.
        chat_template_kwargs: what the chat template is given besides.
        chat_template_name: what errors call a chat template that is not the tokenizer's.
        now: the time that a chat template is told; the same for all prompts of a run, however long it takes.
    """

    template: str | None = None
    as_messages: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template_name: str = "data.chat_template"
    now: datetime = field(default_factory=datetime.now)
    _seen: _Seen = field(default_factory=_Seen, init=False, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: DataConfig, now: datetime | None = None) -> Self:
        """As ``data.*`` says, the chat template read from its file.

        Raises:
            ValueError: no such file, or one that is not text or no template.
        """
        own = read_template(config)
        name = f"data.chat_template: {config.chat_template!r}"
        if own is not None:
            ChatTemplate(own, name).parsed()
        return cls(
            config.prompt_template,
            config.as_messages,
            config.system_prompt,
            own,
            config.chat_template_kwargs,
            name,
            now or datetime.now(),
        )

    @property
    def date(self) -> str:
        """The date that the chat template wrote into the last prompt; "" where it writes none."""
        return self._seen.date

    def prompt(self, row: Row, column: str = "prompt") -> Text:
        """What a reward function gets as the prompt, and what ``encode`` turns into tokens.

        Raises:
            ValueError: a system prompt or a chat template asked for, and a prompt that has no place for it.
        """
        prompt = listed(find_column(row, column)) if self.template is None else fill(self.template, row)
        if isinstance(prompt, str):
            if not self.as_messages:
                for name, value in self._about_messages().items():
                    if value:
                        raise ValueError(
                            f"data.{name}: got one, but the prompt is a string, which goes to the model as it is; "
                            "set data.as_messages = true to make it a message of the user, or leave it out"
                        )
                return prompt
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        if self.system_prompt is None or not is_chat(prompt) or not prompt:
            return prompt
        if prompt[0]["role"] == "system":
            raise ValueError(
                "data.system_prompt: got one, but the prompt begins with its own; leave out one of the two"
            )
        return [{"role": "system", "content": self.system_prompt}, *prompt]

    def encode(self, tokenizer: Any, prompt: Text) -> tuple[int, ...]:
        """Token ids of a prompt.

        A string is tokenized as the tokenizer does it by default (``add_special_tokens=True``, so one that begins
        texts with a BOS token does so here, as in TRL). Chat messages go through the template, with the header of the
        assistant's turn behind them; where the last message is the assistant's, that turn is to be continued.

        Raises:
            ValueError: an empty prompt, something that is neither kind, or messages without a usable chat template.
        """
        if isinstance(prompt, str):
            text, special = prompt, True
        else:
            text, special = self._written(tokenizer, listed(prompt)), False
        ids = _tokens(tokenizer, text, special) if text else ()
        if not ids:
            raise ValueError(
                f"prompt {shown(prompt)}: has no tokens, but sampling begins after at least one; give it some text "
                "that the tokenizer knows, or leave it out"
            )
        return ids

    def _about_messages(self) -> dict[str, Any]:
        names = ("system_prompt", "chat_template", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}

    def _written(self, tokenizer: Any, messages: Any) -> str:
        """What the chat template makes of messages."""
        if not is_chat(messages):
            raise ValueError(
                f"prompt {shown(messages)}: neither a string nor a list of messages with role and content; use one of "
                "these"
            )
        if not messages:
            return ""
        template = self._template(tokenizer)
        goes_on = messages[-1]["role"] == "assistant" and "add_generation_prompt" not in self.chat_template_kwargs
        variables = tokenizer.special_tokens_map | {"add_generation_prompt": not goes_on}
        variables |= self._template_options(template.text)

        def render(asked: Messages) -> str:
            asked, last = marked(asked) if goes_on else (asked, "")
            text, date = template.render(asked, variables, self.now)
            self._seen.date = date or self._seen.date
            return cut(text, last) if goes_on else text

        kind = tuple(str(message["role"]) for message in messages)
        try:
            text = written(messages, render, kind in self._seen.read)
        except ValueError as error:
            if str(error).startswith("the chat template"):
                raise ValueError(f"prompt {shown(messages)}: {error}") from error
            raise
        self._seen.read.add(kind)
        return text

    def _template(self, tokenizer: Any) -> ChatTemplate:
        if self.chat_template is not None:
            return ChatTemplate(self.chat_template, self.chat_template_name)
        text = tokenizer.chat_template
        if isinstance(text, Mapping):
            text = text.get("default")
        if text is None:
            several = (
                "" if tokenizer.chat_template is None else f", only those for {', '.join(tokenizer.chat_template)},"
            )
            raise ValueError(
                f"prompt of chat messages: the tokenizer has no chat template{several} to write them with; use an "
                "instruct model's tokenizer, data.chat_template, or prompts that are strings"
            )
        return ChatTemplate(str(text), "the tokenizer's chat template")

    def _template_options(self, text: str) -> dict[str, Any]:
        """The template's arguments; one that it does not mention would be ignored without a word."""
        unknown = [name for name in self.chat_template_kwargs if name not in text]
        if unknown:
            raise ValueError(
                f"data.chat_template_kwargs: got {unknown[0]!r}, which the chat template never reads; correct the "
                "name, or leave it out"
            )
        return dict(self.chat_template_kwargs)


def encode(tokenizer: Any, prompt: Text) -> tuple[int, ...]:
    """Token ids of a prompt in the plain format; see ``PromptFormat.encode``."""
    return PromptFormat().encode(tokenizer, prompt)


def fill(template: str, row: Row) -> str:
    """A template with {column} replaced by the row's value; ``{{`` and ``}}`` are braces, any other text is itself.

    >>> fill(r"{question} Answer in \\boxed{}.", {"question": "1+1?"})
    '1+1? Answer in \\\\boxed{}.'

    Raises:
        ValueError: no such column, or one that has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        found = find_column(row, name)
        if found is NOTHING or found is None:
            raise ValueError(
                f"data.prompt_template: no value for {{{name}}}, the columns are {sorted(row)}; "
                "name one of them, or double the braces to mean the text itself"
            )
        return str(found)

    return _PLACEHOLDER.sub(value, template)


def read_template(config: DataConfig) -> str | None:
    """The text of ``data.chat_template``; None where the tokenizer's own is used.

    Raises:
        ValueError: no such file, or one that is not text.
    """
    if config.chat_template is None:
        return None
    file = Path(config.chat_template).expanduser()
    if not file.is_file():
        raise ValueError(f"data.chat_template: no file {str(file)!r} (looked from {Path.cwd()}); give the path of one")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template: {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error


def shown(prompt: Any, most: int = 300) -> str:
    """A prompt as an error quotes it: in one line, and not all of a long one."""
    return printable(repr(prompt), most)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a local checkpoint; nothing is downloaded and no code of the checkpoint is run.

    Raises:
        ValueError: no such directory, or no tokenizer in it.
    """
    place = Path(directory)
    if not place.is_dir():
        raise ValueError(f"model directory {str(place)!r} does not exist (looked from {Path.cwd()}); give its path")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would regret the absence of PyTorch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
        if len(words) < 2:  # made up without a vocabulary's file, of the class's own end of text at most
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        files = sorted(file.name for file in place.iterdir())[:20]
        raise ValueError(
            f"model directory {str(place)!r}: no tokenizer can be loaded from {files} "
            f"({' '.join(str(error).split())[:300]}); copy tokenizer.json and tokenizer_config.json into it"
        ) from error
    return tokenizer


def stop_ids(directory: str | Path, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends a completion: the tokenizer's EOS, and those of config.json and generation_config.json.

    Raises:
        ValueError: one of these files that is no JSON object, or whose eos_token_id is no id or list of ids.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        file = Path(directory) / name
        if file.is_file():
            listed = _read_object(file).get("eos_token_id")
            found = listed if isinstance(listed, list) else [] if listed is None else [listed]
            wrong = [token for token in found if not isinstance(token, int) or isinstance(token, bool) or token < 0]
            if wrong:
                raise ValueError(
                    f"{file}: eos_token_id holds {wrong[0]!r}, but token ids are integers from 0; correct it"
                )
            ids += found
    return frozenset(ids)


def decode(tokenizer: Any, ids: Sequence[int], stop_ids: Iterable[int] = ()) -> str:
    """A completion as text, without special tokens, and without a last token that is among ``stop_ids``.

    The latter matters only for stop tokens that the tokenizer does not know as special.
    """
    ends = bool(ids) and ids[-1] in set(stop_ids)
    return str(tokenizer.decode(list(ids[:-1] if ends else ids), skip_special_tokens=True))


def _tokens(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """Args: ``special``: with the tokens that the tokenizer puts around a text; a chat template writes its own."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"prompt {shown(text[max(0, error.start - 20) : error.end])}: {half!r} is half of a character, which no "
            "tokenizer reads; write the whole one, or leave it out"
        ) from error
    options = QUIET if special else QUIET | {"add_special_tokens": False}
    return tuple(int(token) for token in tokenizer(text, **options)["input_ids"])


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); write one JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON {type(value).__name__}, not an object; write one JSON object")
    return value
