"""Contract 12: two processes of four devices sample, in slots and together, what one process does."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_engine import PROMPTS, assert_same_but_for_boundaries

from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt, Rollout

LIMIT, SAMPLES = 12, 4
ENGINES = {"cohort": {}, "refill": {"slots": 16, "refill": True}}
WORKER = """
import sys
import numpy as np
from grpo_jax.mesh import initialize_distributed, is_first, make_mesh
address, index, target = sys.argv[1:]
initialize_distributed(address, 2, int(index))
import jax
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
sys.path.insert(0, {tests!r})
from test_two_processes import ENGINES, sampled
from grpo_jax.testing import tiny_model
model, params = tiny_model(make_mesh(2, 2, 2))
for name, options in ENGINES.items():
    rollout = sampled(model, params, options)
    np.savez(f"{{target}}/{{name}}{{index}}.npz", **vars(rollout) | {{"drawn_logp": np.zeros(0)}})
"""


def sampled(model, params, options) -> Rollout:
    asked = [Prompt(i, tuple(p)) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=LIMIT, stop_ids=(1,))
    engine = ContinuousEngine(model, 16, **options)
    return engine.generate(params, asked, num_samples=SAMPLES, sampling=sampling, seed=0, step=0)


@pytest.mark.slow  # tests/models/test_two_hosts.py starts two as well
def test_contract_12_two_processes_sample_what_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", WORKER.format(tests=os.path.dirname(__file__)), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(i), str(tmp_path)], env=env, **pipes) for i in range(2)]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    model, params = tiny_model()
    for name, options in ENGINES.items():
        want = sampled(model, params, options)
        both = []
        for index in range(2):
            with np.load(tmp_path / f"{name}{index}.npz") as file:
                fields = dict(file)
            both.append(Rollout(**fields | {"drawn_logp": None}))
        np.testing.assert_array_equal(both[0].tokens, both[1].tokens)
        np.testing.assert_array_equal(both[0].sampler_logp, both[1].sampler_logp)
        assert_same_but_for_boundaries(model, params, want, both[0], range(len(PROMPTS)), SAMPLES)
        assert (both[0].tokens == want.tokens).all(1).mean() > 0.8
