"""Prompts: rows of a JSONL file, their token ids, and the order in which a run draws them. Host only."""

import importlib.resources
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.types import Prompt

ASSETS = {"model": "model", "train": "train.jsonl", "eval": "eval.jsonl"}
"""What the package ships for the quickstart, by kind."""

Row = Mapping[str, Any]


def resolve_asset(path: str | os.PathLike[str], kind: str) -> Path:
    """The path itself, or what the package ships where the path is the word "quickstart".

    Args:
        path: a file or directory, or "quickstart".
        kind: a key of ``ASSETS``.

    Raises:
        ValueError: the package was installed without its quickstart.
    """
    if str(path) != "quickstart":
        return Path(path).expanduser()
    shipped = Path(str(importlib.resources.files("grpo_jax"))) / "quickstart" / ASSETS[kind]
    if not shipped.exists():
        raise ValueError(f"quickstart: {shipped} is not there; install grpo_jax again, or name a path of your own")
    return shipped


def load_rows(path: str | os.PathLike[str], prompt_column: str = "prompt") -> list[dict[str, Any]]:
    """The rows of a JSONL file: one JSON object a line, all with the same columns; empty lines are skipped.

    Raises:
        ValueError: no such file, nothing in it, a line that is no JSON object, or columns that are missing.
    """
    file = Path(path)
    if not file.is_file():
        kind = "is a directory" if file.is_dir() else "does not exist"
        raise ValueError(f"data file {str(file)!r} {kind} (looked from {Path.cwd()}); give the path of a JSONL file")
    with file.open("rb") as lines:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"data file {str(file)!r} is empty; it needs one JSON object a line with a {prompt_column!r}")
    rows = [_parse(line, f"{file}, line {number}") for number, line in numbered]
    check_rows(rows, prompt_column, [f"{file}, line {number}" for number, _ in numbered])
    return rows


def check_rows(rows: Sequence[Row], prompt_column: str = "prompt", places: Sequence[str] | None = None) -> None:
    """Refuse rows that cannot be trained on.

    Args:
        rows: to look at.
        prompt_column: the column every row needs.
        places: what to call each row in an error; None for its number.

    Raises:
        ValueError: no rows, a row without the prompt column, or with other columns than the first row.
    """
    if not rows:
        raise ValueError(f"dataset: got no rows; it needs at least one, with a column {prompt_column!r}")
    for number, row in enumerate(rows):
        place = f"row {number}" if places is None else places[number]
        if prompt_column not in row:
            raise ValueError(
                f"{place}: no column {prompt_column!r}, it has {sorted(row)}; rename one or set data.prompt_column"
            )
        if row.keys() != rows[0].keys():
            missing, extra = sorted(rows[0].keys() - row.keys()), sorted(row.keys() - rows[0].keys())
            raise ValueError(
                f"{place}: columns unlike the first row's: missing {missing}, extra {extra}, but a reward function "
                "gets whole columns; give every row the same ones (null where there is no value)"
            )


def encode(tokenizer: Any, prompt: str | Sequence[Row]) -> tuple[int, ...]:
    """Token ids of a prompt.

    A string is tokenized as the tokenizer does it by default (``add_special_tokens=True``, so one that begins texts
    with a BOS token does so here, as in TRL). Chat messages go through the tokenizer's template, with the header of
    the assistant's turn behind them.

    Raises:
        ValueError: an empty prompt, something that is neither kind, or messages without a usable chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"] if prompt else []
    else:
        ids = _encode_messages(tokenizer, prompt)
    if not len(ids):
        raise ValueError(f"prompt {prompt!r}: has no tokens, but sampling begins after at least one; drop the row")
    return tuple(int(token) for token in ids)


class PromptSet:
    """Every prompt of a dataset in the order of its file, for evaluation; a request id is the row's number.

    Attributes:
        prompts: those that are short enough.
        filtered_count: those that are not.
        row_count: both together.
        longest: tokens of the longest prompt that is short enough.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: Any, max_prompt_len: int | None = None, prompt_column: str = "prompt"
    ) -> None:
        """Tokenize all rows and leave out what is longer than ``max_prompt_len`` tokens; nothing is ever cut.

        Raises:
            ValueError: a row that cannot be encoded, by its number, or no prompt short enough.
        """
        check_rows(rows, prompt_column)
        encoded = [_prompt(tokenizer, row, number, prompt_column) for number, row in enumerate(rows)]
        lengths = [len(prompt.tokens) for prompt in encoded]
        if max_prompt_len is not None and min(lengths) > max_prompt_len:
            raise ValueError(
                f"data.max_prompt_len: got {max_prompt_len}, but all {len(rows)} prompts are longer, the shortest "
                f"{min(lengths)} tokens, the longest {max(lengths)}; raise it"
            )
        self.row_count = len(encoded)
        self.prompts = [p for p in encoded if max_prompt_len is None or len(p.tokens) <= max_prompt_len]
        self.filtered_count = self.row_count - len(self.prompts)
        self.longest = max(len(prompt.tokens) for prompt in self.prompts)

    def __len__(self) -> int:
        """Number of prompts short enough."""
        return len(self.prompts)


