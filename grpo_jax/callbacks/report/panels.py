"""Which metrics are drawn together, and how."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

MOST_POINTS = 1500
"""Points of a curve; a longer one is averaged over neighbouring steps."""


@dataclass(frozen=True)
class Panel:
    """A chart: its title, the unit of its vertical axis, and which metrics it shows, as file name patterns."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    form: str = ""
    stacked: bool = False
    log: bool = False


PANELS = (
    Panel("Held-out accuracy", "share right", ("eval/*", "eval/*/*"), ".0%"),
    Panel("Reward by function", "mean of the step", ("reward", "rewards/*/mean")),
    Panel("Spread of rewards", "standard deviation", ("reward_std", "rewards/*/std")),
    Panel("Entropy of the policy", "nat a token", ("entropy",)),
    Panel("KL", "nat a token", ("kl", "approx_kl")),
    Panel("Completion length", "tokens", ("completions/*_length",)),
    Panel(
        "Shares",
        "of groups, completions or tokens",
        ("frac_reward_zero_std", "completions/clipped_ratio", "clip_ratio/*", "rejected"),
        ".0%",
    ),
    Panel("Gradient norm", "before clipping", ("grad_norm",)),
    Panel("Sampler and learner", "difference of log-probs, nat", ("sampler_logp_difference/*",), ".0e", log=True),
    Panel("Seconds by phase", "a step; the first may leave the axis", ("seconds/*",), stacked=True),
    Panel("Speed", "tokens a second", ("tokens_per_second",)),
    Panel("Learning rate", "", ("learning_rate",), ".1e"),
    Panel("Loss", "", ("loss", "policy_loss")),
)
NOT_DRAWN = ("step", "seconds/elapsed", "compile_count")


def charts(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl -> what the page draws: each panel that has data, then every other metric by its prefix."""
    curves = _curves(rows)
    out = []
    for panel in PANELS:
        names = [name for name in curves if any(fnmatchcase(name, pattern) for pattern in panel.metrics)]
        if names:
            out.append(_chart(panel, {name: curves.pop(name) for name in names}))
    others: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        others.setdefault(name.partition("/")[0], {})[name] = curve
    return out + [_chart(Panel(title, "", ()), named) for title, named in others.items()]


def _curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_DRAWN and isinstance(value, (int, float)) and not isinstance(value, bool):
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(value)
    curves.pop("seconds", None)  # the phases stacked show it
    return curves


def _chart(panel: Panel, curves: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    traces = [{"name": name, "x": _fewer(xs), "y": _fewer(ys)} for name, (xs, ys) in curves.items()]
    return {
        "title": panel.title,
        "unit": panel.unit,
        "form": panel.form,
        "stacked": panel.stacked,
        "log": panel.log,
        "traces": traces,
    }


def _fewer(values: list[float]) -> list[float]:
    width = -(-len(values) // MOST_POINTS)
    if width <= 1:
        return values
    return [float(f"{fmean(values[i : i + width]):.6g}") for i in range(0, len(values), width)]
