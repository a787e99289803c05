"""Every preset in the run: a step changes the policy, however it is cut and on whatever mesh, and resumes exactly."""

import jax
import numpy as np
import pytest
from learning_cases import assert_same_update, collected_for, config_for, copied, learning_for, moved

from grpo_jax.algo.spec import PRESETS


def steps_of(preset: str, devices: int, microbatch_rows: int | None, kind: str):
    """Two steps of a preset: what each moved, the figures, and whether the second repeats from a copied state."""
    epochs = 2 if PRESETS[preset].loss.has_ratio else 1
    batch = {"rows": kind} | ({} if kind == "padded" else {"row_len": 16})
    config = config_for(preset, optim={"microbatch_rows": microbatch_rows, "epochs": epochs}, batch=batch)
    learning = learning_for(config, devices)
    start = copied(learning.state)
    _, figures = learning.train(collected_for(config, 0))
    first = moved(start.params, learning.state.params)
    if learning.critic is not None:
        first += moved(start.critic.params, learning.state.critic.params)
    return learning, config, first, figures


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_the_same_on_eight_devices_in_microbatches_and_resumes_exactly(preset):
    learning, config, one, figures = steps_of(preset, 1, None, "padded")
    _, _, many, same = steps_of(preset, 8, 8, "group" if preset == "ppo" else "padded")
    assert_same_update(one, many)
    assert figures["skipped_update_count"] == same["skipped_update_count"] == 0
    for name in ("loss", "entropy", "grad_norm"):
        assert same[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-6)

    saved, controllers = copied(learning.state), learning.controllers.state()
    learning.train(collected_for(config, 1))
    whole = jax.tree.map(np.asarray, copied(learning.state))
    learning.state = saved
    learning.controllers.restore(controllers)
    learning.train(collected_for(config, 1))
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(np.asarray, learning.state))
    assert int(whole.step) == 2 * config.updates_per_step
