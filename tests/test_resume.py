"""Contract 9: save, kill, restore and continue equals not stopping, bitwise in everything but times.

Every run here is a process of its own, with the settings a user has; the kill is SIGKILL.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.metrics import JsonLines, read_json_lines
from grpo_jax.testing import tiny_checkpoint
from grpo_jax.types import TrainState

ROOT = Path(__file__).parent.parent
STEPS = 6
CONFIG = """
steps = 6
[rollout]
prompts_per_step = 4
num_samples = 4
max_new_tokens = 6
[algorithm]
preset = "grpo"
[reward]
functions = ["reward.py:digits"]
[optim]
learning_rate = 1e-2
schedule = "cosine"
minibatches = 2
[batch]
rows = "packed"
[eval]
every = 3
[checkpoint]
every = 1
"""
REWARD = """
def digits(prompts, completions, completion_ids, **columns):
    return [float(sum(c.isdigit() for c in text)) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    tiny_checkpoint(directory / "model", num_hidden_layers=1)
    rows = [json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(5) for b in range(3)]
    (directory / "prompts.jsonl").write_text("".join(rows))
    (directory / "config.toml").write_text(CONFIG)
    (directory / "reward.py").write_text(REWARD)
    return directory


def start(place: Path, output: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    paths = ["--model.path", "model", "--data.train", "prompts.jsonl", "--data.eval", "prompts.jsonl"]
    command = [sys.executable, ROOT / "scripts" / "train.py", "config.toml", *paths, "--output_dir", output]
    command += ["--compilation_cache", str(place / "cache")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def kill_after(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    """SIGKILL once the step's checkpoint is complete; the run is then somewhere in the next steps."""
    deadline = time.monotonic() + 240
    while not (directory / "checkpoints" / str(step)).exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def untimed(path: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_second", "compile")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_json_lines(path)]


@pytest.fixture(scope="module")
def whole(place):
    finish(start(place, "whole"))
    return place / "whole"


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert untimed(one / name) == untimed(other / name)
    for name in ("model.safetensors", "config.json"):
        assert (one / "hf" / name).read_bytes() == (other / "hf" / name).read_bytes()
    first, second = (json.loads((d / "summary.json").read_text()) for d in (one, other))
    for key in ("accuracy_first", "accuracy_best", "accuracy_last", "steps"):
        assert first[key] == second[key]


@pytest.mark.slow
def test_contract_9_a_run_killed_twice_ends_bitwise_as_one_that_was_not(place, whole):
    for step in (1, 4):
        process = start(place, "killed")
        kill_after(process, place / "killed", step)
    said = finish(start(place, "killed"))
    assert "going on from step" in said
    assert [row["step"] for row in read_json_lines(place / "killed" / "metrics.jsonl") if "reward" in row] == [
        *range(1, STEPS + 1)
    ]
    assert_same_run(whole, place / "killed")


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(place, whole):
    before = untimed(whole / "metrics.jsonl"), (whole / "hf" / "model.safetensors").read_bytes()
    said = finish(start(place, "whole"))
    assert f"going on from step {STEPS}" in said
    assert (untimed(whole / "metrics.jsonl"), (whole / "hf" / "model.safetensors").read_bytes()) == before


def test_a_save_holds_the_values_of_its_moment_though_the_buffers_are_donated(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    params = {"b": jnp.zeros((512, 1024)), "a": (jnp.ones(3, jnp.bfloat16),)}
    state = TrainState(params, {"count": jnp.zeros((), jnp.int32)}, jnp.zeros((), jnp.int32))
    for i in range(5):
        store.save(i, state, {"step": i, "note": ["é", None, 0.1]})
        state = step(state)
    store.wait()
    for i in range(5):
        restored, record = store.restore(i, state)
        assert record == {"step": i, "note": ["é", None, 0.1]}
        assert int(restored.step) == i and restored.params["a"][0].dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored.params["b"], float(i))
    assert store.latest() == 4
    store.close()


def test_the_reference_is_that_of_the_newest_start(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    # Ten and more sort otherwise as text.
    first = {"x": jnp.arange(4.0), "list": [jnp.full(2, float(i)) for i in range(11)]}
    store.save_reference(jax.tree.map(lambda x: x + 1, first))
    store.save_reference(first)
    assert store.check_reference() == ()
    jax.tree.map(np.testing.assert_array_equal, store.restore_reference(first), first)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["checkpoints", "reference"]
    store.close()


def test_lines_of_later_steps_and_a_line_cut_by_a_kill_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(4):
        lines.write({"step": step, "x": np.float32(0.5), "y": float("nan")})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "x": 0.')
    assert len(read_json_lines(path)) == 4
    lines = JsonLines(path, keep_below=2)
    lines.write({"step": 2, "x": 1})
    lines.close()
    assert read_json_lines(path) == [
        {"step": 0, "x": 0.5, "y": None},
        {"step": 1, "x": 0.5, "y": None},
        {"step": 2, "x": 1},
    ]
