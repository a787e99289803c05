"""The page itself: a template, style and scripts of this folder, with everything that is data packed as base64.

Nothing that comes from a run, be it a completion, a prompt, a metric's name or the config, becomes part of the HTML:
the scripts unpack it and put it on the page as text. A policy in the page forbids every other script and any access to
a network.
"""

import html
import secrets
import sys
import time
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from grpo_jax import rundir
from grpo_jax.callbacks.live import duration
from grpo_jax.callbacks.report.completions import Completions, pack, pack_json
from grpo_jax.callbacks.report.panels import charts
from grpo_jax.config import read_toml
from grpo_jax.metrics import read_json_lines

NAME = "report.html"
FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "curves.js", "completions.js")


def describe(directory: Path, state: str) -> dict[str, Any]:
    """All the page shows of a run but its completions, from the run's files; ``state`` says how far it is."""
    rows = read_json_lines(directory / rundir.METRICS)
    config = directory / rundir.CONFIG
    warnings = directory / rundir.WARNINGS
    return {
        "name": directory.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "figures": [("State", state), *_figures(directory, rows)],
        "warnings": read_json_lines(warnings) if warnings.exists() else [],
        "charts": charts(rows),
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
    }


def _figures(directory: Path, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    config = read_toml(directory / rundir.CONFIG) if (directory / rundir.CONFIG).exists() else {}
    steps = [row for row in rows if "reward" in row]
    out = [("Step", f"{steps[-1]['step'] if steps else 0} of {config.get('steps', '?')}")]
    accuracy = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    if accuracy:
        out.append(("Held-out accuracy", f"{accuracy[0]:.1%} → {accuracy[-1]:.1%}"))
        out.append(("Best", f"{max(accuracy):.1%}"))
    rewards = [row["reward"] for row in steps if row["reward"] is not None]
    if rewards:
        out.append(("Reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}"))
    elapsed = [row["seconds/elapsed"] for row in rows if row.get("seconds/elapsed") is not None]
    return out + ([("Time", duration(elapsed[-1]))] if elapsed else [])


@cache
def plotly() -> str:
    """The plotting library's script, packed; empty where it is not installed, which is said once."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        print("plotly is not installed, so report.html has no curves; pip install plotly", file=sys.stderr)
        return ""
    return pack(get_plotlyjs().encode("utf-8"))


def write_page(directory: Path, run: dict[str, Any], completions: Completions) -> Path:
    """Write report.html whole or not at all; where it lies."""
    blocks = completions.blocks()
    index = {
        "count": len(completions),
        "columns": list(completions.columns),
        "functions": completions.functions,
        "starts": completions.starts,
        "every": completions.every,
    }
    blobs = {"run": pack_json(run | {"index": index}), "index": completions.index(), "plotly": plotly()}
    blobs |= {f"block-{i}": block for i, block in enumerate(blocks)}
    values = {
        "title": html.escape(run["name"]),
        "nonce": secrets.token_urlsafe(16),
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    head, tail = (Template(part).substitute(values) for part in template.split("<!-- data -->"))
    partial = directory / f"{NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(head)
        for name, blob in blobs.items():
            file.write(f'<script type="application/octet-stream" id="{name}">{blob}</script>\n')
        file.write(tail)
    return partial.replace(directory / NAME)
