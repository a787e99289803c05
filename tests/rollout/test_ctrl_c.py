"""A real Ctrl-C in the middle of decoding: the process and its devices go on as if nothing had been."""

import os
import signal
import subprocess
import sys

import pytest

WORKER = """
import numpy as np
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt

model, params = tiny_model()
engine = ContinuousEngine(model, 16, slots=8)
asked = [Prompt(i, (5 + i, 6, 7)) for i in range(5)]
call = {"num_samples": 4, "sampling": Sampling(max_new_tokens=200), "seed": 0, "step": 0}
before = engine.generate(params, asked, **call)
try:
    print("decoding", flush=True)
    for _ in range(1000):
        engine.generate(params, asked, **call)
except KeyboardInterrupt:
    print("interrupted", flush=True)
after = engine.generate(params, asked, **call)
np.testing.assert_array_equal(before.tokens, after.tokens)
np.testing.assert_array_equal(before.sampler_logp, after.sampler_logp)
print("the same", flush=True)
"""


@pytest.mark.slow  # test_continuous.py stops a call from within, and samples again
def test_after_ctrl_c_the_same_engine_samples_the_same():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER], env=env, **pipes) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("decoding"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0 and said[-2:] == ["interrupted", "the same"], "\n".join(said)
