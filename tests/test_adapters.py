"""Adapters in a run: what an update changes, what is kept, and what is exported."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.config import TrainConfig
from grpo_jax.testing import tiny_checkpoint

EXPORT = str(Path(__file__).parents[1] / "scripts" / "export_hf.py")
PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(2, 5) for b in range(2, 5)]


def share_of_digits(prompts, completions, completion_ids, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def _train(source, directory):
    config = {
        "steps": 2,
        "output_dir": str(directory),
        "compilation_cache": None,
        "model": {"lora": {"rank": 2, "alpha": 8.0, "targets": ["q", "v", "down"]}},
        "algorithm": {"loss": {"kl_coef": 0.1}},
        "rollout": {"prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 4},
        "eval": {"every": None},
        "optim": {"learning_rate": 1e-2},
        "checkpoint": {"every": 1},
        "log": {"quiet": True, "report": False},
    }
    trainer = grpo_jax.Trainer(
        model=source,
        reward_funcs=share_of_digits,
        train_dataset=PROMPTS,
        config=TrainConfig.from_tables(config),
    )
    trainer.train()


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    base = tmp_path_factory.mktemp("adapters")
    source, directory = tiny_checkpoint(base / "in", num_hidden_layers=1), base / "run"
    _train(source, directory)
    return source, directory


def _metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_only_adapted_maps_change(run):
    source, directory = run
    _, before = grpo_jax.load_model(source)
    _, after = grpo_jax.load_model(directory / "hf")
    paths = jax.tree_util.tree_flatten_with_path(before)[0]
    for (path, old), new in zip(paths, jax.tree.leaves(after), strict=True):
        adapted = any(f"'{name}']['kernel']" in jax.tree_util.keystr(path) for name in ("q", "v", "down"))
        assert np.array_equal(old, new) is not adapted, path


def test_the_base_is_the_reference(run):
    """The KL is 0 before the first update, and not after it."""
    first, second = _metrics(run[1])
    assert abs(first["kl"]) < 1e-6 and second["kl"] > 1e-6
    assert first["sampler_logp_difference/max"] < 1e-4 and second["sampler_logp_difference/max"] < 1e-4


def test_a_checkpoint_holds_the_adapters_and_exports_as_the_run_did(run, monkeypatch, tmp_path):
    source, directory = run
    for arguments in (["--out", str(tmp_path / "hf")], ["--out", str(tmp_path / "peft"), "--peft"]):
        monkeypatch.setattr(sys, "argv", ["export_hf.py", str(directory), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(EXPORT, run_name="__main__")
        assert ended.value.code == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        grpo_jax.load_model(tmp_path / "hf")[1],
        grpo_jax.load_model(directory / "hf")[1],
    )
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "q_proj",
        "v_proj",
    ]
    size = lambda place: sum(file.stat().st_size for file in place.rglob("*") if file.is_file())  # noqa: E731
    assert size(directory / "reference") > 10 * sum(p.nbytes for p in _adapters(tmp_path / "peft"))


def test_contract_9_a_run_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    """From step 1, on the base that the run kept, even where the model it was loaded from has changed."""
    source, directory = run
    again, other = tmp_path / "run", tmp_path / "in"
    shutil.copytree(directory, again, ignore=shutil.ignore_patterns("hf", "2", "summary.json"))
    config = (again / "config.toml").read_text().replace(str(source), str(other))
    (again / "config.toml").write_text(config)
    tiny_checkpoint(other, seed=9, num_hidden_layers=1)
    _train(other, again)
    ended = [grpo_jax.load_model(place / "hf")[1] for place in (directory, again)]
    jax.tree.map(np.testing.assert_array_equal, *ended)
    assert [row["step"] for row in _metrics(again)] == [1, 2]


def _adapters(directory):
    from safetensors.numpy import load_file

    return load_file(directory / "adapter_model.safetensors").values()


@pytest.mark.parametrize(
    "tables",
    [
        {"algorithm": {"preset": "ppo"}},
        {"algorithm": {"preset": "grpo", "loss": {"kl_coef": 0.1}, "reference_follow": {"every": 2}}},
    ],
)
def test_what_does_not_go_with_adapters_is_refused(tables):
    with pytest.raises(ValueError, match=r"model\.lora\.rank"):
        TrainConfig.from_tables(tables | {"model": {"lora": {"rank": 2}}})
