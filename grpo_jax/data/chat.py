"""From a row's prompt to token ids and back: chat templates, tokenizers, stop tokens. Host only."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from grpo_jax.config import DataConfig

Row = Mapping[str, Any]
Text = str | Sequence[Row]
"""A prompt: a string, or chat messages."""

QUIET = {"verbose": False}
"""No warning of the tokenizer's own length limit: data.max_prompt_len and the model's positions are what is checked."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


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
    """

    template: str | None = None
    as_messages: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: DataConfig) -> Self:
        """As ``data.*`` says, the chat template read from its file.

        Raises:
            ValueError: no such file, or one that is not text.
        """
        chat_template = None
        if config.chat_template is not None:
            file = Path(config.chat_template).expanduser()
            if not file.is_file():
                raise ValueError(
                    f"data.chat_template: no file {str(file)!r} (looked from {Path.cwd()}); give the path of one"
                )
            try:
                chat_template = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data.chat_template: {str(file)!r} is not UTF-8 ({error}); save it as UTF-8"
                ) from error
        return cls(
            config.prompt_template, config.as_messages, config.system_prompt, chat_template, config.chat_template_kwargs
        )

    def prompt(self, row: Row, column: str = "prompt") -> Text:
        """What a reward function gets as the prompt, and what ``encode`` turns into tokens.

        Raises:
            ValueError: a system prompt or a chat template asked for, and a prompt that has no place for it.
        """
        prompt = row[column] if self.template is None else fill(self.template, row)
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
        if self.system_prompt is None or not _are_messages(prompt) or not prompt:
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
        assistant's turn behind them.

        Raises:
            ValueError: an empty prompt, something that is neither kind, or messages without a usable chat template.
        """
        if isinstance(prompt, str):
            ids = tokenizer(prompt, **QUIET)["input_ids"] if prompt else []
        else:
            ids = self._encode_messages(tokenizer, prompt)
        if not len(ids):
            raise ValueError(
                f"prompt {prompt!r}: has no tokens, but sampling begins after at least one; give it some text that the "
                "tokenizer knows, or leave it out"
            )
        return tuple(int(token) for token in ids)

    def _about_messages(self) -> dict[str, Any]:
        names = ("system_prompt", "chat_template", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}

    def _encode_messages(self, tokenizer: Any, messages: Any) -> Sequence[int]:
        if not _are_messages(messages):
            raise ValueError(
                f"prompt {messages!r}: neither a string nor a list of messages with role and content; use one of these"
            )
        if not messages:
            return ()
        if self.chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                "prompt of chat messages: the tokenizer has no chat template to write them with; use an instruct "
                "model's tokenizer, data.chat_template, or prompts that are strings"
            )
        from jinja2 import TemplateError

        options = (
            {"add_generation_prompt": True}
            | self._template_options(tokenizer)
            | {"tokenize": True, "tokenizer_kwargs": QUIET}
        )
        try:
            encoded = tokenizer.apply_chat_template(list(messages), chat_template=self.chat_template, **options)
        except TemplateError as error:
            raise ValueError(
                f"prompt {messages!r}: the chat template refuses it ({error}); change the messages"
            ) from error
        return encoded["input_ids"] if isinstance(encoded, Mapping) else encoded

    def _template_options(self, tokenizer: Any) -> dict[str, Any]:
        """The template's arguments; one that it does not mention would be ignored without a word."""
        text = str(self.chat_template or tokenizer.chat_template)
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
        if row.get(name) is None:
            raise ValueError(
                f"data.prompt_template: no value for {{{name}}}, the columns are {sorted(row)}; "
                "name one of them, or double the braces to mean the text itself"
            )
        return str(row[name])

    return _PLACEHOLDER.sub(value, template)


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
    """Every token id that ends a completion: the tokenizer's EOS and what generation_config.json lists.

    Raises:
        ValueError: a generation_config.json that is no JSON object, or whose eos_token_id is no id or list of ids.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    file = Path(directory) / "generation_config.json"
    if file.is_file():
        listed = _read_object(file).get("eos_token_id")
        ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
    wrong = [token for token in ids if not isinstance(token, int) or isinstance(token, bool) or token < 0]
    if wrong:
        raise ValueError(f"{file}: eos_token_id holds {wrong[0]!r}, but token ids are integers from 0; correct it")
    return frozenset(ids)


def decode(tokenizer: Any, ids: Sequence[int], stop_ids: Iterable[int] = ()) -> str:
    """A completion as text, without special tokens, and without a last token that is among ``stop_ids``.

    The latter matters only for stop tokens that the tokenizer does not know as special.
    """
    ends = bool(ids) and ids[-1] in set(stop_ids)
    return str(tokenizer.decode(list(ids[:-1] if ends else ids), skip_special_tokens=True))


def _are_messages(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return listed and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); write one JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON {type(value).__name__}, not an object; write one JSON object")
    return value
