"""Draw runs over each other and print how they fared: compare.py RUN RUN ... [--out FILE]."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_jax import rundir
from grpo_jax.callbacks.live import duration
from grpo_jax.config import read_toml
from grpo_jax.metrics import read_json_lines

PANELS = {
    "held-out accuracy": "eval/accuracy",
    "reward, mean of the step": "reward",
    "entropy (nat)": "entropy",
    "completion length (tokens)": "completions/mean_length",
}
MOST_MARKED = 30
"""Points up to which a curve has them marked."""


@dataclass(frozen=True)
class Recorded:
    """A run as its directory holds it: its name, its rows of metrics, completions sampled up to each step."""

    name: str
    rows: list[dict[str, Any]]
    sampled: dict[int, int]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was written."""
        return [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]


def load(directory: Path, name: str) -> Recorded:
    """Read a run, finished or not, to be called ``name``.

    Raises:
        ValueError: no directory, or no run in it.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give the directories of runs")
    for file in (rundir.METRICS, rundir.CONFIG):
        if not (directory / file).is_file():
            raise ValueError(f"{directory} holds no {file}, so it is no run; give the directories of runs")
    rollout = read_toml(directory / rundir.CONFIG)["rollout"]
    rows = read_json_lines(directory / rundir.METRICS)
    if not rows:
        raise ValueError(
            f"{directory / rundir.METRICS} is empty: the run has not come to its first figure; leave it out"
        )
    sampled, count = {0: 0}, 0
    for row in rows:
        if "reward" in row:
            groups = row.get("dynamic_sampling/groups_sampled", rollout["prompts_per_step"])
            count += int(groups) * rollout["num_samples"]
            sampled[row["step"]] = count
    return Recorded(name, rows, sampled)


def names(directories: list[Path]) -> list[str]:
    """What to call each: the name of its directory, or its whole path where two share a name."""
    short = [directory.resolve().name for directory in directories]
    whole = [str(directory) for directory in directories]
    return [name if short.count(name) == 1 else path for name, path in zip(short, whole, strict=True)]


def table(runs: list[Recorded]) -> Table:
    """First, best and last accuracy, last reward, steps and time of each run."""
    out = Table(box=None)
    out.add_column("run", overflow="fold")
    for title in ("first", "best", "last", "reward", "steps", "completions", "time"):
        out.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        accuracy = [value for _, value in run.points("eval/accuracy")]
        shares = (accuracy[0], max(accuracy), accuracy[-1]) if accuracy else ()
        shown = [f"{share:.1%}" for share in shares] or ["-"] * 3
        reward, elapsed = run.points("reward"), run.points("seconds/elapsed")
        step = max(run.sampled)
        shown += [f"{reward[-1][1]:.3f}" if reward else "-", str(step), f"{run.sampled[step]:,}"]
        out.add_row(run.name, *shown, duration(elapsed[-1][1]) if elapsed else "-")
    return out


def draw(runs: list[Recorded], path: Path) -> None:
    """Every panel against steps in the upper row and completions sampled in the lower."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(PANELS), 7.5), layout="constrained")
    axes = figure.subplots(2, len(PANELS))
    for column, (title, metric) in enumerate(PANELS.items()):
        for row, unit in enumerate(("step", "completions sampled")):
            axis = axes[row][column]
            for run in runs:
                points = run.points(metric)
                x = [run.sampled[step] if row else step for step, _ in points]
                marker = "." if len(points) <= MOST_MARKED else ""
                axis.plot(x, [value for _, value in points], marker=marker, label=run.name)
            axis.set_xlabel(unit)
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 not written, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="picture to write: .png, .svg or .pdf")
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--out: got {given.out}, but pictures are .png, .svg or .pdf; name one of these")
        runs = [load(directory, name) for directory, name in zip(given.runs, names(given.runs), strict=True)]
        Console().print(table(runs))
        draw(runs, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"curves: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
