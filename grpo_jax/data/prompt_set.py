"""One dataset's prompts as token ids, and what is to be known of them before a run. Host only."""

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Literal

from grpo_jax.data.chat import PromptFormat, shown
from grpo_jax.data.sources import NOTHING, Row, check_rows, find_column
from grpo_jax.data.template import TemplateFault
from grpo_jax.rewards.travel import plain, why_it_stays
from grpo_jax.types import Prompt

NAMED = 5
"""Rows that a report names; of more it says how many there are."""


class PromptSet:
    """Every prompt of a dataset in the order of its file; a request id is the row's number.

    Attributes:
        prompts: those that are short enough.
        filtered_count: those that are not.
        row_count: both together.
        longest: tokens of the longest prompt that is short enough.
        columns: names of what the reward functions get of the rows.
        available: names of all that the rows have.
        reports: what a run should know of the prompts, in words: those left out, tokens that double or end a text, a
            date that the chat template writes.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        max_prompt_len: int | None = None,
        prompt_column: str = "prompt",
        *,
        form: PromptFormat | None = None,
        long_prompts: Literal["filter", "error"] = "filter",
        name: str = "dataset",
        columns: Collection[str] | None = None,
    ) -> None:
        """Tokenize all rows and leave out, or refuse, what is longer than ``max_prompt_len`` tokens; nothing is cut.

        Raises:
            ValueError: a row that cannot be encoded, by its number, or no prompt short enough.
        """
        form = form or PromptFormat()
        check_rows(rows, prompt_column if form.template is None else None, columns=columns)
        encoded = [_prompt(tokenizer, form, row, n, prompt_column, columns) for n, row in enumerate(rows)]
        lengths = [len(prompt.tokens) for prompt in encoded]
        if max_prompt_len is not None and min(lengths) > max_prompt_len:
            raise ValueError(
                f"data.max_prompt_len: got {max_prompt_len}, but all {len(rows)} prompts are longer, the shortest "
                f"{min(lengths)} tokens, the longest {max(lengths)}; raise it"
            )
        self.name = name
        self.row_count = len(encoded)
        self.prompts = [p for p in encoded if max_prompt_len is None or len(p.tokens) <= max_prompt_len]
        self.filtered_count = self.row_count - len(self.prompts)
        self.longest = max(len(prompt.tokens) for prompt in self.prompts)
        alike = self.prompts[:1] if columns is None else self.prompts
        self.columns = frozenset[str]().union(*(prompt.columns or {} for prompt in alike))
        self.available = frozenset(rows[0])
        long = [prompt.request_id for prompt in encoded if len(prompt.tokens) > (max_prompt_len or len(prompt.tokens))]
        said = (
            f"{name}: {len(long)} of {self.row_count} prompts are longer than data.max_prompt_len = {max_prompt_len} "
            f"tokens{{}}, the longest has {max(lengths)}"
        )
        if long and long_prompts == "error":
            raise ValueError(
                f'{said.format("")}, the first is row {long[0]}; raise it, or set data.long_prompts = "filter"'
            )
        self.reports = (
            *([f"{said.format(' and are left out')} ({_named(long)})"] if long else ()),
            *_odd_ends(name, self.prompts, tokenizer),
            *_dated(form),
        )

    @property
    def report(self) -> str:
        """``reports``, a line each; "" where there are none."""
        return "\n".join(self.reports)

    def digest(self) -> str:
        """SHA-256 of what its rows say, prompts and columns, in their order, whatever the tokenizer is."""
        whole = hashlib.sha256(f"{self.row_count}\n".encode())
        for prompt in self.prompts:
            row = [prompt.request_id, prompt.text, prompt.columns]
            whole.update(json.dumps(row, sort_keys=True, default=_stable).encode() + b"\n")
        return whole.hexdigest()

    def check_tokens(self, vocab: int) -> None:
        """Refuse a prompt that the model has no embedding for.

        Raises:
            ValueError: a token that is not below ``vocab``, by its row.
        """
        for prompt in self.prompts:
            if max(prompt.tokens) >= vocab:
                raise ValueError(
                    f"{self.name}: row {prompt.request_id}: its prompt has the token {max(prompt.tokens)}, and the "
                    f"model's are 0 to {vocab - 1}; leave the row out, or use the model's own tokenizer"
                )

    def check_columns_travel(self) -> None:
        """Refuse what cannot be sent to a reward function in a process of its own.

        Raises:
            ValueError: a value that JSON cannot hold in any stated form, by its row and column.
        """
        for prompt in self.prompts:
            if why_it_stays(prompt.columns) is None:
                continue
            for column, value in (prompt.columns or {}).items():
                why = why_it_stays(value)
                if why is not None:
                    others = sorted(self.columns - {column})
                    raise ValueError(
                        f"{self.name}: row {prompt.request_id}, column {column!r}: cannot be sent to a reward's "
                        f"process ({why}); leave it out by data.columns, which names those that are sent"
                        + (f" (the others are {', '.join(others)})" if others else "")
                    )

    def __len__(self) -> int:
        """Number of prompts short enough."""
        return len(self.prompts)


def _prompt(
    tokenizer: Any, form: PromptFormat, row: Row, number: int, column: str, columns: Collection[str] | None
) -> Prompt:
    try:
        text = form.prompt(row, column)
        tokens = form.encode(tokenizer, text)
    except TemplateFault:
        raise
    except ValueError as error:
        where = f"row {number}" if column == "prompt" or form.template else f"row {number}, column {column!r}"
        raise ValueError(f"{where}: {error}") from error
    found = row if columns is None else {name: find_column(row, name) for name in columns}
    sent = {name: value for name, value in found.items() if name != column and value is not NOTHING}
    return Prompt(number, tokens, text, sent)


def _named(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:NAMED]))}{more}"


def _odd_ends(name: str, prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """What is said of prompts that begin with BOS twice, or end with EOS, behind which nothing is to come."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    twice = [p.request_id for p in prompts if bos is not None and p.tokens[:2] == (bos, bos)]
    ended = [p.request_id for p in prompts if len(p.tokens) > 1 and p.tokens[-1] == eos]
    whose, said = f"{name}: {{}} of {len(prompts)} prompts", []
    if twice:
        said.append(
            f"{whose.format(len(twice))} begin with BOS ({tokenizer.bos_token}) twice ({_named(twice)}): the tokenizer "
            "puts one before a text that has one; give messages, or text without it"
        )
    if ended:
        said.append(
            f"{whose.format(len(ended))} end with EOS ({tokenizer.eos_token}) ({_named(ended)}), so that completions "
            "go on behind the end of a text; if the tokenizer adds it, set add_eos_token to false in its "
            "tokenizer_config.json"
        )
    return said


def _dated(form: PromptFormat) -> list[str]:
    if not form.date:
        return []
    return [
        f"the chat template writes the date into every prompt: {shown(form.date)} for all of this run, recorded when "
        "it began; a date of your own is an argument of most such templates (data.chat_template_kwargs)"
    ]


def _stable(value: Any) -> Any:
    """What stands for a value in `digest`; of one without a form in JSON its type, as its address would change."""
    try:
        return plain(value)
    except TypeError:
        return value.hex() if isinstance(value, bytes) else type(value).__qualname__
