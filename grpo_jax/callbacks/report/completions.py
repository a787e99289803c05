"""completions.jsonl, read as it grows and packed for the page: numbers by column, texts in compressed blocks."""

import base64
import gzip
import json
import re
from array import array
from pathlib import Path
from typing import Any

from grpo_jax.metrics import parse_line, prompt_text

BLOCK = 400_000
"""Characters of text after which a block is closed: small enough to open at once, large enough to compress well."""
MOST = 24_000_000
"""Characters that all packed blocks and the text of the open one may have together: what the page and this process hold
of a run's completions, however long it is. Twice as many steps are left out where it is more."""
STEP = re.compile(rb'\{"step": (\d{1,18}),')
"""How a line begins that the run itself wrote."""
OWN = ("step", "group", "sample", "prompt", "reward", "advantage", "length", "cut")
"""Columns every completion has; ``prompt`` numbers the different prompts of the run."""


def pack(data: bytes) -> str:
    """Bytes as base64 of gzip: no character of it means anything to HTML."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


def pack_json(value: Any) -> str:
    """A JSON value, packed."""
    return pack(json.dumps(value, separators=(",", ":")).encode("ascii"))


class Completions:
    """What the page holds of a run's completions.

    Attributes:
        columns: float32 values of every completion by name; NaN where there is none.
        functions: names of the reward functions; their columns are called "rewards/<name>".
        starts: first completion of each block.
        every: steps 1, 1 + every, 1 + 2 every ... are here, 1 for all of them.
    """

    def __init__(self, path: Path):
        """Args: the file, which need not be there yet."""
        self._path, self.every = path, 1
        self._clear()

    def _clear(self) -> None:
        self._offset = 0
        self.columns = {name: array("f") for name in OWN}
        self.functions: list[str] = []
        self.starts: list[int] = []
        self._blocks: list[str] = []
        self._prompts: dict[str, int] = {}
        self._open: list[dict[str, Any]] = []
        self._size, self._packed = 0, 0

    def __len__(self) -> int:
        """Completions so far."""
        return len(self.columns["step"])

    def read(self) -> None:
        """Take the lines that were added since the last call; one that is not finished is left for the next.

        Where they are more than `MOST`, begin again with every second of the steps so far.
        """
        while not self._take():
            self.every *= 2
            self._clear()

    def _take(self) -> bool:
        """Whether what there is fits; otherwise it stops there."""
        if not self._path.exists():
            return True
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                begin = STEP.match(line)  # to read all of a line that is left out costs too much
                row = None if begin and (int(begin[1]) - 1) % self.every else parse_line(line)
                if row is not None and (row["step"] - 1) % self.every == 0:
                    self._add(row)
                    if self._packed + self._size > MOST and row["step"] > 1:  # the first step is always shown
                        return False
        return True

    def blocks(self) -> list[str]:
        """Every block, packed; the last one is still growing."""
        return [*self._blocks, *([_packed(self._open)] if self._open else [])]

    def index(self) -> str:
        """All columns one behind the other, little-endian float32, packed."""
        parts = []
        for values in self.columns.values():
            values = array("f", values)
            if array("H", [1]).tobytes() != b"\x01\x00":
                values.byteswap()
            parts.append(values.tobytes())
        return pack(b"".join(parts))

    def _add(self, row: dict[str, Any]) -> None:
        group = (row["step"], row["group"])
        if self._size > BLOCK and group != (self._open[-1]["step"], self._open[-1]["group"]):
            self._blocks.append(_packed(self._open))
            self._packed += len(self._blocks[-1])
            self._open, self._size = [], 0
        if not self._open:
            self.starts.append(len(self))
        text = row["prompt"] = prompt_text(row["prompt"])
        self._open.append(row)
        self._size += len(text) + 3 * len(row["completion"])
        numbers = {name: row[name] for name in OWN if name in row}
        numbers |= {"prompt": self._prompts.setdefault(text, len(self._prompts)), "cut": row["finish"] == "length"}
        self.functions = list(row["rewards"])
        numbers |= {f"rewards/{name}": value for name, value in row["rewards"].items()}
        extra = row.get("extra", {}).items()
        numbers |= {f"extra/{name}": value for name, value in extra if isinstance(value, (bool, int, float))}
        count = len(self)
        for name, value in numbers.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = array("f", [float("nan")] * count)
            column.append(_number(value))
        for column in self.columns.values():
            if len(column) == count:
                column.append(float("nan"))


def _number(value: Any) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:  # an integer that no float can hold
        return float("nan")


def _packed(rows: list[dict[str, Any]]) -> str:
    """A block: its prompts, and of each completion [prompt, text or tokens, log-probs in hundredths, extra columns]."""
    prompts: dict[str, int] = {}
    out = []
    for row in rows:
        prompt = prompts.setdefault(row["prompt"], len(prompts))
        logp = [round(100 * x) if x is not None else 0 for x in row.get("logp", ())]
        out.append([prompt, row.get("tokens", row["completion"]), logp, row.get("extra", {})])
    return pack_json({"prompts": list(prompts), "rows": out})