class PromptStream:
    """Prompts for training, epoch after epoch, each epoch every row once in an order of its own.

    The order of an epoch is a function of (seed, epoch) alone, and where a run stands in it is one integer, the
    number of prompts drawn. A batch may begin in one epoch and end in the next. The request id of a prompt is
    ``epoch * rows + row``, with row its place in the file and rows the length of the file, so it does not depend on
    what was filtered, on the batch size or on the order.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        seed: int,
        prompts_per_step: int,
        max_prompt_len: int | None = None,
        prompt_column: str = "prompt",
        shuffle: bool = True,
    ) -> None:
        """Tokenize all rows and stand before the first.

        Args:
            rows: the dataset.
            tokenizer: see ``encode``.
            seed: at least 0.
            prompts_per_step: how many ``next`` gives, at least 1.
            max_prompt_len: longer prompts are left out and counted in ``filtered_count``; None for no limit.
            prompt_column: the column that holds the prompt.
            shuffle: False draws every epoch in the order of the file.

        Raises:
            ValueError: an argument out of range, a row that cannot be encoded, or no prompt short enough.
        """
        if seed < 0:
            raise ValueError(f"seed: got {seed}, but a seed is at least 0; use 0")
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step: got {prompts_per_step}, but a step needs a prompt; use at least 1")
        self._dataset = PromptSet(rows, tokenizer, max_prompt_len, prompt_column)
        self._kept = {prompt.request_id: prompt for prompt in self._dataset.prompts}
        self._seed, self._count, self._shuffle = seed, prompts_per_step, shuffle
        self._cursor = 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def filtered_count(self) -> int:
        """Prompts left out because they are too long."""
        return self._dataset.filtered_count

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that is drawn."""
        return self._dataset.longest

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._kept)

    def next(self, count: int | None = None) -> list[Prompt]:
        """The next ``count`` prompts; None is ``prompts_per_step``."""
        count = self._count if count is None else count
        batch = [self._at(place) for place in range(self._cursor, self._cursor + count)]
        self._cursor += count
        return batch

    def by_request(self, request_id: int) -> Prompt:
        """The prompt that was drawn under a request id."""
        prompt = self._kept[request_id % self._dataset.row_count]
        return replace(prompt, request_id=request_id)

    def state(self) -> int:
        """How many prompts were drawn: all there is to save."""
        return self._cursor

    def restore(self, cursor: int) -> None:
        """Go on from a ``state``.

        Raises:
            ValueError: below 0.
        """
        if cursor < 0:
            raise ValueError(f"prompt cursor: got {cursor}, but it counts prompts drawn; use what state() returned")
        self._cursor = cursor

    def _at(self, place: int) -> Prompt:
        epoch, within = divmod(place, len(self._kept))
        row = self._order_of(epoch)[within]
        prompt = self._kept[row]
        return Prompt(epoch * self._dataset.row_count + row, prompt.tokens, prompt.text, prompt.columns)

    def _order_of(self, epoch: int) -> list[int]:
        """Rows in the order of an epoch; raw Philox words are ranked, as NumPy fixes these for all its versions."""
        if self._order[0] != epoch:
            rows = list(range(self._dataset.row_count))
            if self._shuffle:
                words = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(len(rows))
                rows = [int(row) for row in np.argsort(words, kind="stable")]
            self._order = (epoch, [row for row in rows if row in self._kept])
        return self._order[1]


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local checkpoint; nothing is downloaded and no code of the checkpoint is run.

    Raises:
        ValueError: no such directory, or no tokenizer in it.
    """
    place = Path(directory)
    if not place.is_dir():
        raise ValueError(f"model directory {str(place)!r} does not exist (looked from {Path.cwd()}); give its path")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up from config.json alone, without a word
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        files = sorted(file.name for file in place.iterdir())[:20]
        raise ValueError(
            f"model directory {str(place)!r}: no tokenizer can be loaded from {files} "
            f"({' '.join(str(error).split())[:300]}); copy tokenizer.json and tokenizer_config.json into it"
        ) from error
    return tokenizer


def stop_ids(directory: str | os.PathLike[str], tokenizer: Any) -> frozenset[int]:
    """Every token id that ends a completion: the tokenizer's EOS and what generation_config.json lists.

    Raises:
        ValueError: a generation_config.json that is no JSON object, or whose eos_token_id is no id or list of ids.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    file = Path(directory) / "generation_config.json"
    if file.is_file():
        listed = _parse(file.read_bytes(), str(file)).get("eos_token_id")
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


def _parse(text: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place}: not JSON ({error}); write one JSON object, such as {{"prompt": "..."}}') from error
    if not isinstance(row, dict):
        raise ValueError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"prompt": "..."}}')
    return row


def _prompt(tokenizer: Any, row: Row, number: int, prompt_column: str) -> Prompt:
    text = row[prompt_column]
    try:
        tokens = encode(tokenizer, text)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    return Prompt(number, tokens, text, {name: value for name, value in row.items() if name != prompt_column})


def _encode_messages(tokenizer: Any, messages: Any) -> Sequence[int]:
    listed = isinstance(messages, Sequence) and not isinstance(messages, bytes)
    if not listed or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError(
            f"prompt {messages!r}: neither a string nor a list of messages with role and content; use one of these"
        )
    if not messages:
        return ()
    if tokenizer.chat_template is None:
        raise ValueError(
            "prompt of chat messages: the tokenizer has no chat template to write them with; "
            "use an instruct model's tokenizer, or prompts that are strings"
        )
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
    except TemplateError as error:
        raise ValueError(f"prompt {messages!r}: the chat template refuses it ({error}); change the messages") from error
    return encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
