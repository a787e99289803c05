"""A run on a terminal that can be drawn over: progress, key figures, curves of characters, the newest completion."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_jax.callbacks import Evaluation, Run, Step
from grpo_jax.config import TrainConfig
from grpo_jax.functions import printable
from grpo_jax.metrics import prompt_text

BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")
KEYS = {
    "reward": ("reward", ".3f"),
    "frac_reward_zero_std": ("same", ".0%"),
    "completions/mean_length": ("length", ".1f"),
    "completions/clipped_ratio": ("cut", ".0%"),
    "entropy": ("entropy", ".3f"),
    "kl": ("kl", ".4f"),
    "grad_norm": ("grad", ".2f"),
    "learning_rate": ("rate", ".1e"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "seconds": ("s/step", ".2f"),
}
"""Metrics shown: what they are called, and their format."""
TEXT_LINES = 6
"""Lines of the newest completion."""
COMPILING = "the first step compiles, which takes a while"
"""What is said before there is anything to show."""


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of characters: ``values`` averaged into at most ``width`` bins, each a bar between the extremes.

    >>> sparkline([0, 1, 2, 3], 4)
    '▁▃▆█'
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    bins = [statistics.fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    low, spread = min(bins, default=0.0), max(bins, default=0.0) - min(bins, default=0.0)
    top = len(BARS) - 1
    return "".join(BARS[round((value - low) / spread * top) if spread > 0 else 0] for value in bins)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3 s, 2:05, 1:00:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class Screen:
    """What is known of a run, to be drawn by rich whenever it likes."""

    def __init__(self, config: TrainConfig, run: Run):
        """Start from the run's history."""
        self._config, self._name = config, run.directory.name
        self._rewards = [row["reward"] for row in run.history if row.get("reward") is not None]
        self._accuracy = [row["eval/accuracy"] for row in run.history if row.get("eval/accuracy") is not None]
        self._functions = run.reward_names
        self._step, self._begun, self._row = run.start, time.monotonic(), dict[str, Any]()
        self._ends = list[float]()
        self._newest: RenderableType = Text(COMPILING, style="dim")

    def step(self, step: Step) -> None:
        """Take a step's figures and its first completion."""
        self._step, self._row = step.step, dict(step.metrics)
        self._ends.append(time.monotonic())
        if math.isfinite(_number(step.metrics.get("reward"))):
            self._rewards.append(step.metrics["reward"])
        self._newest = self._completion(step)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Take an evaluation's figures."""
        if math.isfinite(_number(evaluation.metrics.get("eval/accuracy"))):
            self._accuracy.append(evaluation.metrics["eval/accuracy"])

    def __rich__(self) -> RenderableType:
        """The panel as it is now."""
        parts: list[RenderableType] = [self._progress()]
        if self._row:
            parts += [Text(), _figures(self._row), Text(), _curve("reward", self._rewards, ".3f")]
        if self._accuracy:
            parts.append(_curve("held-out", self._accuracy, ".1%"))
        if self._row:
            parts.append(_phases(self._row))
        return Panel(
            Group(*parts, Text(), self._newest), title=Text(self._name), title_align="left", border_style="dim"
        )

    def _progress(self) -> RenderableType:
        steps, elapsed = self._config.steps, time.monotonic() - self._begun
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column()
        line.add_column(ratio=1)
        line.add_column(justify="right")
        left = self._seconds_left()
        when = f"{duration(elapsed)} gone" + (f", {duration(left)} left" if left is not None else "")
        line.add_row(f"step {self._step}/{steps}", ProgressBar(total=steps, completed=self._step), when)
        return line

    def _seconds_left(self) -> float | None:
        """By the mean time from step to step; the first one, which compiles, counts only while it is alone."""
        if not self._ends:
            return None
        first, last, count = self._ends[0], self._ends[-1], len(self._ends) - 1
        each = (last - first) / count if count else self._row["seconds"]
        return max(0.0, (self._config.steps - self._step) * each - (time.monotonic() - last))

    def _completion(self, step: Step) -> RenderableType:
        scored, finish = step.scored, str(step.rollout.finish[0])
        rewards = [
            f"{name} {value:.3g}" if math.isfinite(value) else f"{name} no answer"
            for name, value in zip(self._functions, scored.by_function[:, 0].tolist(), strict=True)
        ]
        facts = [*rewards, f"advantage {scored.advantages[0]:+.2f}", f"{step.rollout.completion_len[0]} tokens", finish]
        return Group(
            Text(_last_lines(prompt_text(step.prompts[0].text), 2), style="dim", no_wrap=True, overflow="ellipsis"),
            Lines(printable(scored.completions[0]), TEXT_LINES),
            Text("  ".join(facts), style="bold", no_wrap=True, overflow="ellipsis"),
        )


class Lines:
    """Text of at most so many lines, whatever the terminal's width."""

    def __init__(self, text: str, most: int):
        """Args: the text, and lines to show."""
        self._text, self._most = Text(text), most

    def __rich_console__(self, console: Console, options: Any) -> Any:
        """Wrap and cut."""
        lines = self._text.wrap(console, options.max_width)
        yield Text("\n").join(lines[: self._most])
        if len(lines) > self._most:
            yield Text(f"... {len(lines) - self._most} more lines", style="dim")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _last_lines(text: str, most: int) -> str:
    return "\n".join(printable(text).strip().splitlines()[-most:])


def _figures(row: Mapping[str, Any]) -> RenderableType:
    shown = [(title, format(row[name], form)) for name, (title, form) in KEYS.items() if row.get(name) is not None]
    half = -(-len(shown) // 2)
    table = Table.grid(padding=(0, 3))
    for start in range(0, len(shown), half):
        cells = shown[start : start + half]
        table.add_row(*(Text.assemble((f"{title} ", "dim"), (value, "bold")) for title, value in cells))
    return table


def _curve(title: str, values: Sequence[float], form: str) -> RenderableType:
    first, last = (format(values[i], form) if values else "" for i in (0, -1))
    text = Text.assemble((f"{title:<9}", "dim"), (sparkline(values, 48), "green"))
    return text + Text.assemble((f"  {first} -> ", "dim"), (last, "bold"))


def _phases(row: Mapping[str, Any]) -> RenderableType:
    phases = {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/")}
    phases.pop("elapsed", None)
    total = sum(phases.values()) or 1.0
    bar, legend = Text.assemble((f"{'seconds':<9}", "dim")), Text(" " * 9)
    largest = sorted(phases.items(), key=lambda item: -item[1])[: len(COLOURS)]
    for (name, seconds), colour in zip(largest, COLOURS, strict=False):
        bar.append("█" * round(48 * seconds / total), style=colour)
        legend.append("■ ", style=colour)
        legend.append(f"{name} {seconds:.2f}  ")
    legend.no_wrap, legend.overflow = True, "ellipsis"
    return Group(bar, legend)
