"""What a run records about itself: metrics by step, completions, compiles, seconds by phase, curves."""

import json
import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from grpo_jax.scoring import Scored
from grpo_jax.types import Prompt, Rollout

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""
MOST_BYTES = 4
"""Bytes of the longest character in UTF-8."""


def keep_compiled(directory: str | None) -> None:
    """Keep compiled programs in a directory, so that another process need not compile them; None keeps none."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class CompileLog:
    """Counts XLA compiles while it is open, with the name of each compiled function.

    Those of the thread that opened it, which waits for them; of threads that compile ahead beside it the seconds only.
    """

    def __init__(self) -> None:
        """Start empty; `with` opens it."""
        self.names: list[str] = []
        self.seconds = 0.0
        self._told, self._thread = 0, 0

    def __enter__(self) -> Self:
        """Listen."""
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

    @property
    def count(self) -> int:
        """Programs compiled, or read from the cache, so far."""
        return len(self.names)

    def take_step(self) -> dict[str, Any]:
        """The count so far, and the names of what was compiled since the last call."""
        new, self._told = self.names[self._told :], self.count
        return {"compile_count": self.count, "compiled": new}

    def _hear(self, event: str, duration_secs: float, **facts: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs  # tracing, lowering and the backend
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == self._thread:
            self.names.append(str(facts.get("fun_name", "?")))


class Phases:
    """Seconds by phase, of the step at hand and of the whole run."""

    def __init__(self, total: Mapping[str, float] | None = None) -> None:
        """Start from the totals of an earlier part of the run."""
        self.total: dict[str, float] = defaultdict(float, total or {})
        self.step: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block under ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[name] += seconds
            self.step[name] += seconds

    def take_step(self) -> dict[str, float]:
        """The step's seconds by phase; starts the next step."""
        step, self.step = dict(self.step), defaultdict(float)
        return step


class JsonLines:
    """A file of one JSON object a line; opened to go on from a step, it drops the lines of later steps.

    Attributes:
        damaged: numbers of lines that nobody can read, between others that were kept; they are in a file beside it.
    """

    def __init__(self, path: Path, keep_below: int | None = None):
        """Args: the file, and the first step whose lines are dropped (None keeps nothing)."""
        self.damaged = _cut_back(path, 0 if keep_below is None else keep_below) if path.is_file() else []
        # Half a surrogate pair, which a data set's "\\ud800" holds, is no UTF-8; its backslash form is JSON again.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; a float that is not finite becomes null."""
        line = json.dumps({k: _json(v) for k, v in row.items()}, ensure_ascii=False)
        try:
            self._file.write(f"{line}\n")
            self._file.flush()
        except OSError as error:  # a write that fails does not say to which file
            error.filename = error.filename or self._file.name
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that `JsonLines` wrote; lines that a kill has cut, or that are damaged, are left out."""
    with path.open("rb") as lines:  # bytes: a line may be cut inside a character
        return [row for row in map(parse_line, lines) if row is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The row that a line of such a file holds; None where it is damaged."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut_back(path: Path, below: int) -> list[int]:
    """Leave the lines of steps below one, reading the file twice at most and never as a whole.

    Returns:
        Numbers of damaged lines that had others to keep behind them, whose bytes are then in ``<name>.damaged``.
    """
    end, damaged, gap, loose = 0, list[int](), False, False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_line(line)
            if row is None:
                damaged.append(number)
            if row is None or row["step"] >= below:
                gap = True
            elif gap or not line.endswith(b"\n"):
                loose = True
            else:
                end += len(line)
    if not loose:
        os.truncate(path, end)
        return []
    _rewrite(path, below)
    return damaged


def _rewrite(path: Path, below: int) -> None:
    """Whole or not at all: neither a kill nor a full disk may cost the lines that are kept."""
    partial, aside = path.with_suffix(".partial"), path.with_name(f"{path.name}.damaged")
    with path.open("rb") as lines, partial.open("wb") as file, aside.open("ab") as unread:
        for line in lines:
            row = parse_line(line)
            if row is None:
                unread.write(line)
            elif row["step"] < below:
                file.write(line.rstrip(b"\n") + b"\n")
    partial.replace(path)


def _json(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def reward_metrics(names: Sequence[str], scored: Scored) -> dict[str, float]:
    """Figures of one step's rewards, in all and by function; ``names`` are those of the F functions."""
    reward = scored.reward[scored.scored]
    out = {
        "reward": float(reward.mean()) if reward.size else float("nan"),
        "reward_std": float(reward.std()) if reward.size else float("nan"),
        "frac_reward_zero_std": float(1.0 - scored.spread.mean()),
        "unscored": int((~scored.scored).sum()),
    }
    for name, values in zip(names, scored.by_function, strict=True):
        answered = values[np.isfinite(values)]
        out[f"rewards/{name}/mean"] = float(answered.mean()) if answered.size else float("nan")
        out[f"rewards/{name}/std"] = float(answered.std()) if answered.size else float("nan")
        out[f"rewards/{name}/unscored"] = int(values.size - answered.size)
    return out


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of one step's completions and the share cut at the limit."""
    length = rollout.completion_len
    return {
        "completions/mean_length": float(length.mean()),
        "completions/min_length": int(length.min()),
        "completions/max_length": int(length.max()),
        "completions/clipped_ratio": float((rollout.finish == "length").mean()),
    }


