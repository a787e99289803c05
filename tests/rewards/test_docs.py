"""The guide to rewards: what its examples print is what it says they print."""

import contextlib
import importlib.util
import io
import re
import tomllib
from pathlib import Path

import pytest

from grpo_jax.config import TrainConfig
from grpo_jax.rewards import REWARDS
from grpo_jax.rewards.lookup import defaults

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0][:40])
def test_examples_print_what_is_written_beside(example):
    if "math_verify" in example and importlib.util.find_spec("math_verify") is None:
        pytest.skip("needs grpo_jax[math]")
    written = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(example, {"__name__": "guide"})
    assert written and out.getvalue().splitlines() == written


def test_the_examples_of_configs_load():
    tables = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    configs = [TrainConfig.from_tables(tomllib.loads(table)) for table in tables]
    for reward in (config.reward for config in configs):
        assert {*reward.options, *reward.stream} < {name.rpartition(":")[2] for name in reward.functions}
    assert any(config.reward.options for config in configs) and any(config.reward.stream for config in configs)


def test_every_builtin_and_each_of_its_parameters_is_in_the_table():
    for name, function in REWARDS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*\|(.*)\|$", GUIDE, re.MULTILINE)
        assert set(re.findall(r"`(\w+)", row)) == set(defaults(function))
        for parameter, value in defaults(function).items():
            if value not in (None, ""):
                shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
                assert f"{parameter} = {shown}" in row.replace('"', "")
