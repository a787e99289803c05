"""docs/reading_a_run.md names every figure that runs write, and none that no code writes."""

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax.config import TrainConfig
from grpo_jax.metrics import read_json_lines
from grpo_jax.testing import tiny_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reading_a_run.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Every metric")[2].partition("\n## ")[0]
METRICS = [
    name
    for line in TABLE.splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])
]
LINE_KEYS = set(re.findall(r"`(\w+)`", TABLE.partition("A line of `completions.jsonl` holds")[2]))
ROWS = [{"prompt": f"{a}+{b}="} for a in range(3, 7) for b in range(2, 6)]


def digits(prompts, completions, completion_ids, log_extra=None, log_metric=None, **columns):
    log_extra("digits", [sum(c.isdigit() for c in text) for text in completions])
    log_metric("digit_count", 1.0)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


RUNS = {
    "grpo": {
        "algorithm": {"preset": "grpo", "dynamic_sampling": True, "loss": {"correction": "tis", "kl_coef": 0.1}},
        "eval": {"samples": 2, "every": 1},
    },
    "ppo": {"algorithm": {"preset": "ppo"}, "eval": {"every": None}},
}


@pytest.fixture(scope="module", params=RUNS)
def rows(request, tmp_path_factory, one_device):
    """metrics.jsonl and completions.jsonl of a run of a step."""
    place = tmp_path_factory.mktemp(request.param)
    tables = {
        "steps": 1,
        "output_dir": str(place / "run"),
        "compilation_cache": None,
        "rollout": {"prompts_per_step": 4, "num_samples": 2, "max_new_tokens": 4},
        "log": {"quiet": True, "report": False},
        **RUNS[request.param],
    }
    grpo_jax.Trainer(
        model=tiny_checkpoint(place / "model", num_hidden_layers=1),
        reward_funcs=digits,
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        config=TrainConfig.from_tables(tables),
    ).train()
    return [read_json_lines(place / "run" / f"{name}.jsonl") for name in ("metrics", "completions")]


def test_every_figure_of_a_run_is_explained(rows):
    patterns = [re.sub(r"<\w+>", "*", name) for name in METRICS if name != "<name>"]
    metrics, completions = rows
    unknown = {name for row in metrics for name in row if not any(fnmatchcase(name, p) for p in patterns)}
    assert unknown == {"digit_count"}  # what the reward function calls its own
    assert {key for row in completions for key in row} <= LINE_KEYS
    assert any(row["advantage"] != 0 for row in completions)


def test_no_figure_is_explained_that_no_code_writes():
    words = set()
    for file in (ROOT / "grpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                words |= set(node.value.split("/"))
    assert len(METRICS) > 50 and len(set(METRICS)) == len(METRICS)
    assert [name for name in METRICS if not name.endswith(">") and name.split("/")[-1] not in words] == []
