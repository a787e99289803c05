"""Contract 12: several processes of several devices make the decisions, and the numbers, of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.metrics import read_json_lines
from grpo_jax.testing import tiny_checkpoint

ROOT = Path(__file__).parent.parent
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"
CONFIG = """
steps = 3
[model]
path = "model"
[data]
train = "prompts.jsonl"
eval = "prompts.jsonl"
[rollout]
prompts_per_step = 8
num_samples = 4
max_new_tokens = 6
[algorithm]
preset = "grpo"
[reward]
functions = ["reward.py:digits"]
[optim]
learning_rate = 1e-2
[eval]
every = 2
[checkpoint]
every = 2
[mesh]
data = 2
fsdp = 2
tensor = 2
"""
REWARD = """
import random

def digits(prompts, completions, completion_ids, **columns):
    # The last bit of chance: were each process to ask for itself, they would disagree about the advantages.
    return [sum(c.isdigit() for c in text) + random.random() * 1e-3 for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosts")
    tiny_checkpoint(directory / "model", vocab_size=64)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+3="}) + "\n" for a in range(10)))
    (directory / "config.toml").write_text(CONFIG)
    (directory / "reward.py").write_text(REWARD)
    return directory


def start(place: Path, devices: int, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": FLAGS.format(devices)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, ROOT / "scripts" / "train.py", "config.toml", "--compilation_cache", "none", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def start_two(place: Path, output: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["--output_dir", output, "--mesh.distributed", "true", "--mesh.process_count", "2"]
    shared += ["--mesh.coordinator", f"127.0.0.1:{port}", "--reward.stream", "digits"]
    return [start(place, 4, *shared, "--mesh.process_id", str(i)) for i in range(2)]


@pytest.mark.slow
def test_contract_12_two_processes_of_four_devices_train_as_one_of_eight(place):
    processes = [*start_two(place, "two"), start(place, 8, "--output_dir", "one")]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert "step 3/3" in said[0] and "step" not in said[1]
    one, two = (read_json_lines(place / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 1, 2, 2, 3, 3]
    first, other = (next(row for row in rows if "reward" in row) for rows in (one, two))
    for name in ("completions/mean_length", "entropy", "reward"):
        assert other[name] == pytest.approx(first[name], abs=2e-3)
    assert (place / "two" / "summary.json").exists() and (place / "two" / "curves.png").exists()
    for name in ("model.safetensors", "config.json"):
        assert (place / "two" / "hf" / name).stat().st_size == (place / "one" / "hf" / name).stat().st_size
    again = start_two(place, "two")
    said = [process.communicate(timeout=240)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert "going on from step 3" in said[0]
    alone = start(place, 8, "--output_dir", "two", "--reward.stream", "digits")
    said = alone.communicate(timeout=240)[0]
    assert alone.returncode == 0 and "going on from step 3" in said, said
    assert "mesh.distributed: True -> False" in said and "by rounding only" in said
