"""scripts/ladder.py: its rungs are what their names say, and its statistics are those of the formulas."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.cli import parse

ROOT = Path(__file__).parent.parent
SAYS = {
    "raw reward": {"algorithm.advantage": "raw", "algorithm.loss.surrogate": "reinforce", "optim.epochs": 1},
    "batch baseline": {"algorithm.advantage": "batch_mean", "algorithm.loss.surrogate": "reinforce"},
    "critic": {"algorithm.advantage": "gae", "algorithm.loss.surrogate": "reinforce", "optim.epochs": 1},
    "critic + clip (PPO)": {"algorithm.advantage": "gae", "algorithm.loss.clip_high": 0.2, "optim.epochs": 2},
    "PPO + reference KL": {"algorithm.advantage": "gae", "algorithm.loss.kl_coef": 0.04},
    "GRPO": {"algorithm.advantage": "grpo", "algorithm.loss.kl_coef": 0.04, "algorithm.loss.kl_estimator": "k3"},
    "Dr. GRPO": {"algorithm.advantage": "dr_grpo", "algorithm.loss.aggregation": "constant"},
    "DAPO": {"algorithm.dynamic_sampling": True, "algorithm.soft_overlong": True, "algorithm.loss.clip_high": 0.28},
}
"""What each rung's config has to hold, by the ladder's page."""


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "scripts" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", range(len(SAYS)), ids=list(SAYS))
def test_a_rung_is_what_its_name_says(place, ladder):
    rung = ladder.RUNGS[place]
    config, _ = parse(rung.options.split())
    for path, value in SAYS[rung.name].items():
        found = config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path
    assert (config.loss.kl_coef != 0) == (rung.name in ("PPO + reference KL", "GRPO"))
    assert config.steps == parse([])[0].steps and config.optim.learning_rate == parse([])[0].optim.learning_rate


def test_the_page_has_every_rung_and_what_a_critic_costs(ladder):
    assert [rung.name for rung in ladder.RUNGS] == list(SAYS)
    page = (ROOT / "docs" / "LADDER.md").read_text()
    for name, first in (("table", [rung.name for rung in ladder.RUNGS]), ("cost", [name for name, _ in ladder.COSTS])):
        begin, end = ladder.MARKERS[name]
        rows = page.partition(begin)[2].partition(end)[0].strip().splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows] == first


def test_the_interval_is_students(ladder):
    mean, half = ladder.interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(ladder.interval([0.5])[1])


def test_a_rung_is_better_only_beyond_its_interval(ladder):
    def runs(*last):
        return [{"last": value, "curve": [(256.0, value)]} for value in last]

    results = {
        "a": runs(0.3, 0.4, 0.5),
        "b": runs(0.51, 0.6, 0.71),
        "c": runs(0.7, 0.5, 0.65),
        "d": runs(0.1, 0.0, 0.0),
    }
    paces = {name: {"seconds": 1.0, "memory": 2**30} for name in results}
    rows = [row.split("|") for row in ladder.table(results, {"a": 2.0}, paces).splitlines()[2:]]
    verdicts = [row[3].rpartition(": ")[2].strip() for row in rows]
    assert verdicts == ["-", "better", "no difference shown", "worse"]
    assert rows[1][3].strip().startswith("+20.7 ± 1.4") and rows[0][5].strip() == "2"


def test_gradient_noise_is_that_of_the_gradients_that_were_drawn(ladder, tmp_path, monkeypatch):
    """The mean's squared length is 4, the covariance's trace 12, so 3; 48 gradients of 400 numbers show it closely."""
    random, mean = np.random.default_rng(0), np.full(400, 2 / math.sqrt(400))
    gradients = mean + random.normal(size=(ladder.WARM + ladder.MEASURED, 400)) * math.sqrt(12 / 400)
    moments = [np.zeros(400)]
    for gradient in gradients:
        moments.append(ladder.DECAY * moments[-1] + (1 - ladder.DECAY) * gradient)
    lines = [{"step": step, "grad_norm": float(np.linalg.norm(g))} for step, g in enumerate(gradients, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(ladder, "train", lambda *_: tmp_path)
    monkeypatch.setattr(ladder, "moment", lambda _, step: moments[step])
    assert ladder.noise(ladder.RUNGS[0], tmp_path) == pytest.approx(3.0, rel=0.1)


def test_a_text_is_put_between_its_markers_and_nowhere_else(ladder, tmp_path):
    page = tmp_path / "page.md"
    begin, end = ladder.MARKERS["table"]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter {ladder.MARKERS['cost'][0]}\n")
    ladder.write(page, "table", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter {ladder.MARKERS['cost'][0]}\n"


def test_the_picture_is_drawn(ladder, tmp_path):
    results = {
        r.name: [{"last": 0.5, "curve": [(0.0, 0.3), (512.0, 0.5 + 0.1 * s)]} for s in (0, 1)] for r in ladder.RUNGS
    }
    paces = {name: {"seconds": 1.0, "memory": 2**30} for name in results}
    ladder.draw(results, {"GRPO": 2.0}, paces, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