def means(sums: list[dict[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Sums and counts of a step's updates -> one figure a name: the mean, or the sum where nothing is counted."""
    out = {}
    for name in sums[0]:
        total = float(np.sum([s[name][0] for s in sums]))
        count = float(np.sum([s[name][1] for s in sums]))
        out[name] = total / count if count else total
    return out


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row of metrics.jsonl: its finite numbers, without its step."""
    numbers = {name: float(v) for name, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if name != "step" and np.isfinite(value)}


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: itself, or its messages, each behind its role."""
    if isinstance(prompt, str):
        return prompt
    contents = [(m.get("role", ""), m.get("content", "")) for m in prompt]
    return "\n".join(f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in contents)


class TokenTexts:
    """The text of each token of a completion, such that together they spell it, stop token included."""

    def __init__(self, tokenizer: Any):
        """Args: the model's tokenizer."""
        self._decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text a token; of tokens that are parts of one character, the last has it and the others are empty."""
        texts, part = list[str](), list[int]()
        for token in ids:
            text = self._of(token)
            if part and BROKEN not in text:
                texts[-1], part = self._decode(part), []
            if BROKEN in text:
                text = self._decode([*part, token])
                unfinished = text.endswith(BROKEN) and len(part) + 1 < MOST_BYTES
                text, part = ("", [*part, token]) if unfinished else (text, [])
            texts.append(text)
        if part:
            texts[-1] = self._decode(part)
        return texts

    def _of(self, token: int) -> str:
        if token not in self._known:
            # Behind another token, as some tokenizers drop the space a text begins with.
            self._known[token] = self._decode([token, token])[len(self._decode([token])) :]
        return self._known[token]


def completion_rows(
    step: int,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    scored: Scored,
    names: Sequence[str],
    most: int,
    texts: TokenTexts | None = None,
) -> list[dict[str, Any]]:
    """Lines of completions.jsonl for the first groups of a step: as many as hold ``most`` completions.

    Args:
        step: its number.
        prompts: Q prompts.
        rollout: their N completions.
        scored: the same, judged.
        names: of the F reward functions.
        most: completions to keep, rounded up to whole groups.
        texts: gives the texts of tokens; None leaves tokens and their log-probabilities out.
    """
    samples = rollout.tokens.shape[0] // len(prompts)
    counted = np.flatnonzero(scored.counted)
    groups = counted[: -(-most // samples)]
    rewards = scored.reward.reshape(-1)
    rows = []
    for n in (int(q) * samples + g for q in groups for g in range(samples)):
        row = {
            "step": step,
            "group": n // samples,
            "sample": n % samples,
            "prompt": prompts[n // samples].text,
            "completion": scored.completions[n],
            "rewards": {name: _json(float(scored.by_function[f, n])) for f, name in enumerate(names)},
            "reward": float(rewards[n]),
            "advantage": float(scored.advantages[n]),
            "finish": str(rollout.finish[n]),
            "length": int(rollout.completion_len[n]),
        }
        extra = {name: _plain(values[n]) for name, values in scored.extra.items()}
        rows.append(row | ({"extra": extra} if extra else {}) | _tokens(rollout, n, texts))
    return rows


def _tokens(rollout: Rollout, n: int, texts: TokenTexts | None) -> dict[str, Any]:
    if texts is None:
        return {}
    logp = rollout.sampler_logp[n][rollout.prompt_len[n] :][: rollout.completion_len[n]]
    return {"tokens": texts(rollout.completion_ids(n)), "logp": [round(float(x), 2) + 0.0 for x in logp]}


def _plain(value: Any) -> Any:
    """What JSON can hold of a reward's extra value: numbers, booleans and text as they are, all else as text."""
    value = _json(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def step_line(steps: int, row: Mapping[str, Any]) -> str:
    """A step's key figures in one line for the terminal."""
    shown = [f"step {row['step']}/{steps}", f"reward {row['reward']:.3f}"]
    shown += [f"unscored {row['unscored']}"] if row.get("unscored") else []
    shown += [f"same {row['frac_reward_zero_std']:.0%}", f"length {row['completions/mean_length']:.1f}"]
    shown += [f"cut {row['completions/clipped_ratio']:.0%}", f"entropy {row['entropy']:.3f}"]
    shown += [f"kl {row['kl']:.4f}"] if "kl" in row else []
    return "  ".join([*shown, f"grad {row['grad_norm']:.2f}", f"{row['seconds']:.2f} s"])


def peak_memory() -> int:
    """Bytes: the device's own count where it keeps one, else this process's largest resident size."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(stats.get("peak_bytes_in_use", kibibytes * 1024))
