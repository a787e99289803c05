"""Stop strings: texts that end a completion with the token that completes them, looked for on the host."""

from collections.abc import Callable

import numpy as np

BYTES = 4
"""Of a character in UTF-8, and so tokens, at most."""


class StopStrings:
    """Looks for stop strings in rows as they grow.

    Attributes:
        strings: the texts; none switches it off.
    """

    def __init__(self, strings: tuple[str, ...], decode: Callable[[list[int]], str] | None, min_tokens: int = 0):
        """Where a completion ends depends on its tokens alone if what ``decode`` writes stays when tokens follow.

        Args:
            strings: the texts.
            decode: token ids to text.
            min_tokens: no completion ends before it has more tokens, as with stop tokens.

        Raises:
            ValueError: texts and nothing to read completions with.
        """
        if strings and decode is None:
            raise ValueError(f"stop_strings: got {strings} without a tokenizer to read completions. Give `decode`.")
        self.strings, self._decode, self._min_tokens = strings, decode, min_tokens
        # A string that a new token completes lies in so many tokens before it: a character is four bytes at most.
        self._reach = BYTES * max(map(len, strings), default=0) + BYTES

    def cut(self, seats: np.ndarray, old: np.ndarray, length: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Where each slot's completion ends by a stop string.

        Args:
            seats: [B] row in each slot, -1 for none.
            old: tokens of the rows in slots when they were last looked at, in the order of slots.
            length: [B] tokens now.
            tokens: [B, C].

        Returns:
            [B] tokens up to and with the one that completes a stop string; 0 where there is none.
        """
        out = np.zeros(len(seats), np.int32)
        for slot, before in zip(np.flatnonzero(seats >= 0).tolist(), old.tolist(), strict=True):
            start, first = max(0, before - self._reach), max(before, self._min_tokens)
            ids = tokens[slot, start : length[slot]].tolist()
            if any(string in self._text(ids) for string in self.strings):
                places = range(first - start, len(ids))
                out[slot] = next((start + n + 1 for n in places if self._completes(ids[:n], ids[n])), 0)
        return out

    def _completes(self, ids: list[int], token: int) -> bool:
        """Whether a string ends in what the token adds to the text of ``ids``."""
        known = len(self._text(ids).rstrip("\N{REPLACEMENT CHARACTER}"))  # half a character is written anew
        text = self._text([*ids, token])
        return any(text.find(string, max(0, known - len(string) + 1)) >= 0 for string in self.strings)

    def _text(self, ids: list[int]) -> str:
        assert self._decode is not None
        return self._decode(ids)
