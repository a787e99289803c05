"""Stop strings: texts that end a completion with the token that completes them, looked for on the host."""

from collections.abc import Callable

import numpy as np


class StopStrings:
    """Looks for stop strings in rows as they grow.

    Attributes:
        strings: the texts; none switches it off.
    """

    def __init__(self, strings: tuple[str, ...], decode: Callable[[list[int]], str] | None):
        """Args: the texts, and what makes text of token ids.

        Raises:
            ValueError: texts and nothing to read completions with.
        """
        if strings and decode is None:
            raise ValueError(f"stop_strings: got {strings} without a tokenizer to read completions. Give `decode`.")
        self.strings, self._decode = strings, decode

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
            ids = tokens[slot, : length[slot]].tolist()
            if self._holds(ids):
                out[slot] = next(n for n in range(before + 1, len(ids) + 1) if self._holds(ids[:n]))
        return out

    def _holds(self, ids: list[int]) -> bool:
        assert self._decode is not None
        text = self._decode(ids)
        return any(string in text for string in self.strings)
